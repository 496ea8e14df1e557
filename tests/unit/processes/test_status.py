"""How a process ended, told to another one."""

from __future__ import annotations

import json
import signal

import pytest

from pocl_cli.errors import (
    ArtifactError,
    ConfigError,
    Interrupted,
    NonFiniteError,
    PoclError,
    ResourceError,
    WorkerError,
)
from pocl_cli.processes import status


def told(error: PoclError | Interrupted) -> PoclError | Interrupted:
    return status.as_error(json.loads(json.dumps(status.of_error(error))))


@pytest.mark.parametrize("kind", [ConfigError, ArtifactError, ResourceError, NonFiniteError, WorkerError, PoclError])
def test_error_when_told_to_another_process_then_is_the_same_error(kind: type[PoclError]) -> None:
    error = kind("the loss is nan", where="step 3", why="too large a rate", fix="lower it")
    found = told(error)
    assert type(found) is kind
    assert str(found) == str(error)


def test_error_when_it_has_no_place_then_still_has_none() -> None:
    assert str(told(ConfigError("wrong"))) == "wrong"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interruption_when_told_to_another_process_then_has_its_exit_code(number: signal.Signals) -> None:
    found = told(status.interrupted_by(number))
    assert isinstance(found, Interrupted)
    assert found.exit_code == 128 + number
    assert number.name in str(found)


def test_own_error_when_others_only_missed_a_process_then_is_that_of_the_one_that_failed() -> None:
    missed = status.of_error(WorkerError("another worker process is gone"))
    asked = status.of_error(status.interrupted_by(signal.SIGTERM))
    failed = status.of_error(NonFiniteError("the loss is nan"))
    found = status.own_error([asked, missed, {}, status.done({}), failed])
    assert isinstance(found, NonFiniteError)
    assert status.own_error([asked, missed, {}, status.done({})]) is None
