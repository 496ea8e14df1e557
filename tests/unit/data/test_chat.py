"""Conversations under a tokenizer's chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pocl_cli.data.chat import ChatEncoder
from pocl_cli.data.sources import load_dataset
from pocl_cli.data.tokenise import tokenise, tokenizer_hash
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import DroppedRow, Record, TokenisedRow

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = (("system", "Be brief."), ("user", "Name a fox."))


@pytest.fixture
def chatty(tokenizer) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def conversation(*turns: tuple[str, str], answer: str = "Red.") -> Record:
    return Record("id", turns[-1][1], "", (answer,), turns=turns, where="chats.jsonl:7")


def encode(tokenizer: Any, record: Record, *limits: Any) -> TokenisedRow | DroppedRow:
    (row,) = ChatEncoder(tokenizer, *(limits or (512, 256, "cut"))).encode_batch([record])
    return row


def encoded(tokenizer: Any, record: Record, *limits: Any) -> TokenisedRow:
    row = encode(tokenizer, record, *limits)
    assert isinstance(row, TokenisedRow), row
    return row


def texts(tokenizer: Any, row: TokenisedRow) -> tuple[str, str]:
    return tokenizer.decode(row.prompt_ids), tokenizer.decode(row.response_ids)


@pytest.mark.parametrize("eos_in_template", [True, False])
def test_conversation_when_rendered_then_is_the_templates_prompt_and_answer_with_one_eos(
    chatty, eos_in_template: bool
) -> None:
    if not eos_in_template:
        chatty.chat_template = TEMPLATE.replace("<|endoftext|>", "")
    row = encoded(chatty, conversation(*ASKED))
    assert texts(chatty, row) == ("[system]Be brief.\n[user]Name a fox.\n[assistant]", "Red.<|endoftext|>")
    assert list(row.response_ids).count(chatty.eos_token_id) == 1


def test_conversation_when_the_template_writes_before_the_answer_then_that_is_part_of_the_response(chatty) -> None:
    chatty.chat_template = TEMPLATE.replace("{{ message.content }}", "{{ '(thinks)' + message.content | trim }}")
    row = encoded(chatty, conversation(("user", "Q"), answer=" Red. "))
    assert texts(chatty, row) == ("[user](thinks)Q\n[assistant]", "(thinks)Red.<|endoftext|>")


def test_answer_when_too_long_then_is_cut_without_eos(chatty) -> None:
    row = encoded(chatty, conversation(*ASKED, answer="a long answer " * 40), 128, 100, "cut")
    assert row.response_cut
    assert row.num_tokens == 128
    assert chatty.eos_token_id not in row.response_ids


def test_long_prompt_when_cut_then_loses_the_earliest_exchanges_and_keeps_the_system_turn(chatty) -> None:
    turns = (("system", "S"), ("user", "one " * 20), ("assistant", "A"), ("user", "two"))
    row = encoded(chatty, conversation(*turns), 128, 60, "cut")
    assert row.prompt_cut
    assert texts(chatty, row)[0] == "[system]S\n[user]two\n[assistant]"
    assert isinstance(encode(chatty, conversation(*turns), 128, 60, "drop"), DroppedRow)


@pytest.mark.parametrize("before", [(), (("user", "Q"), ("assistant", "A"))])
def test_long_prompt_when_the_last_turn_is_too_long_then_loses_its_tail_and_keeps_the_template(chatty, before) -> None:
    row = encoded(chatty, conversation(*before, ("user", "word " * 99)), 128, 60, "cut")
    prompt = texts(chatty, row)[0]
    assert prompt.startswith("[user]word word")
    assert prompt.endswith("\n[assistant]")
    assert 50 < len(row.prompt_ids) <= 60


def test_long_prompt_when_not_even_one_token_fits_then_the_row_is_dropped(chatty) -> None:
    row = encode(chatty, conversation(*ASKED), 128, 5, "cut")
    assert row == DroppedRow("record id", "no room for the instruction in the prompt", "id")


@pytest.mark.parametrize("place", ["turn", "answer"])
def test_conversation_when_a_text_names_a_special_token_then_the_row_is_dropped(chatty, place: str) -> None:
    record = (
        conversation(("user", "x<|endoftext|>[assistant]no"))
        if place == "turn"
        else conversation(("user", "x"), answer="no<|pad|>")
    )
    assert isinstance(encode(chatty, record), DroppedRow)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("<|endoftext|>", "<end>"), "ends the answer with '<end>', where EOS is '<|endoftext|>'"),
        (("[{{ message.role }}]", "[{{ loop.length }}]"), "does not begin like the prompt"),
        (("{{ message.content }}", "{{ message.content | upper }}"), "the answer is not in what it writes"),
        (("{% endfor %}", "{{ raise_exception('roles must alternate') }}{% endfor %}"), "roles must alternate"),
    ],
)
def test_template_when_it_does_not_end_where_expected_then_the_error_names_file_and_line(
    chatty, change: tuple[str, str], reason: str
) -> None:
    chatty.chat_template = TEMPLATE.replace(*change)
    with pytest.raises(DataError, match=r"chats\.jsonl:7") as caught:
        encode(chatty, conversation(*ASKED))
    assert reason in str(caught.value)


def test_template_when_it_reaches_for_globals_then_the_sandbox_refuses(chatty, tmp_path: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    chatty.chat_template = TEMPLATE + reach
    with pytest.raises(DataError, match="refuses the conversation"):
        encode(chatty, conversation(*ASKED))


def test_encoder_when_the_tokenizer_has_no_template_then_is_a_configuration_error(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*dataset\.format=messages"):
        ChatEncoder(tokenizer, 512, 256, "cut")


def test_rows_when_conversations_then_the_last_answer_is_the_response(make_config, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "human", "content": "three"},
                {"from": "gpt", "value": "four"},
                {"role": "user", "content": "left out"},
            ]
        },
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "assistant", "content": "A"}]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_dataset(make_config(path=str(path), format="messages"))
    (record,) = loaded.records
    assert record.turns == (("user", "one"), ("assistant", "two"), ("user", "three"))
    assert (record.references, record.beginning, record.where) == (("four",), "three", f"{path}:1")
    assert [(row.location, row.reason) for row in loaded.dropped] == [
        ("chats.jsonl:2", "conversation without an assistant's turn"),
        ("chats.jsonl:3", "empty response"),
        ("chats.jsonl:4", "empty prompt"),
    ]


@pytest.mark.parametrize("turn", ["text", {"content": "no role"}, {"role": "user", "content": ["parts"]}])
def test_rows_when_a_turn_is_of_another_shape_then_the_error_names_the_line(make_config, tmp_path, turn: Any) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [turn, {"role": "assistant", "content": "A"}]}) + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:1"):
        load_dataset(make_config(path=str(path), format="messages"))


def test_tokens_when_the_template_changes_then_are_made_anew(make_config, chatty, tmp_path: Path) -> None:
    config, records = make_config(path="x", format="messages"), [conversation(*ASKED)]
    before = tokenise(records, chatty, config, tmp_path, tokenizer_hash(chatty)).row("id")
    chatty.chat_template = TEMPLATE.replace("[", "<")
    after = tokenise(records, chatty, config, tmp_path, tokenizer_hash(chatty)).row("id")
    assert before.prompt_ids != after.prompt_ids
