"""The rules of the sections, by themselves. What a person sees of them is in test_validation.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from pocl_cli import schema
from pocl_cli.config import conf_dir
from pocl_cli.schema import DatasetConfig, EvaluationConfig, HardwareConfig, StudentConfig, TeacherConfig, TrainConfig

SECTIONS = {
    "student": StudentConfig,
    "teacher": TeacherConfig,
    "dataset": DatasetConfig,
    "train": TrainConfig,
    "hardware": HardwareConfig,
    "evaluation": EvaluationConfig,
}


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("distill"), resolve=True)
    values["evaluation"]["datasets"] = [{**values["dataset"], "name": name} for name in ("one", "two")]
    return values


def build(defaults: dict[str, Any], section: str, changes: dict[str, Any]) -> BaseModel:
    return SECTIONS[section].model_validate(copy.deepcopy(defaults[section]) | changes)


FIELDS = {"instruction": None, "input": None, "output": None, "category": None}
LLAMA = {"path": None, "architecture": {"model_type": "llama"}, "tokenizer": "toy"}
ACCEPTED = [
    ("student", LLAMA),
    ("student", {"layers": 6}),
    ("student", {"layers": [0, 3, 11]}),
    ("student", {"dropout": 0}),
    ("student", {"path": None, "experiment": "demo", "overrides": ["train.lr=1"]}),
    ("teacher", {"path": None}),
    ("dataset", {"path": None, "generator": "toy", "num_rows": 3}),
    ("dataset", {"dev_size": 0}),
    ("dataset", {"format": "text", "max_tokens": 64}),
    ("dataset", {"format": "messages"}),
    ("train", {"lr": 1e-3, "lr_end": 1e-3}),
    ("train", {"evaluate_every": 0, "max_steps": 1}),
    ("hardware", {"device": "cuda:3"}),
    ("hardware", {"device": "mps"}),
]
REFUSED = [
    ("student", {"path": None}, "one of path, experiment or architecture"),
    ("student", {"experiment": "demo"}, "both set"),
    ("student", {"overrides": ["a=1"]}, "experiment is null"),
    ("student", {**LLAMA, "path": "x"}, "architecture makes a new model"),
    ("student", {**LLAMA, "tokenizer": None}, "needs student.tokenizer"),
    ("student", {**LLAMA, "architecture": {"hidden_size": 8}}, "needs model_type"),
    ("student", {"tokenizer": "toy"}, "goes with architecture only"),
    ("student", {"layers": 0}, "greater than or equal to 1"),
    ("student", {"layers": [-1]}, "greater than or equal to 0"),
    ("student", {"dropout": 1}, "less than 1"),
    ("student", {"dtype": "int8"}, "'auto', 'float32'"),
    ("teacher", {"experiment": "demo"}, "both set"),
    ("dataset", {"path": None}, "needs dataset.path"),
    ("dataset", {"generator": "toy", "num_rows": 3}, "not both"),
    ("dataset", {"path": None, "generator": "toy"}, "needs num_rows"),
    ("dataset", {"max_prompt_tokens": 512}, "must be smaller than max_tokens"),
    ("dataset", {"format": "chat"}, "'instruction', 'text' or 'messages'"),
    ("dataset", {"format": "text", "fields": FIELDS | {"instruction": "a"}}, "fields.output names its one column"),
    ("dataset", {"format": "messages", "fields": FIELDS | {"output": "a"}}, "fields.instruction names its one column"),
    ("dataset", {"name": ""}, "at least 1 character"),
    ("dataset", {"long_prompts": "ignore"}, "'cut' or 'drop'"),
    ("train", {"lr_end": 1}, "must not be above lr"),
    ("train", {"lr": 0}, "greater than 0"),
    ("train", {"lr": float("nan")}, "finite"),
    ("train", {"grad_clip": 0}, "greater than 0"),
    ("train", {"global_batch_size": 2.5}, "valid integer"),
    ("train", {"checkpoint_every": 0}, "greater than or equal to 1"),
    ("hardware", {"device": "gpu"}, "devices are auto, cpu, mps, cuda and cuda:N"),
    ("hardware", {"device": "cuda:x"}, "devices are"),
    ("evaluation", {"seeds": [1, 1]}, "same seed twice"),
    ("evaluation", {"seeds": []}, "at least 1 item"),
    ("evaluation", {"datasets": []}, "at least 1 item"),
    ("evaluation", {"predictions": "x.jsonl"}, "exactly one data set"),
]


@pytest.mark.parametrize(("section", "changes"), ACCEPTED)
def test_section_when_values_are_allowed_then_they_are_kept(
    defaults: dict[str, Any], section: str, changes: dict[str, Any]
) -> None:
    built = build(defaults, section, changes).model_dump(mode="json")
    assert {key: built[key] for key in changes} == changes


@pytest.mark.parametrize(("section", "changes", "reason"), REFUSED)
def test_section_when_a_value_is_not_allowed_then_the_reason_is_given(
    defaults: dict[str, Any], section: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        build(defaults, section, changes)
    assert reason in str(caught.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_section_when_built_then_it_is_frozen_and_has_no_other_keys(defaults: dict[str, Any], section: str) -> None:
    built = build(defaults, section, {})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(built, next(iter(SECTIONS[section].model_fields)), None)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        build(defaults, section, {"no_such_key": 1})


def test_sections_when_listed_then_every_one_forbids_unknown_keys() -> None:
    sections = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Section)]
    assert len(sections) > 10
    assert all(kind.model_config["extra"] == "forbid" and kind.model_config["frozen"] for kind in sections)


def test_teacher_when_it_has_no_source_then_there_is_none(defaults: dict[str, Any]) -> None:
    present = {
        source: TeacherConfig.model_validate({**defaults["teacher"], "path": None, **source_values}).present
        for source, source_values in (("path", {"path": "x"}), ("recipe", {"experiment": "x"}), ("none", {}))
    }
    assert present == {"path": True, "recipe": True, "none": False}
