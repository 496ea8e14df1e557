"""Scoring and evaluating in several processes: the bytes of one, whichever process took which shard."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.steps import evaluate, score, stored_answers
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.parts import Part
from pocl_cli.training import shards
from pocl_cli.training.parallel import ALONE, Processes

from ..support.command import run_pocl
from ..support.processes import in_processes
from ..support.recipe import compose, recipe, write_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot fork")

QUICK = (
    "score.max_new_tokens=4",
    "score.sampling_temperature=1",
    "kd_method=seqkd",
    "kd_method.decoding.max_new_tokens=4",
    "evaluation.model=teacher",
    "evaluation.seeds=[1,2]",
    "evaluation.decoding.max_new_tokens=4",
    "evaluation.decoding.sampling_temperature=1",
)
FILES = {
    "score": ("scores.parquet", "dropped.jsonl"),
    "evaluate": ("metrics.json", "predictions.jsonl"),
    "answers": ("answers.parquet",),
}


# The second set has one shard, so that most processes have none of it.
ROWS = {"rows": 30, "few": 5}


def sets_of(folder: Path) -> str:
    entry = "{{name: {}, path: {}/inputs/rows.jsonl, limit: {}, max_tokens: 60, max_prompt_tokens: 48}}"
    return "[" + ",".join(entry.format(name, folder, limit) for name, limit in ROWS.items()) + "]"


@dataclass(frozen=True)
class Case:
    """A part of a step, and the files that it leaves."""

    step: str
    files: tuple[str, ...]
    part: Part

    def hashes(self, folder: Path) -> dict[str, str]:
        return {name: sha256_file(folder / name) for name in self.files}


CASES = [
    Case("score", FILES["score"], score.score_student),
    Case("score", FILES["score"], score.score_attention),
    Case("score", FILES["score"], score.score_teacher),
    Case("score", FILES["answers"], stored_answers.answers_of_teacher),
    Case("score", FILES["answers"], stored_answers.answers_of_student),
    Case("evaluate", FILES["evaluate"], evaluate.answer),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.part.__name__)
def test_shards_when_measured_by_any_number_of_processes_then_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    for module in (shards, evaluate):
        monkeypatch.setattr(module, "SHARD_ROWS", 8)
    write_inputs(tmp_path / "inputs")
    sets = sets_of(tmp_path)
    run = compose(recipe(tmp_path / "inputs", tmp_path / "outputs", *QUICK, f"evaluation.datasets={sets}"), case.step)
    chain = Chain(run)

    def measure(folder: Path, processes: Processes) -> None:
        case.part(chain, folder, processes)

    (alone := tmp_path / "1").mkdir()
    measure(alone, ALONE)
    expected = case.hashes(alone)
    for size in (2, 3, 6):
        (together := tmp_path / str(size)).mkdir()
        in_processes(size, tmp_path / "meetings", lambda processes, folder=together: measure(folder, processes))
        assert case.hashes(together) == expected

    # As an interrupted run left it: some shards, by another number of processes, and none of the results.
    found = sorted(path for path in alone.rglob("shards/**/*") if path.is_file())
    assert len(found) >= 3
    for path in found[::2]:
        path.unlink()
    for name in case.files:
        (alone / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in found[1::2]}
    in_processes(2, tmp_path / "meetings", lambda processes: measure(alone, processes))
    assert case.hashes(alone) == expected
    assert {path: path.stat().st_mtime_ns for path in found[1::2]} == kept


@pytest.mark.skipif(sys.platform != "linux", reason="a worker notices the end of its parent")
@pytest.mark.parametrize("step", ["score", "evaluate"])
def test_step_when_run_in_two_processes_then_makes_the_artifact_that_one_process_makes(
    tmp_path: Path, step: str
) -> None:
    write_inputs(tmp_path / "inputs")
    sets = sets_of(tmp_path)
    found = []
    for outputs, hardware in (("alone", "cpu"), ("together", "cpu_2")):
        changes = (*QUICK, f"evaluation.datasets={sets}", f"hardware={hardware}", "score.teacher=false")
        words = recipe(tmp_path / "inputs", tmp_path / outputs, *changes)
        finished = run_pocl(step, *words, cwd=tmp_path)
        assert finished.exit_code == 0, finished.stderr
        found.append(tmp_path / finished.stdout.strip())
    alone, together = found
    assert together.name == alone.name
    for name in FILES[step]:
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert {path.name for path in together.iterdir()} == {*FILES[step], "manifest.json"}
