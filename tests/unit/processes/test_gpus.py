"""GPUs of the jobs of a sweep."""

from __future__ import annotations

import pytest

from pocl_cli.processes.gpus import gpus_of_job


@pytest.mark.parametrize(
    ("num_gpus", "num_processes", "expected"),
    [
        (4, 1, ["0", "1", "2", "3", "0"]),
        (4, 2, ["01", "23", "01", "23", "01"]),
        (5, 2, ["01", "23", "01", "23", "01"]),
        (1, 1, ["0"] * 5),
        (2, 3, ["01"] * 5),
    ],
)
def test_jobs_when_numbered_then_take_turns_over_the_gpus(
    num_gpus: int, num_processes: int, expected: list[str]
) -> None:
    gpus = [str(number) for number in range(num_gpus)]
    assert ["".join(gpus_of_job(number, gpus, num_processes)) for number in range(5)] == expected


def test_jobs_when_only_some_gpus_are_visible_then_take_turns_over_those() -> None:
    assert [gpus_of_job(number, ["GPU-3a", "5"], 1) for number in range(3)] == [["GPU-3a"], ["5"], ["GPU-3a"]]
