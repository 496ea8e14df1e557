"""The toy tokenizer: round trips, whole words, and files that load without code."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pocl_cli.data.generators.toy import ToyInstructions
from pocl_cli.data.template import render_prompt
from pocl_cli.models.toy_tokenizer import (
    DIGITS,
    EOS_TOKEN,
    PAD_TOKEN,
    TEMPLATE_STRINGS,
    VERSION,
    WORDS,
    build_toy_tokenizer,
)

TOY = build_toy_tokenizer()
ROWS = [row for split in ("train", "test") for row in ToyInstructions().rows(split, 3600, 3)]
ODD_TEXTS = [
    "",
    " ",
    "\n",
    " x",
    "\n\n a\n  b\n",
    "Order\n 1 cat\n",
    "unheard-of words, 42 cats",
    "naïve 漢字 🙂 שלום",
    "\x00\r\n\t a\u2028b\u0085c",
    f"{EOS_TOKEN} and {PAD_TOKEN}",
    *TEMPLATE_STRINGS,
    "".join(TEMPLATE_STRINGS),
]


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOY(text, add_special_tokens=False)["input_ids"]
    return ids


def test_decode_when_text_is_a_toy_row_then_gives_it_back() -> None:
    for row in ROWS:
        for text in (render_prompt(row["instruction"], row["input"]), row["output"]):
            assert TOY.decode(ids_of(text)) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decode_when_text_is_odd_then_gives_it_back(text: str) -> None:
    assert TOY.decode(ids_of(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_when_text_is_anything_then_gives_it_back(text: str) -> None:
    assert TOY.decode(ids_of(text)) == text


@given(st.lists(st.sampled_from([" ", "\n", "cat", "4", "Copy", ".", *TEMPLATE_STRINGS]), max_size=12).map("".join))
def test_decode_when_text_mixes_spaces_lines_and_words_then_gives_it_back(text: str) -> None:
    assert TOY.decode(ids_of(text)) == text


@pytest.mark.parametrize("index", range(36))
def test_encode_when_prompt_and_response_are_joined_then_has_the_tokens_of_both(index: int) -> None:
    prompt, response = render_prompt(ROWS[index]["instruction"], ROWS[index]["input"]), ROWS[index]["output"]
    assert ids_of(prompt + response) == ids_of(prompt) + ids_of(response)
    assert (
        TOY.decode([*ids_of(prompt), *ids_of(response), TOY.eos_token_id], skip_special_tokens=True)
        == prompt + response
    )


def test_encode_when_a_word_begins_a_line_then_is_the_token_of_any_other_place() -> None:
    once, twice = ids_of("cat"), ids_of("dog cat\ncat")
    assert len(once) == 1
    assert twice[1] == twice[3] == once[0]


def test_encode_when_text_is_a_toy_row_then_every_word_and_digit_is_one_token() -> None:
    for row in ROWS[:3600]:
        for text in (row["instruction"], row["input"], row["output"]):
            assert len(ids_of(text)) == len(re.findall(r"[A-Za-z]+|[0-9]|[^A-Za-z0-9 ]", text)), text


def test_encode_when_prompt_is_rendered_then_every_fixed_string_is_one_token() -> None:
    assert len(ids_of(render_prompt("Copy", "cat"))) == 5
    assert len(ids_of(render_prompt("Copy", ""))) == 3


def test_words_when_compared_with_the_tasks_then_are_the_same() -> None:
    spoken = {
        word
        for row in ROWS
        for key in ("instruction", "input", "output")
        for word in re.findall(r"[A-Za-z]+", row[key])
    }
    assert spoken == set(WORDS)


def test_vocabulary_when_built_then_special_tokens_differ_and_no_id_is_missing() -> None:
    assert (TOY.pad_token_id, TOY.eos_token_id) == (0, 1)
    assert sorted(TOY.get_vocab().values()) == list(range(len(TOY)))
    assert len(TOY) == 2 + len(TEMPLATE_STRINGS) + len(WORDS) + len(DIGITS) + 256


def test_encode_when_text_names_a_special_token_then_it_is_text() -> None:
    assert not {TOY.pad_token_id, TOY.eos_token_id} & set(ids_of(f"{EOS_TOKEN}{PAD_TOKEN}"))
    assert TOY.decode([ids_of("cat")[0], TOY.eos_token_id], skip_special_tokens=True) == "cat"


def test_tokenizer_when_saved_and_loaded_then_is_the_same_and_needs_no_code(tmp_path: Path) -> None:
    TOY.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOY.get_vocab()
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == (EOS_TOKEN, PAD_TOKEN, "left")
    for text in (*ODD_TEXTS, *(render_prompt(row["instruction"], row["input"]) for row in ROWS[:72])):
        assert loaded(text)["input_ids"] == ids_of(text)
        assert loaded.decode(ids_of(text)) == text
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_tokenizer_when_built_twice_then_is_the_same() -> None:
    assert build_toy_tokenizer().backend_tokenizer.to_str() == build_toy_tokenizer().backend_tokenizer.to_str()


def test_vocabulary_when_it_is_this_version_then_its_ids_are_these() -> None:
    vocabulary = json.dumps(TOY.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(vocabulary.encode()).hexdigest()
    assert (VERSION, digest[:16]) == (1, "3b16d94f5b675ec8"), "other ids: raise VERSION, then change this line"
