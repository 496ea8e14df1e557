"""What a person is told of wrong values: every mistake, one line each, the nearest right key or value named."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pocl_cli.config import conf_dir
from pocl_cli.dataset_list import named_datasets
from pocl_cli.mistakes import MultiConfigError, siblings_of
from pocl_cli.validation import keys_of, validate

Composed = tuple[dict[str, Any], dict[str, Any]]
NAMES = ["dolly_eval", "local", "self_inst"]


@pytest.fixture(scope="module")
def composed() -> Composed:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("distill", overrides=["evaluation.datasets=[dolly_eval]"]))
        presets = {name: OmegaConf.to_container(compose(f"dataset/{name}").dataset) for name in NAMES}
    values["paths"]["outputs"] = "outputs"
    return values, presets


def checked(composed: Composed, changes: dict[str, Any], step: str = "distill") -> Any:
    values, presets = copy.deepcopy(composed)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        if value is KeyError:
            del place[leaf]
        else:
            place[leaf] = value
    return validate(values, step, names=NAMES, presets=presets)


def mistakes(composed: Composed, changes: dict[str, Any], step: str = "distill") -> list[str]:
    with pytest.raises(MultiConfigError) as caught:
        checked(composed, changes, step)
    return [str(error) for error in caught.value.errors]


DRAWN = {"sampling_temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "no_repeat_ngram_size": 0, "seed": 1}
SEQKD = {"name": "seqkd", "decoding": DRAWN}
DISTILLM = {
    "name": "distillm",
    "base": {"name": "sfkl", "alpha": 0.1, "t_squared": True},
    **{"share_start": 0.0, "share_step": 0.1, "tolerance": 0.1, "buffer_size": 100},
    **{"sampling_temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8},
}
MISTAKES = [
    ({"train.lrr": 1}, ["unknown key 'train.lrr'", "did you mean 'train.lr'?"]),
    ({"kd_method.alpha": 1}, ["unknown key 'kd_method.alpha'", "has name, t_squared", "sfkl and srkl have it"]),
    ({"kd_method.teacher_weight": 1}, ["kd_method=jsd has it"]),
    ({"kd_method.tsquared": 1}, ["did you mean 'kd_method.t_squared'?"]),
    ({"curriculum.temperature.strat": 1}, ["did you mean 'curriculum.temperature.start'?"]),
    ({"difficulty.kk": 1}, ["unknown key 'difficulty.kk'", "difficulty has k, members, name"]),
    ({"tracker.projct": 1}, ["unknown key 'tracker.projct'", "tracker has name"]),
    ({"dataset.fields.outputs": 1}, ["did you mean 'dataset.fields.output'?"]),
    ({"something": 1}, ["unknown key 'something' — nothing reads it — remove it"]),
    ({"train.lr": KeyError}, ["missing key 'train.lr'", "add +train.lr=VALUE"]),
    ({"kd_method": KeyError}, ["missing key 'kd_method'", "choose one with kd_method=NAME"]),
    ({"kd_method": None}, ["no kd_method is chosen"]),
    ({"kd_method.name": "jsd"}, ["missing key 'kd_method.teacher_weight'", "choose kd_method=jsd"]),
    ({"kd_method.name": "fkll"}, ["unknown kd_method 'fkll'", "did you mean 'fkl'?"]),
    ({"train.lr": "fast"}, ["bad value train.lr='fast'", "set train.lr to a number"]),
    ({"train.lr": -1}, ["bad value train.lr=-1", "set train.lr to a number above 0"]),
    ({"train.seed": 1.5}, ["bad value train.seed=1.5", "set train.seed to a whole number"]),
    ({"train.drop_last": "maybe"}, ["set train.drop_last to true or false"]),
    ({"train.checkpoint_policy": "bets"}, ["did you mean train.checkpoint_policy=best?"]),
    ({"upstream": "always"}, ["bad value upstream='always'", "set upstream to one of require, auto"]),
    ({"dataset.path": 12}, ["quote it", "'dataset.path=\"12\"'"]),
    ({"evaluation.seeds": 3}, ["write a list: 'evaluation.seeds=[3]'"]),
    ({"evaluation.seeds": []}, ["give evaluation.seeds at least one entry"]),
    ({"curriculum.kd_ratio.end": 1.5}, ["set curriculum.kd_ratio.end to a number of at most 1"]),
    ({"curriculum.epochs_per_stage": [1, 2]}, ["section 'curriculum' contradicts itself", "2 numbers for 4 stages"]),
    ({"curriculum.epochs_per_stage": 0}, ["bad value curriculum.epochs_per_stage=0", "at least 1 epoch"]),
    ({"student.layers": "x"}, ["bad value student.layers='x'"]),
    ({"student.path": None}, ["section 'student' contradicts itself", "one of path, experiment or architecture"]),
    ({"train": "fast"}, ["bad value train='fast'"]),
    ({"teacher.path": None, "teacher.name": "none"}, ["kd_method=fkl needs a teacher", "kd_method=sft"]),
    (
        {"kd_method": SEQKD, "teacher.path": None, "teacher.name": "none"},
        ["kd_method=seqkd needs a teacher", "kd_method=sft"],
    ),
    ({"kd_method": SEQKD, "dataset.format": "text"}, ["kd_method=seqkd with dataset.format=text"]),
    ({"kd_method": {**SEQKD, "decoding": {**DRAWN, "top_p": 0}}}, ["bad value kd_method.decoding.top_p=0"]),
    (
        {"kd_method": DISTILLM, "train.evaluate_every": 0},
        ["kd_method=distillm without dev evaluations", "share_step=0"],
    ),
    ({"kd_method": DISTILLM, "dataset.dev_size": 0}, ["kd_method=distillm without dev evaluations"]),
    (
        {"kd_method": {**DISTILLM, "buffer_size": 63}},
        ["kd_method.buffer_size=63 is less than train.global_batch_size=64", "at least 64"],
    ),
    ({"dataset.limit": 5, "dataset.dev_size": 5}, ["dataset.dev_size=5 takes all of dataset.limit=5", "dev_size=0"]),
    ({"dataset.limit": 5, "dataset.dev_size": 2}, ["curriculum.stages=4 is more than there are training rows"]),
    ({"train.dev_rows": [9, 9]}, ["train.dev_rows=[9, 9] does not fit curriculum.stages=4", "2 numbers for 4 stages"]),
    ({"train.dev_rows": 1001}, ["train.dev_rows=1001 is more than there are dev rows", "dataset.dev_size=1000"]),
    ({"plan.num_rows": 3}, ["plan.num_rows without plan=true", "add plan=true"]),
    ({"curriculum.temperature.values": [1, 2]}, ["[1.0, 2.0] has 2 numbers for 4 stages", "values=null for a ramp"]),
    ({"curriculum.exposure": "balance"}, ["did you mean curriculum.exposure=balanced?"]),
    ({"difficulty": {"name": "mean_rank", "members": ["ifdd"]}}, ["unknown difficulty 'ifdd'", "did you mean 'ifd'?"]),
    ({"difficulty": {"name": "teacher_gap"}, "score.teacher": False}, ["difficulty=teacher_gap needs the teacher's"]),
    (
        {"curriculum.convergence.metric": "dev_rouge_l", "train.evaluate_every": 0},
        ["convergence.metric=dev_rouge_l without dev evaluations", "set train.evaluate_every"],
    ),
    (
        {"curriculum.convergence.metric": "dev_rouge_l", "train.max_steps": 9},
        ["convergence.metric=dev_rouge_l with train.max_steps", "set train.max_steps=null"],
    ),
    ({"curriculum.convergence.patience": 0}, ["set curriculum.convergence.patience to a number of at least 1"]),
    ({"partition.by": "thresholds"}, ["section 'partition' contradicts itself", "needs the borders"]),
    ({"partition.at": [0.5]}, ["by=counts has none"]),
    ({"partition.by": "quantiles", "partition.at": [0.2, 0.5, 1]}, ["between 0 and 1"]),
    ({"partition.by": "quantiles", "partition.at": [0.2, 0.5, 0.5]}, ["at must ascend"]),
    (
        {"partition.by": "thresholds", "partition.at": [0.2, 5]},
        ["2 borders for 4 subsets", "give 3, or set curriculum.stages=3"],
    ),
    (
        {"partition.by": "quantiles", "plan.num_rows": 8, "plan.enabled": True},
        ["plan.num_rows with partition.by=quantiles", "leave out plan.num_rows"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), MISTAKES, ids=[str(changes) for changes, _ in MISTAKES])
def test_validate_when_one_thing_is_wrong_then_one_line_says_what_and_what_to_do(
    composed: Composed, changes: dict[str, Any], parts: list[str]
) -> None:
    lines = mistakes(composed, changes)
    assert all(part in lines[0] for part in parts), lines
    assert len(lines) <= 2


def test_validate_when_everything_is_right_then_values_are_kept(composed: Composed) -> None:
    config = checked(composed, {"train.seed": 7, "kd_method.t_squared": False})
    assert (config.train.seed, config.kd_method.name, config.kd_method.t_squared) == (7, "fkl", False)
    assert [dataset.path for dataset in config.evaluation.datasets] == ["MiniLLM/dolly"]


def test_validate_when_many_things_are_wrong_then_all_are_told_at_once(composed: Composed) -> None:
    wrong = {f"train.{key}": "x" for key in composed[0]["train"]}
    lines = mistakes(composed, {**wrong, "kd_method.x": 1, "curriculum.stages": 0, "evaluation.datasets": ["doly"]})
    assert len(lines) == len(wrong) + 3


@pytest.mark.parametrize("key", ["kd_method._target_", "_target_", "student.architecture", "evaluation.datasets"])
def test_validate_when_a_key_names_code_then_it_is_refused_for_security(composed: Composed, key: str) -> None:
    call = {"_target_": "os.system", "command": "id"}
    value = {"student.architecture": call, "evaluation.datasets": [call]}.get(key, "os.system")
    with pytest.raises(MultiConfigError) as caught:
        checked(composed, {key: value, "train.lr": -1})
    assert caught.value.exit_code == 9
    assert any("_target_ name code to run" in str(error) for error in caught.value.errors)
    assert any("bad value train.lr" in str(error) for error in caught.value.errors)


@pytest.mark.parametrize(
    ("step", "changes", "is_wrong"),
    [
        ("distill", {}, True),
        ("evaluate", {}, True),
        ("evaluate", {"evaluation.model": "gpt2"}, False),
        ("evaluate", {"evaluation.model": "teacher"}, True),
        ("evaluate", {"evaluation.predictions": "x.jsonl"}, False),
        ("score", {}, False),
        ("partition", {}, False),
        ("score", {"kd_method": SEQKD}, True),
        ("partition", {"kd_method": SEQKD}, True),
        ("evaluate", {"kd_method": SEQKD, "evaluation.model": "gpt2"}, False),
        ("distill", {"kd_method": {"name": "sft"}}, False),
    ],
)
def test_validate_when_there_is_no_teacher_then_only_steps_that_need_one_refuse(
    composed: Composed, step: str, changes: dict[str, Any], is_wrong: bool
) -> None:
    changes = {"teacher.path": None, **changes}
    if is_wrong:
        assert "teacher" in mistakes(composed, changes, step)[0]
    else:
        assert checked(composed, changes, step).teacher.present is False


@pytest.mark.parametrize("step", ["score", "partition", "evaluate"])
def test_validate_when_another_step_is_planned_then_it_is_refused(composed: Composed, step: str) -> None:
    assert mistakes(composed, {"plan.enabled": True}, step) == [
        f"plan=true with pocl {step} — only distill and compare have a plan — pocl distill plan=true …"
    ]


# ── evaluation.datasets ───────────────────────────────────────────────────────────────────────────────────────────────


def test_datasets_when_given_as_names_paths_and_mappings_then_all_are_full_sections(composed: Composed) -> None:
    entries = [
        "dolly_eval",
        "./my rows.jsonl.gz",
        "owner/repo",
        {"path": "/data/x.json", "limit": 3},
        {"name": "self_inst", "limit": 7},
        {"name": "mine", "path": "y.csv", "fields": {"output": "answer"}},
    ]
    datasets = checked(composed, {"evaluation.datasets": entries}).evaluation.datasets
    assert [(one.name, one.path, one.limit) for one in datasets] == [
        ("dolly_eval", "MiniLLM/dolly", None),
        ("my rows", "./my rows.jsonl.gz", None),
        ("repo", "owner/repo", None),
        ("x", "/data/x.json", 3),
        ("self_inst", "MiniLLM/self-inst", 7),
        ("mine", "y.csv", None),
    ]
    assert datasets[5].fields.output == "answer"
    assert all(one.dev_size == 0 for one in datasets)


def test_datasets_when_entries_are_wrong_then_each_is_named_by_its_place(composed: Composed) -> None:
    entries = ["doly_eval", {"name": "mine"}, 5, {"path": "x.jsonl", "fields": 3}, {"path": "y.jsonl", "lmit": 3}]
    lines = mistakes(composed, {"evaluation.datasets": entries})
    assert [line.partition(" — ")[0] for line in lines] == [
        "unknown data set 'doly_eval' in evaluation.datasets.0",
        "bad entry 5 in evaluation.datasets.2",
        "section 'evaluation.datasets.1' contradicts itself",
        "bad value evaluation.datasets.3.fields=3",
        "unknown key 'evaluation.datasets.4.lmit'",
    ]
    assert "did you mean 'dolly_eval'?" in lines[0]
    assert "did you mean 'evaluation.datasets.4.limit'?" in lines[4]


def test_datasets_when_two_share_a_name_then_a_mapping_is_proposed(composed: Composed) -> None:
    (line,) = mistakes(composed, {"evaluation.datasets": ["a/rows.jsonl", "b/rows.jsonl"]})
    assert "two data sets share a name" in line


def test_named_datasets_when_entries_are_of_all_kinds_then_only_needed_ones_are_asked_for() -> None:
    values = {"evaluation": {"datasets": ["dolly_eval", {"name": ["x"]}, 3, "rows.jsonl"]}}
    assert named_datasets(values, NAMES) == ["dolly_eval", "local"]
    assert named_datasets({"evaluation": None}, NAMES) == ["local"]


# ── small parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_of_when_values_are_nested_then_sections_and_entries_of_lists_have_dotted_names() -> None:
    assert list(keys_of({"a": {"b": 1}, "c": [{"d": 2}, 3]})) == ["a", "a.b", "c", "c.0.d"]


def test_siblings_of_when_the_section_is_unknown_then_there_are_none() -> None:
    assert siblings_of("no.such.key", {}) == []
    assert siblings_of("kd_method.x", {"kd_method": {"name": "no_such"}}) == ["name"]


def test_multi_error_when_it_crosses_a_process_then_it_keeps_its_errors(composed: Composed) -> None:
    with pytest.raises(MultiConfigError) as caught:
        checked(composed, {"train.lr": -1, "train.seed": "x"})
    again = pickle.loads(pickle.dumps(caught.value))
    assert [str(error) for error in again.errors] == [str(error) for error in caught.value.errors]
    assert again.exit_code == 2


@pytest.mark.parametrize(("mix", "refused"), [(0.2, True), (0.0, False)])
def test_teacher_that_takes_part_in_answers_when_it_would_be_in_parts_then_is_refused(composed, mix, refused):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("kd_method/minillm").kd_method)
    parts = {"hardware.parallel": "fsdp", "hardware.num_processes": 2, "plan.num_rows": 10}

    told = mistakes(composed, {"kd_method": {**values, "teacher_mix": mix}, **parts})

    assert any("kd_method.teacher_mix=0.2 with hardware.parallel=fsdp" in one for one in told) is refused


@pytest.mark.parametrize(("share", "refused"), [(0.5, True), (0.0, False)])
def test_method_whose_student_answers_when_the_rows_have_no_prompts_then_is_refused(composed, share, refused):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("kd_method/gkd").kd_method)
    changes = {"kd_method": {**values, "student_share": share}, "dataset.format": "text"}

    told = mistakes(composed, changes)

    assert any("kd_method=gkd with dataset.format=text" in one for one in told) is refused
