"""The shipped conf/dataset files: they fit the schema, and every key of theirs has a comment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_cli.data.sources import load_dataset
from pocl_cli.schema import DatasetConfig

FOLDER = Path(__file__).parents[3] / "conf" / "dataset"
HUB_SETS = ("dolly", "dolly_eval", "self_inst", "vicuna", "s_ni", "uinst")


def values(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("name", HUB_SETS)
def test_preset_when_validated_then_names_one_file_of_the_hub_and_pins_no_revision(name: str) -> None:
    config = DatasetConfig.model_validate(values(name))
    assert config.name == name
    assert config.path is not None
    assert config.path.startswith("MiniLLM/")
    assert config.data_files is not None
    assert config.revision is None
    assert (config.dev_size == 0) == (name != "dolly")


def test_local_preset_when_no_path_is_given_then_says_which_key_is_missing() -> None:
    with pytest.raises(ValueError, match=r"needs dataset\.path="):
        DatasetConfig.model_validate(values("local"))
    assert DatasetConfig.model_validate(values("local") | {"path": "rows.jsonl"}).dev_size == 0


@pytest.mark.parametrize("name", [*HUB_SETS, "local"])
def test_preset_when_read_then_every_key_has_a_comment_and_the_head_names_source_and_licence(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert any("Source" in line for line in head)
    assert any("icence" in line for line in head)
    body = [line for line in lines if not line.startswith(("#", "name:"))]
    assert [line for line in body if " # " not in line] == []


@pytest.mark.parametrize("name", HUB_SETS)
def test_preset_when_only_its_path_is_overridden_by_a_file_then_reads_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Q", "output": "A"}\n')
    config = DatasetConfig.model_validate(values(name) | {"path": str(tmp_path / "rows.jsonl")})
    assert [record.response for record in load_dataset(config).records] == ["A"]
