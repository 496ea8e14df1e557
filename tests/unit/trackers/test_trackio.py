from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trackio", reason="needs the extra trackio")
pytestmark = pytest.mark.slow

# In a process of its own: Trackio reads TRACKIO_DIR once, and says goodbye on stdout when a program ends.
_TRACK = """
import sys
from pathlib import Path
from pocl_cli.errors import ConfigError
from pocl_cli.registry import trackers

def tracker(project):
    return trackers.build({"name": "trackio", "project": project, "space_id": None, "private": True})

folder = Path(sys.argv[1])
for steps in ((1, 2), (3,)):
    with tracker("pocl").open(folder, "gpt2-fkl", {"train": {"seed": 10}, "hub_token": "hunter2"}) as run:
        for step in steps:
            run.log({"step": step, "loss": 1.0 / step}, step)
try:
    tracker("a_configs").open(folder, "run", {})
except ConfigError as error:
    print(error.what)
"""


def test_trackio_when_a_run_goes_on_then_it_stays_one_run_and_stdout_is_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", _TRACK, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "Trackio refuses the run\n"
    assert "Resumed existing run" in done.stderr
    content = b"".join(path.read_bytes() for path in (tmp_path / "trackio").iterdir())
    assert b"gpt2-fkl" in content
    assert b"loss" in content
    assert b"hunter2" not in content
