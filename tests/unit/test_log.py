from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pocl_cli import log
from pocl_cli.errors import ResourceError
from pocl_cli.log import (
    duration,
    get_console,
    get_logger,
    progress,
    set_up_console_log,
    set_up_run_log,
)


def test_logger_when_a_message_holds_terminal_escapes_and_secrets_then_they_are_made_harmless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        get_logger().info("row \x1b[2J\nforged line, %s", "token=abc")
    assert caplog.messages == ["row \\x1b[2J\\nforged line, token=***"]


def test_console_log_when_it_is_set_up_twice_then_a_line_appears_once_and_on_stderr_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_console_log()
    set_up_console_log()
    get_logger().warning("long " + "x" * 300)
    get_logger().debug("unseen")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: long x{300}\n", shown.err)


@pytest.mark.parametrize(("debug", "shown"), [("0", False), ("1", True)])
def test_console_log_when_an_exception_is_logged_then_its_traceback_needs_pocl_debug(
    debug: str, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_DEBUG", debug)
    set_up_console_log()
    try:
        raise ValueError("password=hunter2")
    except ValueError:
        get_logger().exception("failed")
    text = capsys.readouterr().err
    assert ("Traceback" in text) is shown
    assert "hunter2" not in text


def test_run_log_when_an_exception_is_logged_then_the_file_holds_its_traceback_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.log"
    with set_up_run_log(path):
        get_logger().debug("detail")
        try:
            raise ValueError("token=abc \x1b[31m")
        except ValueError:
            get_logger().debug("failed", exc_info=True)
    get_logger().warning("after the end")
    text = path.read_text(encoding="utf-8")
    assert "DEBUG detail" in text
    assert "Traceback (most recent call last)" in text
    assert "ValueError: token=*** \\x1b[31m" in text
    assert "after the end" not in text
    assert get_logger().handlers == []


def test_run_log_when_it_is_set_up_again_then_the_file_grows(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with set_up_run_log(tmp_path / "run.log"):
            get_logger().info(word)
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["first", "second"]


def test_run_log_when_its_folder_is_a_file_then_a_resource_error_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="run's log cannot be opened") as caught:
        set_up_run_log(tmp_path / "file" / "run.log")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_run_log_when_the_disk_is_full_then_the_run_goes_on_and_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with set_up_run_log(Path("/dev/full")):
        get_logger().info("one")
        get_logger().info("two")
    text = capsys.readouterr().err
    assert text.count("cannot be written") == 1
    assert "Traceback" not in text


def test_progress_when_piped_then_a_line_per_tenth_and_the_end_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "QUIET_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), progress("score", total=1000) as advance:
        for _ in range(500):
            advance(2)
    assert len(caplog.messages) == 10
    assert [re.search(r"\((\d+) %\)", line).group(1) for line in caplog.messages[:-1]] == [  # type: ignore[union-attr]
        str(10 * tenth) for tenth in range(1, 10)
    ]
    assert re.fullmatch(r"score: finished 1000 of 1000 in .* s, .*/s", caplog.messages[-1])


@pytest.mark.parametrize("total", [0, 1, 3])
def test_progress_when_there_are_few_items_then_the_end_is_told_once(
    total: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "QUIET_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), progress("score", total) as advance:
        for _ in range(total):
            advance(1)
    assert len([line for line in caplog.messages if "finished" in line]) == 1
    assert f"{total} of {total}" in caplog.messages[-1]


def test_progress_when_a_job_is_over_at_once_then_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), progress("score", total=20) as advance:
        for _ in range(20):
            advance(1)
    assert caplog.messages == []


def test_progress_when_the_loop_fails_then_the_place_is_told_and_the_error_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(KeyError), progress("train", total=8) as advance:
        advance(3)
        raise KeyError("boom")
    assert "stopped at 3 of 8" in caplog.messages[-1]


_ON_A_TERMINAL = """
from pocl_cli.log import get_logger, progress, set_up_console_log
set_up_console_log()
with progress("train", total=4) as advance:
    for step in range(4):
        with progress("inner", total=1) as inner:
            inner(1)
        get_logger().info("above the bar")
        advance(1)
print("result")
"""


def _read_all(descriptor: int, chunks: list[bytes]) -> None:
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # Linux ends a closed terminal with EIO.
        return


def test_progress_when_stderr_is_a_terminal_then_a_bar_is_drawn_there_and_stdout_stays_clean() -> None:
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, chunks))
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_TERMINAL], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True
    )
    os.close(theirs)
    reader.join(timeout=10)
    os.close(ours)
    shown = b"".join(chunks).decode()
    assert done.stdout == b"result\n"
    assert "4/4" in shown
    assert shown.count("above the bar") == 4
    assert "finished" not in shown


def test_console_when_nobody_reads_stderr_then_the_program_still_gives_its_result() -> None:
    code = (
        "import time; from pocl_cli.log import get_logger, set_up_console_log; set_up_console_log(); time.sleep(0.2)\n"
        "for _ in range(3): get_logger().info('x' * 100000)\nprint('result')"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    os.close(reading)
    assert process.communicate(timeout=30)[0] == b"result\n"


def test_console_when_asked_for_twice_then_it_is_one_and_on_stderr() -> None:
    assert get_console() is get_console()
    assert get_console().stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.3, "12 s"), (185, "3 min 05 s"), (59.7, "1 min 00 s"), (7800, "2 h 10 min")],
)
def test_duration_when_seconds_grow_then_the_unit_follows(seconds: float, text: str) -> None:
    assert duration(seconds) == text
