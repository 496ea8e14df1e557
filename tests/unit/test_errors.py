from __future__ import annotations

import pickle

import pytest

from pocl_cli import errors
from pocl_cli.errors import ConfigError, Interrupted, PoclError, nearest, printable

# The exit codes of the README. 0, 1, 130 and 143 have no class here.
EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "ArtifactError": 4,
    "ResourceError": 5,
    "LockedError": 6,
    "NonFiniteError": 7,
    "WorkerError": 8,
    "SecurityError": 9,
    "PoclError": 70,
}


def test_exit_code_when_an_error_class_exists_then_it_has_the_one_of_the_table() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PoclError)]
    assert {kind.__name__: kind.exit_code for kind in classes} == EXIT_CODES


def test_error_when_printed_then_it_says_what_where_why_and_what_to_do() -> None:
    error = ConfigError("bad value", where="rows.jsonl:17", why="it is empty", fix="mend it")
    assert str(error) == "bad value in rows.jsonl:17 — it is empty — mend it"
    assert str(ConfigError("bad value", fix="mend it")) == "bad value — mend it"


def test_error_when_its_text_holds_control_characters_then_one_harmless_line_is_printed() -> None:
    assert str(ConfigError("a\nb\x1b[31m\u2028c")) == "a\\nb\\x1b[31m\\u2028c"


def test_error_when_it_crosses_a_process_then_it_is_the_same() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("what", where="here", why="because", fix="do")))
    assert isinstance(error, ConfigError)
    assert (error.what, error.where, error.why, error.fix) == ("what", "here", "because", "do")


def test_interrupted_when_raised_then_no_handler_of_exceptions_swallows_it() -> None:
    assert not issubclass(Interrupted, Exception)
    assert Interrupted("stopped", why="SIGTERM", fix="again").exit_code == 143
    assert Interrupted("stopped", why="SIGINT", fix="again", exit_code=130).exit_code == 130


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dsitll", "distill"), ("scores", "score"), ("distill", "distill"), ("xyz", None), ("", None)],
)
def test_nearest_when_a_name_is_like_another_then_it_is_found(name: str, expected: str | None) -> None:
    assert nearest(name, ["score", "partition", "distill"]) == expected


@pytest.mark.parametrize("text", ["plain", "ümläut — dash", "日本語", "a b"])
def test_printable_when_text_is_harmless_then_it_stays(text: str) -> None:
    assert printable(text) == text


def test_printable_when_text_holds_a_lone_surrogate_then_it_is_escaped() -> None:
    assert printable("a\ud800") == "a\\ud800"
