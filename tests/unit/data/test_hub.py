"""The hub: reached, silent, refusing, and absent, with and without a cache; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.schema import DatasetConfig

SCRIPT = """
import json, sys
from pocl_cli.data.sources import load_dataset
from pocl_cli.errors import PoclError
from pocl_cli.schema import DatasetConfig
try:
    loaded = load_dataset(DatasetConfig.model_validate_json(sys.argv[1]))
except PoclError as error:
    print(json.dumps({"exit_code": error.exit_code, "error": str(error)}))
else:
    rows = [[record.instruction, record.response] for record in loaded.records]
    heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    dropped = [row.location for row in loaded.dropped]
    print(json.dumps({"rows": rows, "dropped": dropped, "source": loaded.identity["source"], "heavy": heavy}))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RAW = b'{"instruction": "Q", "output": "A"}\n{"instruction": "Q", "output": ""}\n'


def load(config: DatasetConfig, home: Path, **environment: str) -> tuple[dict[str, Any], float]:
    """What loading gives or how it fails, and the seconds that it took."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, config.model_dump_json()],
        env={**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.monotonic() - started


def test_hub_when_reached_then_rows_are_read_and_the_commit_is_the_identity(make_config, hub, tmp_path: Path) -> None:
    hub.files = {"raw.jsonl": RAW, "valid.jsonl": b"", "README.md": b"x"}
    config = make_config(path="org/rows", data_files="raw.jsonl")
    loaded, _ = load(config, tmp_path, HF_ENDPOINT=hub.url)
    assert loaded["rows"] == [["Q", "A"]]
    assert loaded["dropped"] == ["raw.jsonl:2"]
    assert loaded["source"] == {"kind": "hub", "repository": "org/rows", "commit": COMMIT, "files": ["raw.jsonl"]}
    assert loaded["heavy"] == []
    # Once there, the same rows and the same identity come from the cache, with the hub gone or switched off.
    num_requests = len(hub.requests)
    offline, _ = load(config, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    unreachable, _ = load(config, tmp_path, HF_ENDPOINT="http://127.0.0.1:1")
    assert offline == unreachable == loaded
    assert len(hub.requests) == num_requests


def test_hub_when_offline_and_not_in_the_cache_then_error_names_the_id_and_a_way_out(make_config, tmp_path) -> None:
    failed, seconds = load(make_config(path="MiniLLM/dolly", data_files="raw.jsonl"), tmp_path, HF_HUB_OFFLINE="1")
    assert failed["exit_code"] == 5
    assert "'MiniLLM/dolly'" in failed["error"]
    assert "hf download MiniLLM/dolly --repo-type dataset" in failed["error"]
    assert seconds < 10


def test_hub_when_it_never_answers_then_fails_within_ten_seconds(make_config, hub, tmp_path: Path) -> None:
    hub.is_silent = True
    failed, seconds = load(make_config(path="org/rows"), tmp_path, HF_ENDPOINT=hub.url)
    assert failed["exit_code"] == 5
    assert "'org/rows'" in failed["error"]
    assert seconds < 10


@pytest.mark.parametrize(("path", "exit_code"), [("org/gone", 3), ("gone", 3)])
def test_hub_when_it_knows_no_such_data_set_then_is_a_data_error(make_config, hub, tmp_path, path, exit_code) -> None:
    failed, _ = load(make_config(path=path), tmp_path, HF_ENDPOINT=hub.url)
    assert failed["exit_code"] == exit_code
    assert f"no local file or folder '{path}', and the hub shows no such data set" in failed["error"]
