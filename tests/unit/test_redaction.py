from __future__ import annotations

import pytest

from pocl_cli.redaction import scrub, scrub_command, scrub_values


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("loading with hf_AbCdEfGhIjKlMnOp", "hf_AbCdEfGhIjKlMnOp"),
        ("HF_TOKEN=s3cr3tvalue", "s3cr3tvalue"),
        ("teacher.hub_token=s3cr3tvalue,student=gpt2", "s3cr3tvalue"),
        ("token: s3cr3tvalue", "s3cr3tvalue"),
        ("pocl distill --token s3cr3tvalue student=gpt2", "s3cr3tvalue"),
        ("password='two words'", "two words"),
        ('{"api_key": "with \\" quote", "b": 1}', "quote"),
        ('secret="never closed value', "closed value"),
        ("AWS_SECRET_ACCESS_KEY=s3cr3tvalue", "s3cr3tvalue"),
        ("https://user:p@ss@host/path", "p@ss"),
        ("https://host/path?token=s3cr3tvalue&x=1", "s3cr3tvalue"),
        ("Authorization: Bearer s3cr3t.value", "s3cr3t.value"),
    ],
)
def test_scrub_when_text_holds_a_secret_then_only_the_secret_is_hidden(text: str, secret: str) -> None:
    clean = scrub(text)
    assert secret not in clean
    assert "***" in clean
    assert scrub(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "the first differing token: 'abc' at 17",
        "dataset.max_tokens=256 num_tokens: 12 tokenizer=toy",
        "pad_token=<pad> eos_token: </s>",
        "1.5 nats per response token = the mean",
        "see https://host/path and mail a@b",
    ],
)
def test_scrub_when_text_only_speaks_of_tokens_then_it_stays(text: str) -> None:
    assert scrub(text) == text


def test_scrub_when_an_environment_variable_is_a_secret_then_its_value_is_hidden_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "something-long")
    assert scrub("request with 0123456789abcdef failed") == "request with *** failed"
    assert scrub("something-long") == "something-long"


def test_scrub_values_when_a_key_names_a_secret_then_its_value_is_hidden_at_any_depth() -> None:
    values = {"a": [{"hub_token": "x", "eos_token": "</s>"}], "api_key": None, "url": "https://u:p@h", "seed": 10}
    assert scrub_values(values) == {
        "a": [{"hub_token": "***", "eos_token": "</s>"}],
        "api_key": None,
        "url": "https://***@h",
        "seed": 10,
    }


def test_scrub_command_when_a_flag_and_its_secret_are_two_arguments_then_the_second_is_hidden() -> None:
    command = ["pocl", "distill", "--token", "s3cr3tvalue", "teacher.hub_token=s3cr3tvalue", "train.seed=10"]
    assert scrub_command(command) == ["pocl", "distill", "--token", "***", "teacher.hub_token=***", "train.seed=10"]
