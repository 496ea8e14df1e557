"""Every file of conf/ composes, is valid for all commands, matches its class, and says what its keys mean."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import BaseModel

import pocl_cli
from pocl_cli.cli import STEPS
from pocl_cli.comparison.arms import expand, of_run
from pocl_cli.config import compose_run, conf_dir, from_hydra
from pocl_cli.explain import options_of
from pocl_cli.mistakes import FAMILIES
from pocl_cli.schema import PoclConfig
from pocl_cli.steps import distill
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.stages import planned_table
from pocl_cli.validation import keys_of

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
# Recipes only override, and Hydra's own files have Hydra's keys.
DOCUMENTED = [path for path in FILES if path.relative_to(CONF).parts[0] not in ("experiment", "hydra")]
# Optimizer steps over 11,435 rows: those of the paper's code, and ours, which keep the last batch of every epoch.
PLANNED_STEPS = {
    r"paper/reference_flags.*": 3552,
    r"paper/.*_pocl": 3584,
    r"paper/(gpt2|opt)_(fkl|rkl|jsd|tvd|s.kl|gkd|seqkd)": 3580,
}
# What a choice needs beside it to be valid by itself.
COMPANIONS = {
    "dataset=local": ["dataset.path=rows.jsonl"],
    "teacher=none": ["teacher.path=owner/name"],
    "kd_method=minillm": ["kd_method.teacher_mix=0"],  # on hardware that cuts the teacher into parts
    "kd_method=distillm": ["dataset.dev_size=9"],
}


def options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


# The n-th option of every group together: as many compositions as the longest group has options.
ROUNDS = [
    [f"{group}={option}" for group, option in zip(GROUPS, chosen, strict=True) if option and group != "experiment"]
    for chosen in itertools.zip_longest(*(options(group) if group != "experiment" else [] for group in GROUPS))
]


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def test_groups_when_hydra_lists_them_then_they_are_the_folders_of_conf() -> None:
    assert {group: options_of(group) for group in GROUPS} == {group: options(group) for group in GROUPS}


def test_primary_configs_when_composed_then_they_are_the_same_and_compare_has_its_own_beside_it() -> None:
    composed: list[Any] = [OmegaConf.to_container(compose(step)) for step in STEPS]
    *others, compared = composed
    assert compared.pop("comparison")["name"] == "pocl_vs_controls"
    assert (compared["upstream"], others[0]["upstream"]) == ("auto", "require")
    assert all(one == others[0] for one in [*others, {**compared, "upstream": "require"}])


@pytest.mark.parametrize("comparison", options("comparison"))
def test_comparison_when_chosen_then_its_arms_compose_and_make_equal_or_nearly_equal_steps(comparison: str) -> None:
    run = compose_run("compare", ["experiment=demo", f"comparison={comparison}", "comparison.seeds=[1]"])
    runs = expand(run)
    assert [one.cell.arm for one in runs] == list(of_run(run).arms)
    if of_run(run).steps_of is None:
        steps = [sum(row["steps"] for row in planned_table(Chain(one.run), 4000)) for one in runs]
        assert max(steps) <= 1.005 * min(steps)


@pytest.mark.parametrize("recipe", options("experiment"))
def test_recipe_when_chosen_then_it_composes_and_is_valid_for_all_steps(recipe: str) -> None:
    cfg = compose("distill", overrides=[f"experiment={recipe}"])
    for step in STEPS:
        from_hydra(step, cfg, [])


@pytest.mark.parametrize("recipe", options("experiment"))
def test_recipe_when_planned_then_its_stages_are_shown_without_data_models_or_a_file(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = compose_run("distill", [f"experiment={recipe}", "plan.enabled=true", "plan.num_rows=11435"])

    planned = distill.run(run)

    shown = capsys.readouterr()
    assert (planned, shown.out, list(tmp_path.iterdir())) == (None, "", [])
    rows = [line.split() for line in shown.err.splitlines() if line[:6].strip().isdigit()]
    assert len(rows) == run.config.curriculum.stages
    steps = sum(int(row[3].replace(",", "")) for row in rows)
    assert steps == next((known for name, known in PLANNED_STEPS.items() if re.fullmatch(name, recipe)), steps)


@pytest.mark.parametrize("choices", ROUNDS, ids=" ".join)
def test_options_when_chosen_then_they_compose_and_are_valid_for_all_steps(choices: list[str]) -> None:
    needed = [word for choice in choices for word in COMPANIONS.get(choice, [])]
    cfg = compose("compare", overrides=[*choices, *needed])
    for step in STEPS:
        # The package of a tracker is an extra; a plan does without.
        planned = compose("compare", overrides=[*choices, *needed, "plan.enabled=true"])
        from_hydra(step, planned if step == "distill" else cfg, [])


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "experiment"])
def test_option_when_its_file_is_read_then_its_name_is_the_files(group: str) -> None:
    names = {option: yaml.safe_load((CONF / group / f"{option}.yaml").read_text())["name"] for option in options(group)}
    assert names == {option: option for option in options(group)}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_when_its_members_are_listed_then_each_has_one_file(family: str) -> None:
    assert FAMILIES[family].names() == options(family)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_file_when_read_then_it_begins_by_saying_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    assert first.startswith("# ")
    assert len(first) > 10


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(CONF)))
def test_file_when_it_sets_a_key_then_a_comment_says_what_it_means(path: Path) -> None:
    """A comment on the key's line or just above it. `name`, and what the title of a section explains, need none."""
    text = re.sub(r"^(defaults|hydra):\n( .*\n|\n)*", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = ["", *text.splitlines()]
    bare = [
        line.strip()
        for above, line in itertools.pairwise(lines)
        if re.match(r" *[\w.-]+:", line) and "#" not in line and not above.strip().startswith("#")
        if not re.match(r"(name: |[a-z]+:$)", line)
    ]
    assert bare == []


def fields(model: type[BaseModel]) -> Iterator[str]:
    """The names of all keys of a section, those of its own sections too."""
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind)


def test_schema_when_a_key_is_in_it_then_some_code_reads_it() -> None:
    package = Path(pocl_cli.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path.name != "schema.py"}
    unread = [
        name
        for name in sorted(set(fields(PoclConfig)))
        if not any(re.search(rf"\.{name}\b|[\"']{name}[\"']", text) for text in sources.values())
    ]
    assert unread == []


@pytest.mark.parametrize(
    ("family", "member"), [(family, member) for family in FAMILIES for member in FAMILIES[family].names()]
)
def test_member_when_a_field_is_in_it_then_some_method_reads_it(family: str, member: str) -> None:
    kind = FAMILIES[family].get(member)
    package = Path(pocl_cli.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    own = [name for name, hint in get_type_hints(kind, include_extras=True).items() if "ClassVar" not in str(hint)]
    assert [name for name in own if not re.search(rf"\.{name}\b", text)] == []


def test_composed_configuration_when_walked_then_it_holds_exactly_the_keys_of_the_schema() -> None:
    values: Any = OmegaConf.to_container(compose("compare"))
    values["comparison"]["arms"] = {}
    known = set(keys_of({key: value for key, value in values.items() if key not in FAMILIES}))
    sections = {f"{name}.{key}" for name, field in PoclConfig.model_fields.items() for key in _keys(field.annotation)}
    assert {key for key in known if "." in key} == sections


def _keys(kind: Any) -> Iterator[str]:
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield name
            yield from (f"{name}.{key}" for key in _keys(field.annotation))
