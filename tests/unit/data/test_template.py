"""The prompt and the token ids of one record, with a real byte-level tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pocl_cli.data.template import RowEncoder, render_prompt
from pocl_cli.errors import ConfigError
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer
from pocl_cli.records import DroppedRow, Record, TokenisedRow

END = "\n\n### Response:\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nQ\n\n### Response:\n"
)


def make_record(instruction: str, input: str = "", response: str = "A") -> Record:
    return Record("id", instruction, input, (response,))


def encoded(row: TokenisedRow | DroppedRow) -> TokenisedRow:
    assert isinstance(row, TokenisedRow), row
    return row


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, *limits: Any) -> TokenisedRow | DroppedRow:
    return RowEncoder(tokenizer, *limits).encode(record)


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{i}" for i in range(count))


@pytest.mark.parametrize(("input", "prompt"), [("I", WITH_INPUT), ("", WITHOUT_INPUT), (" \n", WITHOUT_INPUT)])
def test_prompt_when_rendered_then_is_the_template_with_or_without_input(input: str, prompt: str) -> None:
    assert render_prompt("Q", input) == prompt


def test_prompt_when_a_text_has_braces_then_keeps_them() -> None:
    assert "{input} {0} {{}}" in render_prompt("{input} {0} {{}}", "{instruction}")


def test_row_when_short_then_is_prompt_and_response_with_eos(tokenizer) -> None:
    row = encoded(encode(make_record("Q", "I", "an answer"), tokenizer, 512, 256, "cut"))
    assert tokenizer.decode(row.prompt_ids) == WITH_INPUT
    assert tokenizer.decode(row.response_ids) == "an answer<|endoftext|>"
    assert row.response_ids[-1] == tokenizer.eos_token_id
    assert row.num_tokens == len(row.prompt_ids) + len(row.response_ids)
    assert (row.prompt_cut, row.response_cut) == (False, False)


def test_response_when_a_row_has_several_references_then_is_the_first(tokenizer) -> None:
    record = Record("id", "Q", "", ("first", "second"))
    row = encoded(encode(record, tokenizer, 512, 256, "cut"))
    assert tokenizer.decode(row.response_ids[:-1]) == "first"


def test_response_when_too_long_then_is_cut_without_eos(tokenizer) -> None:
    record = make_record("Q", response=words("w", 200))
    row = encoded(encode(record, tokenizer, 128, 100, "cut"))
    assert row.response_cut
    assert row.num_tokens == 128
    assert tokenizer.eos_token_id not in row.response_ids
    assert record.response.startswith(tokenizer.decode(row.response_ids))


@pytest.mark.parametrize(("max_tokens", "is_cut"), [(0, False), (-1, True), (1, False)])
def test_response_when_it_fits_to_the_token_then_keeps_its_eos(tokenizer, max_tokens: int, is_cut: bool) -> None:
    record = make_record("Q", response="a somewhat longer answer")
    whole = encoded(encode(record, tokenizer, 512, 256, "cut"))
    row = encoded(encode(record, tokenizer, whole.num_tokens + max_tokens, 100, "cut"))
    assert row.response_cut == is_cut
    assert (row.response_ids[-1] == tokenizer.eos_token_id) == (not is_cut)


def test_long_prompt_when_the_input_is_long_then_loses_the_tail_of_the_input(tokenizer) -> None:
    instruction, input = words("q", 5), words("i", 300)
    row = encoded(encode(make_record(instruction, input), tokenizer, 512, 256, "cut"))
    prompt = tokenizer.decode(row.prompt_ids)
    head, tail = prompt.split("\n\n### Input:\n")
    assert row.prompt_cut
    assert head.endswith(instruction)
    assert tail.endswith(END)
    kept = tail.removesuffix(END)
    assert input.startswith(kept)
    assert 256 - 3 <= len(row.prompt_ids) <= 256
    assert len(kept) > 100


def test_long_prompt_when_the_instruction_alone_is_too_long_then_loses_the_input_and_its_own_tail(tokenizer) -> None:
    instruction = words("q", 300)
    row = encoded(encode(make_record(instruction, words("i", 50)), tokenizer, 512, 256, "cut"))
    prompt = tokenizer.decode(row.prompt_ids)
    assert prompt.startswith("Below is an instruction that describes a task. Write")
    assert prompt.endswith(END)
    assert "### Input:" not in prompt
    assert instruction.startswith(prompt.split("### Instruction:\n")[1].removesuffix(END))
    assert 256 - 3 <= len(row.prompt_ids) <= 256


def test_long_prompt_when_only_the_instruction_fits_then_keeps_all_of_it(tokenizer) -> None:
    instruction = words("q", 10)
    limit = len(tokenizer(render_prompt(instruction, ""))["input_ids"])
    row = encoded(encode(make_record(instruction, words("i", 50)), tokenizer, 512, limit, "cut"))
    assert tokenizer.decode(row.prompt_ids) == render_prompt(instruction, "")
    assert row.prompt_cut


def test_long_prompt_when_it_fits_to_the_token_then_is_whole(tokenizer) -> None:
    record = make_record(words("q", 20), words("i", 20))
    prompt = render_prompt(record.instruction, record.input)
    limit = len(tokenizer(prompt)["input_ids"])
    assert not encoded(encode(record, tokenizer, 512, limit, "cut")).prompt_cut
    assert encoded(encode(record, tokenizer, 512, limit - 1, "cut")).prompt_cut


def test_long_prompt_when_to_be_dropped_then_is_dropped_with_the_limit(tokenizer) -> None:
    row = encode(make_record("Q", words("i", 300)), tokenizer, 512, 256, "drop")
    assert row == DroppedRow("record id", "prompt longer than 256 tokens", "id")


def test_long_prompt_when_not_even_one_character_fits_then_the_row_is_dropped(tokenizer) -> None:
    limit = len(tokenizer(render_prompt("", ""))["input_ids"]) + 1
    row = encode(make_record("👍 yes"), tokenizer, 512, limit, "cut")
    assert row == DroppedRow("record id", "no room for the instruction in the prompt", "id")


@given(
    instruction=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    input=st.text(st.characters(exclude_categories=["Cs"]), max_size=400),
    limit=st.integers(40, 160),
)
@settings(max_examples=60, deadline=None)
def test_prompt_when_any_text_is_cut_then_fits_and_keeps_the_template(tokenizer, instruction, input, limit) -> None:
    row = encode(make_record(instruction, input), tokenizer, 512, limit, "cut")
    if isinstance(row, DroppedRow):
        # White space alone is no instruction, and the smallest limit has no room for a character of many tokens.
        assert row.reason == "no room for the instruction in the prompt"
        assert not instruction.strip() or limit < 60 or instruction[0].isspace()
        return
    prompt = tokenizer.decode(row.prompt_ids)
    whole = render_prompt(instruction, input)
    assert len(row.prompt_ids) <= limit
    assert prompt.endswith(END)
    assert row.prompt_cut == (prompt != whole)
    # Nothing but tails of the row's texts is missing, and no character was torn apart.
    kept_instruction, _, kept_input = (
        prompt.split("### Instruction:\n", 1)[1].removesuffix(END).partition("\n\n### Input:\n")
    )
    if "\n\n### Input:\n" not in instruction:
        assert instruction.startswith(kept_instruction)
        assert input.startswith(kept_input)
        assert not kept_input or kept_instruction == instruction


@pytest.mark.parametrize("character", ["👍", "é", "中", "ﷺ"])
def test_cut_when_characters_have_several_tokens_then_tears_none(tokenizer, character: str) -> None:
    for limit in range(180, 190):
        row = encoded(encode(make_record("Q", character * 300), tokenizer, 512, limit, "cut"))
        prompt = tokenizer.decode(row.prompt_ids)
        assert "\ufffd" not in prompt
        assert prompt.endswith(f"{character}{END}")


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|pad|>", "a<|endoftext|>b <|endoftext|>"])
def test_special_tokens_when_named_in_a_text_then_are_plain_text(tokenizer, name: str) -> None:
    row = encoded(encode(make_record(name, name, name), tokenizer, 512, 256, "cut"))
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert special.isdisjoint(row.prompt_ids)
    assert special.isdisjoint(row.response_ids[:-1])
    assert tokenizer.decode(row.prompt_ids) == render_prompt(name, name)
    assert tokenizer.decode(row.response_ids[:-1]) == name


def test_special_tokens_when_a_tokenizer_makes_them_of_text_anyway_then_the_row_is_dropped() -> None:
    texts = render_prompt("Q", "").split()
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", "</s>", *texts, "A"]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    word_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    row = encode(make_record("Q", response="A </s> A"), word_tokenizer, 512, 256, "cut")
    assert row == DroppedRow("record id", "text that the tokenizer turns into a special token", "id")
    # The token for unknown words is special by name only.
    assert isinstance(encode(make_record("Q", response="unknown"), word_tokenizer, 512, 256, "cut"), TokenisedRow)


def test_row_when_the_tokenizer_is_slow_then_is_encoded_and_cut_alike() -> None:
    slow = ByT5Tokenizer()
    row = encoded(encode(make_record("Q", "é" * 500 + "</s>", "A</s>é"), slow, 512, 256, "cut"))
    assert not slow.is_fast
    assert slow.decode(row.prompt_ids).endswith(f"é{END}")
    assert 254 <= len(row.prompt_ids) <= 256
    assert row.response_ids[-1] == slow.eos_token_id
    assert slow.eos_token_id not in row.response_ids[:-1]


def test_row_when_the_toy_tokenizer_cuts_it_then_keeps_the_template() -> None:
    toy = build_toy_tokenizer()
    row = encoded(encode(make_record("Sort the list.", "cat dog " * 100), toy, 64, 32, "cut"))
    prompt = toy.decode(row.prompt_ids)
    assert prompt.endswith(END)
    assert set(prompt.split("### Input:\n")[1].removesuffix(END).split()) == {"cat", "dog"}
    assert 30 <= len(row.prompt_ids) <= 32


def test_response_when_it_gives_no_token_then_the_row_is_dropped() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("x", behavior="removed")
    removing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert encode(make_record("Q", response="xxx"), removing, 512, 256, "cut") == DroppedRow(
        "record id", "response without tokens", "id"
    )


def test_encoder_when_the_tokenizer_has_no_eos_then_is_a_configuration_error() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match="the tokenizer has no EOS token"):
        RowEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 512, 256, "cut")


def test_encoder_when_the_template_does_not_fit_then_is_a_configuration_error(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.max_prompt_tokens=10 leaves no room"):
        RowEncoder(tokenizer, 512, 10, "cut")


def test_encoder_when_given_a_batch_then_gives_the_rows_of_single_calls(tokenizer) -> None:
    records = [make_record(words("q", i), words("i", 3 * i), words("a", i + 1)) for i in range(1, 60)]
    encoder = RowEncoder(tokenizer, 300, 200, "cut")
    assert encoder.encode_batch(records) == [encoder.encode(record) for record in records]


def test_encoder_when_a_text_is_huge_then_cuts_it(tokenizer) -> None:
    huge = "word " * 50_000
    encoder = RowEncoder(tokenizer, 512, 256, "cut")
    row = encoded(encoder.encode(make_record("Q", huge, huge)))
    assert (row.prompt_cut, row.response_cut, row.num_tokens) == (True, True, 512)
    assert len(row.prompt_ids) >= 253
