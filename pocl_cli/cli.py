"""The console command: takes the first word, hands the rest to a step, maps errors to one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from pocl_cli import __version__, faults, interrupts
from pocl_cli.errors import ConfigError, Interrupted, PoclError, nearest, printable
from pocl_cli.redaction import scrub

STEPS = {
    "score": "measure every training row with the student and the teacher: the difficulty measurer's raw material",
    "partition": "rank the rows and cut them into subsets, easy to hard",
    "distill": "train the student stage by stage",
    "evaluate": "generate answers on test sets with several seeds and score them",
    "compare": "train and evaluate arms with several seeds, and say whether they differ",
}
HELP = f"""\
pocl: curriculum knowledge distillation of language models (POCL, arXiv 2506.05695)

usage: pocl STEP [GROUP=OPTION] [KEY=VALUE] …      each step finds its inputs by the same overrides

{"".join(f"  {name:<11}{what}{chr(10)}" for name, what in STEPS.items())}
  env        versions, devices and places, for a bug report
  --version | --completion bash|zsh | --help

examples
  pocl distill experiment=demo upstream=auto         the whole chain on tiny models, without network
  pocl score teacher=gpt2-xl                         measure the rows
  pocl distill kd_method=rkl curriculum.stages=4     train with reverse KL in four stages
  pocl distill -m kd_method=fkl,rkl train.seed=1,2   sweep: four runs
  pocl distill plan=true                             the stage table and the costs, nothing written
  pocl compare experiment=demo                       does the curriculum help? POCL against its controls

pocl STEP --help lists a step's groups and keys; pocl STEP --cfg job prints what would run.
"""

# What the system says where disk, memory or permission is lacking.
_LACKS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE", "ENFILE", "EFBIG", "ENOTDIR", "ENAMETOOLONG")
RESOURCE_ERRORS = {getattr(errno, name) for name in _LACKS}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `pocl`. Exits with the codes that the README lists."""
    sys.exit(_exit_code(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(argv: Sequence[str]) -> None:
    word, rest = (argv[0], argv[1:]) if argv else ("--help", ())
    if word in STEPS:
        from pocl_cli.launch import run_step

        run_step(word, rest)
    elif word in ("--help", "-h", "help"):
        print(HELP, end="")
    elif word == "--version":
        print(f"pocl {__version__}")
    elif word == "env":
        from pocl_cli.environment import print_environment

        print_environment()
    elif word == "--completion":
        from pocl_cli.completion import script

        print(script(rest[0] if rest else "bash"), end="")
    else:
        guess = nearest(word, [*STEPS, "env", "--version", "--completion", "--help"])
        raise ConfigError(
            f"unknown command {word!r}",
            why=f"commands are {', '.join(STEPS)} and env",
            fix=f"did you mean 'pocl {guess}'?" if guess else "see pocl --help",
        )


def _exit_code(argv: Sequence[str]) -> int:
    interrupts.catch()
    return exit_code_of(lambda: _dispatch(argv), ended_by)


def exit_code_of(action: Callable[[], object], tell: Callable[[BaseException], int]) -> int:
    """0 where `action` comes to its end, else what `tell` makes of the exception that ended it."""
    try:
        faults.arm()
        action()
        sys.stdout.flush()
    except (Exception, Interrupted, KeyboardInterrupt, SystemExit) as error:
        return tell(error)
    return 0


def ended_by(error: BaseException) -> int:
    """The exit code of a command that an exception ended; says why on stderr, in one line a mistake."""
    interrupts.settle()
    if isinstance(error, Exception) and not isinstance(error, PoclError) and interrupts.received is not None:
        error = interrupts.received  # a library has made an exception of its own of it
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        # Nobody reads stdout any more. The interpreter's last flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    if isinstance(error, PoclError):
        lines, code = [str(one) for one in getattr(error, "errors", [error])], error.exit_code
    elif isinstance(error, Interrupted):
        lines, code = [str(error)], error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        lines, code = ["interrupted — SIGINT — the same command goes on where it was"], 130
    else:
        line, code = unforeseen(error)
        lines = [line]
    if os.environ.get("POCL_DEBUG") == "1":
        print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
    for line in lines:
        print(f"pocl: error: {printable(scrub(line))}", file=sys.stderr, flush=True)
    return code


def unforeseen(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of what no module has put into words: the machine's fault, or ours."""
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    place = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames) or "an unknown place"
    if isinstance(error, MemoryError):
        return f"out of memory in {place} — the machine has no more — end other programs, or use a smaller model", 5
    # Libraries in Rust (safetensors, tokenizers) tell the system's error in the text of their own.
    behind = re.search(r"\(os error (\d+)\)", str(error))
    system = OSError(int(behind[1]), "") if behind else error
    if isinstance(system, OSError) and system.errno in RESOURCE_ERRORS:
        from pocl_cli.artifacts.disk import reported

        try:
            with reported(Path(str(system.filename or f"a file ({place})")), "use"):
                raise system
        except PoclError as told:
            return str(told), told.exit_code
    return (
        f"internal bug {type(error).__name__}: {error} in {place} — the program is wrong, not you — "
        "run it again with POCL_DEBUG=1 and report the traceback"
    ), 70


if __name__ == "__main__":
    main()
