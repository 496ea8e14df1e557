from __future__ import annotations

import pytest

from pocl_cli.cli import STEPS
from pocl_cli.completion import script, without_config_dirs
from pocl_cli.errors import ConfigError


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_script_when_asked_for_then_it_knows_all_commands(shell: str) -> None:
    text = script(shell)
    assert all(step in text for step in STEPS)
    assert text.rstrip().endswith("-F _pocl pocl")


def test_script_when_the_shell_is_unknown_then_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigError, match="known are bash, zsh"):
        script("fish")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pocl a=1 --config-dir x b=", ("pocl a=1 b=", ["x"])),
        ("pocl --config-dir=x -cd y ", ("pocl ", ["x", "y"])),
        ("pocl --config-dir", ("pocl", [""])),
        ("pocl a=1  ", ("pocl a=1  ", [])),
    ],
)
def test_without_config_dirs_when_a_line_has_them_then_they_are_taken_out(
    line: str, expected: tuple[str, list[str]]
) -> None:
    assert without_config_dirs(line) == expected
