"""The words after a step: Hydra's flags and overrides, in any order."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pocl_cli import __version__
from pocl_cli.errors import ConfigError, SecurityError, nearest

_SWITCHES = (("-h", "--help"), ("-r", "--run"), ("-m", "--multirun"), ("-sc", "--shell-completion"))
_LONG_SWITCHES = ("--hydra-help", "--resolve")
_INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# Keys whose value is a list of overrides.
_OF_OVERRIDES = r"(?:teacher|student)\.overrides|comparison\.arms\.[\w-]+"
_TRUE = ("true", "1", "yes", "on", "y", "t")


@dataclass(frozen=True)
class Arguments:
    """What a person asked of a step.

    Attributes:
        flags: for Hydra; without --config-dir, which has a search path of its own here.
        overrides: in the order typed.
        config_dirs: folders of the user's own configuration.
        config_name: another primary configuration than the step's.
        package: the section that --cfg shows.
        multirun: whether this is a sweep.
        completes: whether a shell asks for completions.
        waits: whether to wait for another process that makes the same artifact.
    """

    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...]
    config_name: str | None
    package: str | None
    multirun: bool
    completes: bool
    waits: bool

    @property
    def plans(self) -> bool:
        """Whether `plan=true` is among the overrides."""
        switches = [word.partition("=")[2].strip("\"'") for word in self.overrides if word.startswith("plan.enabled=")]
        return bool(switches) and switches[-1].lower() in _TRUE


def read(step: str, words: Sequence[str]) -> Arguments:
    """The flags and overrides among the words after `pocl STEP`.

    Raises:
        ConfigError: a flag is unknown, or has a wrong value.
        SecurityError: a flag of Hydra's that reads a pickle.
    """
    if any(word.partition("=")[0] in ("-er", "--experimental-rerun") for word in words):
        raise SecurityError(
            "refused --experimental-rerun",
            where="the command line",
            why="it reads a pickle, which can run code",
            fix="give the overrides again: a manifest and the run's log hold them",
        )
    parser = _parser(step)
    found, unknown = parser.parse_known_intermixed_args([_written_out(word) for word in words])
    if unknown:
        raise _unknown_flag(unknown[0], step, parser)
    switches = [flag for flag in (*dict(_SWITCHES).values(), *_LONG_SWITCHES) if getattr(found, _attribute(flag))]
    values = [(f"--{name}", getattr(found, _attribute(name))) for name in ("cfg", "package", "config-name", "info")]
    return Arguments(
        flags=(*switches, *(f"{flag}={value}" for flag, value in values if value is not None)),
        overrides=tuple(found.overrides),
        config_dirs=tuple(found.config_dir),
        config_name=found.config_name,
        package=found.package,
        multirun=found.multirun,
        completes=found.shell_completion,
        waits=found.wait,
    )


def _written_out(word: str) -> str:
    """An override as Hydra reads it, where we allow a shorter one.

    `plan` is a section, and its switch has the shorter name; so has the list of a ramp, which Hydra would not let
    replace a section. In `teacher.overrides=[train.lr=1]` and in an arm of a comparison, Hydra wants quotes around
    entries with '='.
    """
    if word.startswith("plan="):
        return f"plan.enabled={word.removeprefix('plan=')}"
    if found := re.fullmatch(r"(curriculum\.(?:temperature|kd_ratio))=(\[.*)", word, re.DOTALL):
        return f"{found[1]}.values={found[2]}"
    if found := re.fullmatch(rf"(\+{{0,2}}(?:{_OF_OVERRIDES})=)\[(.*)\]", word, re.DOTALL):
        words = [_written_out(one) for one in _entries(found[2])]
        entries = [f'"{one}"' if "=" in one and one[0] not in "\"'" else one for one in words]
        return f"{found[1]}[{','.join(entries)}]"
    return word


def _entries(text: str) -> list[str]:
    """What the commas outside brackets and quotes part."""
    entries, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
        depth += (letter in "[{(") - (letter in ")}]") if not quote else 0
        if letter == "," and not depth and not quote:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"bad flag of {self.prog}", why=message, fix="see pocl --help")


def _parser(step: str) -> _Parser:
    parser = _Parser(f"pocl {step}", add_help=False, allow_abbrev=False)
    for short, flag in _SWITCHES:
        parser.add_argument(short, flag, action="store_true")
    for flag in _LONG_SWITCHES:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--version", action="version", version=f"pocl {__version__}")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("-cn", "--config-name")
    parser.add_argument("-cd", "--config-dir", action="append", default=[])
    parser.add_argument("-i", "--info", choices=_INFOS, const="all", nargs="?")
    parser.add_argument("overrides", nargs="*")
    return parser


def _attribute(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _unknown_flag(word: str, step: str, parser: _Parser) -> ConfigError:
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    name, _, value = word.partition("=")
    guess = nearest(name, flags, 0.7)
    if guess is None and re.fullmatch(r"--[a-z]\w*([./][\w.-]+)*", name):
        fix = f"an override has no dashes: {name[2:]}={value or 'VALUE'}"
    else:
        fix = f"did you mean {guess}?" if guess else f"flags are {', '.join(flags)}"
    return ConfigError(f"unknown flag {name!r} of pocl {step}", fix=fix)
