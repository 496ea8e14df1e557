"""A job, handed to a process that composes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_cli.processes.job import Job, Meeting

from ...support.recipe import compose


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    run = compose(["experiment=demo", "kd_method=jsd", "curriculum=none", f"paths.outputs={tmp_path}"])
    return Job.of("train", run, run.config, tmp_path)


def test_job_when_read_back_then_is_the_same(job: Job) -> None:
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_job_when_an_override_holds_a_secret_then_does_not_hold_it(tmp_path: Path, job: Job) -> None:
    run = compose(["experiment=demo", "student.path=https://me:hunter2@example.org/x", "student.experiment=null"])
    written = json.dumps(Job.of("train", run, job.run.config, tmp_path).to_json())
    assert "hunter2" not in written


def test_meeting_when_nobody_has_come_then_knows_of_nobody(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    assert (meeting.process(0), meeting.last_beat(0), meeting.status(0), meeting.ends()) == (None, 0, {}, {})


def test_meeting_when_workers_end_then_says_how(tmp_path: Path, job: Job) -> None:
    meeting = Meeting(tmp_path)
    meeting.sign(1)
    meeting.write_status(1, {"exit_code": 0})
    meeting.write_ends({0: -9})
    assert meeting.process(1) is not None
    assert meeting.last_beat(1) > 0
    assert (meeting.status(0), meeting.status(1), meeting.ends()) == ({}, {"exit_code": 0}, {0: -9})
