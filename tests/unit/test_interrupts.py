"""A signal becomes an exception where the program can take one, and the exit code is the signal's in any case."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_cli import cli, interrupts
from pocl_cli.errors import Interrupted, PoclError
from pocl_cli.training.signals import Signals

BOTH = [(signal.SIGTERM, Interrupted, 143), (signal.SIGINT, KeyboardInterrupt, 130)]


@pytest.fixture(autouse=True)
def _caught() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    interrupts.catch()
    yield
    interrupts.settle()
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.received = None


@pytest.mark.parametrize(("number", "error"), [one[:2] for one in BOTH])
def test_signal_when_it_comes_inside_an_import_then_the_module_is_whole_before_it_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    name = f"interrupted_by_{number}"
    (tmp_path / f"{name}.py").write_text(
        f"import os\nos.kill({os.getpid()}, {number})\nsum(range(1000))\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(error):
        assert importlib.import_module(name).whole
        time.sleep(2)
        pytest.fail("the signal is lost")

    assert sys.modules.pop(name).whole


def test_signal_when_something_swallows_it_then_it_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_AGAIN_SECONDS", 0.05)
    swallowed = 0
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(2):
        try:
            time.sleep(2)
        except Interrupted:
            swallowed += 1
    assert swallowed == 2


@pytest.mark.parametrize(("number", "error", "code"), BOTH)
def test_command_when_a_library_makes_another_exception_of_the_signal_then_the_exit_code_is_the_signals(
    capsys: pytest.CaptureFixture[str], number: int, error: type[BaseException], code: int
) -> None:
    with pytest.raises(error):
        os.kill(os.getpid(), number)

    assert cli.ended_by(ImportError("numpy failed to import")) == code
    assert capsys.readouterr().err.startswith(f"pocl: error: interrupted — {signal.Signals(number).name} — ")
    assert cli.ended_by(PoclError("something else")) == 70


def test_command_when_no_signal_came_then_an_unforeseen_exception_is_an_internal_bug() -> None:
    assert cli.ended_by(ImportError("numpy failed to import")) == 70


def test_training_when_a_library_makes_another_exception_of_the_signal_then_the_interruption_is_raised() -> None:
    signals = Signals()
    try:
        with pytest.raises(Interrupted, match="SIGTERM"), signals.at_once():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Interrupted as error:
                raise RuntimeError("a library's own") from error
    finally:
        signals.release()
