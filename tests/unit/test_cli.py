"""The dispatcher: words, exit codes, what it prints where, and what it costs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pocl_cli
from pocl_cli import cli
from pocl_cli.errors import Interrupted

from ..support.command import run_pocl

MAIN = [sys.executable, "-c", "from pocl_cli.cli import main; main()"]


def exit_code_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.ended_by(error)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_main_when_help_is_asked_for_then_it_lists_all_commands(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run_pocl(*words, cwd=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert all(f"\n  {step} " in done.stdout for step in cli.STEPS)


@pytest.mark.parametrize("words", [("--version",), ("distill", "--version")])
def test_main_when_the_version_is_asked_for_then_it_is_printed(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run_pocl(*words, cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (0, f"pocl {pocl_cli.__version__}\n")


def test_main_when_env_is_asked_for_then_it_says_what_a_bug_report_needs(tmp_path: Path) -> None:
    done = run_pocl("env", cwd=tmp_path, env={"POCL_OUTPUTS": "elsewhere"})
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.exit_code == 0
    assert {"pocl", "python", "torch", "transformers", "hydra-core", "cuda", "conf"} <= lines.keys()
    assert lines["pocl"] == pocl_cli.__version__
    assert lines["outputs"] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["dsitll"], ["unknown command 'dsitll'", "did you mean 'pocl distill'?"]),
        (["--hlep"], ["did you mean 'pocl --help'?"]),
        (["zzz"], ["commands are score, partition, distill, evaluate, compare", "see pocl --help"]),
        (["--completion", "fish"], ["no completion for 'fish'", "bash, zsh"]),
    ],
)
def test_main_when_the_command_is_wrong_then_the_nearest_is_named(
    tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    done = run_pocl(*words, cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.errors
    assert all(part in line for part in parts)


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (KeyboardInterrupt(), 130, "interrupted — SIGINT"),
        (Interrupted("interrupted", why="SIGTERM", fix="again"), 143, "interrupted — SIGTERM — again"),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device", "/full/x"), 5, "No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 5, "cannot use /x — Permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "No space left on device — free some"),
        (RuntimeError("Broken pipe (os error 32)"), 70, "internal bug RuntimeError"),
        (OSError(107, "strange"), 70, "internal bug OSError"),
        (RuntimeError("two\nlines"), 70, "internal bug RuntimeError: two\\nlines"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_ended_by_when_anything_is_raised_then_it_has_its_exit_code_and_one_line(
    error: BaseException, code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, text = exit_code_of(error, capsys)
    assert found == code
    assert part in text
    assert "Traceback" not in text
    assert text.count("\n") == (1 if part else 0)


def test_ended_by_when_an_error_holds_a_secret_then_it_is_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_DEBUG", "1")
    _, text = exit_code_of(RuntimeError("no access with hf_SecretSecretSecret"), capsys)
    assert "RuntimeError: no access with ***" in text
    assert "SecretSecret" not in text


# ── costs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def modules_after(*words: str, cwd: Path) -> tuple[int, set[str]]:
    """The exit code of a command, and the packages that it imported."""
    code = "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); " + MAIN[2]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, {name.partition(".")[0] for name in done.stderr.split()}


def test_help_when_asked_for_then_it_answers_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, modules = modules_after("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0
    assert not {"torch", "transformers", "datasets", "hydra", "pydantic", "rich"} & modules
    # Seconds of the processor: the clock on the wall also measures who else uses the machine.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (("distill", "--cfg", "job"), 0),
        (("score", "--help"), 0),
        (("evaluate", "--info", "defaults"), 0),
        (("distill", "kd_method=fkll", "train.lr=-1"), 2),
        (("distill", "train.lr=-1"), 2),
        (("distill", "+kd_method._target_=os.system"), 9),
    ],
)
def test_step_when_it_has_nothing_to_compute_then_torch_is_not_imported(
    tmp_path: Path, words: tuple[str, ...], exit_code: int
) -> None:
    code, modules = modules_after(*words, cwd=tmp_path)
    assert code == exit_code
    assert "hydra" in modules
    assert not {"torch", "transformers", "datasets"} & modules
    assert list(tmp_path.iterdir()) == []


def test_main_when_nobody_reads_stdout_then_it_ends_without_a_word(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MAIN, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
