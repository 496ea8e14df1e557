"""`pocl distill teachers=[…]`: stages with different teachers, what is kept of them, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pocl_cli.errors import ArtifactError, ConfigError
from pocl_cli.mistakes import MultiConfigError
from pocl_cli.run import Run
from pocl_cli.steps import checks, plan
from pocl_cli.steps.chain import Chain
from pocl_cli.training.journal import Journal

from ..support.command import run_pocl
from ..support.processes import die, forked
from ..support.recipe import changed, compose, distilled, promised_hashes, recipe
from ..support.training import TEACHER, make_model, toy_tokenizer, train_lines

QUIET = "train.evaluate_every=0"


@pytest.fixture(scope="module", autouse=True)
def weak(place: Path) -> str:
    """Another teacher: narrower, from another seed."""
    folder = place / "inputs" / "weak"
    make_model({**TEACHER, "hidden_size": 16}, 5).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(place: Path, weak: str) -> Run:
    return compose(recipe(place / "inputs", place / "outputs", f"teachers=[{weak},null]", QUIET))


def numbers(artifact: Path, stage: int) -> list[float]:
    return [line["kd"] for line in train_lines(artifact) if line["stage"] == stage]


def test_stages_when_their_teachers_differ_then_each_has_the_distillation_of_its_own(
    run: Run, place: Path, weak: str
) -> None:
    artifact = distilled(run)

    words = recipe(place / "inputs", place / "outputs", QUIET)
    strong, alone = distilled(compose(words)), distilled(compose([*words, f"teacher.path={weak}"]))
    assert numbers(artifact.path, 0) == numbers(alone.path, 0)
    assert numbers(artifact.path, 0) != numbers(strong.path, 0)
    assert numbers(artifact.path, 1) != numbers(alone.path, 1)
    assert len({artifact.id, strong.id, alone.id}) == 3
    same = distilled(compose([*words, "teachers=[null,null]"]))
    assert promised_hashes(same.path) | {"stages.json": ""} == promised_hashes(strong.path) | {"stages.json": ""}
    table = json.loads((artifact.path / "stages.json").read_text())
    assert [row["teacher"] for row in table] == ["weak", "tiny"]
    assert all("teacher" not in row for row in json.loads((strong.path / "stages.json").read_text()))
    stored = {path.name.rsplit("-", 1)[0] for path in (place / "outputs" / "teacher_signals").iterdir()}
    assert {"weak-head", "teacher-head"} <= stored


def killed_at(step: int, run: Run) -> None:
    """The run, until it has made a step that no checkpoint holds yet."""

    def killed() -> None:
        whole = Journal.consumed

        def consumed(self: Journal, record_ids: list[str], **labels: int) -> None:
            if labels["step"] == step:
                die()
            whole(self, record_ids, **labels)

        Journal.consumed = consumed  # type: ignore[method-assign]
        distilled(run)

    assert forked(killed) == signal.SIGKILL


@pytest.mark.parametrize("store", [True, False])
def test_run_when_killed_in_any_stage_then_ends_in_the_same_bytes(run: Run, place: Path, store: bool) -> None:
    run = compose([*run.overrides, f"teacher.store={str(store).lower()}"])
    expected = distilled(changed(run, outputs=place / f"whole-{store}"))
    outputs = place / f"killed-{store}"

    for step in (7, 9, 18):  # in the first stage, at the beginning of the second, in it
        killed_at(step, changed(run, outputs=outputs))

    artifact = distilled(changed(run, outputs=outputs))
    assert promised_hashes(artifact.path) == promised_hashes(expected.path)


def test_run_when_it_goes_on_with_a_teacher_from_elsewhere_then_is_refused(run: Run, place: Path) -> None:
    outputs = place / "elsewhere"
    stored = changed(compose([*run.overrides, "train.seed=4"]), outputs=outputs)

    killed_at(11, stored)
    online = [one and one.model_copy(update={"store": False}) for one in stored.config.teachers]
    section = stored.config.teacher.model_copy(update={"store": False})

    with pytest.raises(ArtifactError, match=r"teacher of stage \d: .*stored.* → .*online"):
        distilled(changed(stored, teachers=tuple(online), teacher=section))


def test_teacher_when_its_tokenizer_is_another_then_is_refused_before_a_model_is_loaded(run: Run, place: Path) -> None:
    folder = place / "inputs" / "foreign"
    make_model(TEACHER, 2).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    *_, last = vocabulary = values["model"]["vocab"]
    vocabulary["another"] = vocabulary.pop(last)
    (folder / "tokenizer.json").write_text(json.dumps(values))

    foreign = compose([*run.overrides, f"teachers=[null,{folder}]"])

    with pytest.raises(ConfigError, match="teacher and student have different tokenizers"):
        checks.refuse_early(checks.of_training(Chain(foreign)))


def test_plan_when_teachers_differ_then_names_checks_and_counts_each(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.show(Chain(changed(run, plan=run.config.plan.model_copy(update={"enabled": True}))))
    shown = capsys.readouterr().err
    assert "teacher's hidden states (estimate)" in " ".join(shown.split())
    assert [line.split()[-1] for line in shown.splitlines() if line[:6].strip().isdigit()] == ["weak", "tiny"]
    names = [name for name, _, _ in checks.verdicts(checks.of_plan(Chain(run)))]
    for teacher in ("teacher weak", "teacher tiny"):
        assert {f"{teacher}: tokenizer", f"{teacher}: context", f"{teacher} and student: tokenizers"} <= set(names)


@pytest.mark.parametrize(
    ("words", "complaints"),
    [
        (["teachers=[null]"], ["teachers has 1 entries for curriculum.stages=2"]),
        (["teachers=[tiny,null]", "teacher=none"], ["teachers with teacher=none"]),
        (["teachers=[tini,null]"], ["unknown teacher 'tini'", "did you mean 'tiny'"]),
        (["teachers=[{name: mine},null]"], ["teachers.0 names no model"]),
        (["teachers=[{name: mine, pth: x},null]"], ["unknown key 'teachers.0.pth'", "did you mean 'teachers.0.path'"]),
        (["teachers=[tini,null,null]", "curriculum.stages=0"], ["unknown teacher 'tini'", "curriculum.stages=0"]),
        (["kd_method=seqkd", "teachers=[tiny,null]"], ["kd_method=seqkd with teachers"]),
        (["teachers=[{experiment: demo_techer},null]"], ["demo_techer", "demo_teacher"]),
    ],
)
def test_configuration_when_teachers_are_wrong_then_says_what(
    place: Path, words: list[str], complaints: list[str]
) -> None:
    base = [word for word in recipe(place / "inputs", place / "outputs") if not word.startswith("teacher.")]
    with pytest.raises(MultiConfigError) as caught:
        compose([*base, *words])
    told = "\n".join(str(error) for error in caught.value.errors)
    for complaint in complaints:
        assert complaint in told, told


def test_command_when_two_processes_have_parts_of_an_online_teacher_then_have_the_numbers_of_one(
    place: Path, weak: str
) -> None:
    found = []
    for outputs, words in (("one", ["hardware=cpu"]), ("two", ["hardware=cpu_2", "hardware.parallel=fsdp"])):
        changes = (f"teachers=[{weak},null]", QUIET, "teacher.store=false", "student.dropout=0", *words)
        finished = run_pocl("distill", *recipe(place / "inputs", place / outputs, *changes), cwd=place)
        assert finished.exit_code == 0, finished.stderr
        found.append(train_lines(place / finished.stdout.strip()))
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
