"""`pocl partition` on scores from elsewhere: the order, the bytes of the file, the summary, and what is not read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_cli.difficulty.random import Random
from pocl_cli.records import Record
from pocl_cli.run import Run
from pocl_cli.steps import partition, stages
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.score import INSTRUCTION, MEASURED

from ..support.recipe import compose, recipe

PROJECT = Path(__file__).parents[2]


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Scored rows with ties in each metric and in both, copies, and ids outside ASCII."""
    dice = np.random.default_rng(3)
    made = []
    for index in range(num_rows):
        name = f"{dice.integers(1 << 32):08x}" + ("é", "\uffee", "\U0001f600", "", "")[index % 5]
        values: dict[str, Any] = {
            "num_prompt_tokens": int(dice.integers(1, 99)),
            "num_response_tokens": int(dice.integers(1, 99)),
            "cross_entropy": float(dice.integers(1, 9)) / 8,
            "generation": "an answer",
            "rouge_l": float(dice.choice([0.0, 0.0, 0.25, 0.5, 1 / 3])),
        }
        copies = [name, f"{name}-2", f"{name}-10"] if index % 7 == 0 else [name]
        made += [{"id": copy, **values, "instruction": f"do {copy}"} for copy in copies]
    return made


def commit_scores(run: Run, made: Sequence[Mapping[str, Any]], row_group_size: int) -> None:
    chain = Chain(run)
    with chain.store.open_work(chain.score_key("student")) as work:
        table = pa.Table.from_pylist(list(made), schema=MEASURED.append(INSTRUCTION))
        pq.write_table(table, work.path / "scores.parquet", row_group_size=row_group_size)
        work.commit(config=run.resolved, inputs={}, command=run.command, seed=None)


def overrides(folder: Path, *changes: str) -> list[str]:
    # One row, and not one of those that are ranked: whoever ranks them does not read the data set.
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text('{"instruction": "say yes", "output": "yes"}\n', encoding="utf-8")
    changed = ("upstream=require", "curriculum.stages=3", "dataset.dev_size=0", "difficulty=rrf", *changes)
    return recipe(folder, folder / "outputs", *changed)


def plain_ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < one for other in values) + (sum(other == one for other in values) + 1) / 2 for one in values]


def plain_order(made: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Reciprocal rank fusion with k = 60, and Python's own order of what ties: a row at a time."""
    rouge_ranks = plain_ranks([-row["rouge_l"] for row in made])
    ce_ranks = plain_ranks([row["cross_entropy"] for row in made])
    difficulty = [-(1 / (60 + one) + 1 / (60 + other)) for one, other in zip(rouge_ranks, ce_ranks, strict=True)]
    order = sorted(range(len(made)), key=lambda index: (difficulty[index], made[index]["id"]))
    assert len(set(difficulty)) < len(made) / 2, "most rows tie, so that their ids decide"
    return [made[index] for index in order]


def test_partition_when_rows_tie_then_it_is_the_plain_order_in_the_same_bytes(tmp_path: Path) -> None:
    made = rows(200)
    run = compose(overrides(tmp_path), "partition")
    commit_scores(run, made, row_group_size=37)

    artifact = partition.run(run).artifact

    ordered = plain_order(made)
    size = len(made) // 3
    expected = {
        "id": [row["id"] for row in ordered],
        "difficulty_rank": list(range(1, len(made) + 1)),
        "subset": [min(place // size, 2) for place in range(len(made))],
    }
    file = artifact.path / "partition.parquet"
    assert pq.read_table(file).to_pydict() == expected
    pq.write_table(pa.table(expected, schema=partition.PARTITION), tmp_path / "plain.parquet", compression="zstd")
    assert file.read_bytes() == (tmp_path / "plain.parquet").read_bytes()
    subsets = partition.read_partition(Chain(run).store, artifact)
    assert [subset.index for subset in subsets] == [0, 1, 2]
    assert [record_id for subset in subsets for record_id in subset.record_ids] == expected["id"]
    assert [len(subset.record_ids) for subset in subsets] == [size, size, len(made) - 2 * size]
    [first, *_] = json.loads((artifact.path / "summary.json").read_text(encoding="utf-8"))["subsets"]
    assert first["sample_instructions"] == [f"do {ordered[place]['id']}" for place in (0, size // 2, size - 1)]
    for name, factor in (("rouge_l", 100), ("cross_entropy", 1), ("num_prompt_tokens", 1), ("num_response_tokens", 1)):
        assert first[name] == pytest.approx(factor * sum(row[name] for row in ordered[:size]) / size, rel=1e-12)


@pytest.mark.parametrize(
    ("by", "at", "sizes"),
    [("thresholds", [0.25, 0.75], (2, 6, 8)), ("quantiles", [0.1, 0.8], (1, 7, 8)), ("quantiles", None, (3, 6, 8))],
)
def test_partition_when_borders_are_given_then_equal_rows_stay_together_and_the_plan_shows_the_sizes(
    tmp_path: Path, by: str, at: list[float] | None, sizes: tuple[int, ...]
) -> None:
    # Cross entropies 1/8, 2/8 … 8/8, ten rows each; the ends of the subsets are those of whole groups.
    made = [{**rows(1)[0], "id": f"row{index:02d}", "cross_entropy": (index // 10 + 1) / 8} for index in range(80)]
    words = overrides(tmp_path, "difficulty=cross_entropy", f"partition.by={by}", f"partition.at={at or 'null'}")
    run = compose(words, "partition")
    commit_scores(run, made, row_group_size=1000)

    artifact = partition.run(run).artifact

    ends = [10 * number for number in sizes]
    subsets = partition.read_partition(Chain(run).store, artifact)
    found = [len(subset.record_ids) for subset in subsets]
    assert found == [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert [record_id for subset in subsets for record_id in subset.record_ids] == [row["id"] for row in made]
    summary = json.loads((artifact.path / "summary.json").read_text(encoding="utf-8"))
    assert summary["hardest"] == [number / 8 for number in sizes]
    assert [one["num_rows"] for one in summary["subsets"]] == found
    assert stages._parts(Chain(run), 80) == [range(s, e) for s, e in zip([0, *ends], ends, strict=False)]


def test_partition_when_the_row_groups_are_others_then_the_bytes_are_the_same(tmp_path: Path) -> None:
    made, files = rows(50), []
    for row_group_size in (7, 1000):
        run = compose(overrides(tmp_path / str(row_group_size)), "partition")
        commit_scores(run, made, row_group_size)
        files.append(partition.run(run).artifact.path / "partition.parquet")

    assert files[0].read_bytes() == files[1].read_bytes()


def test_instructions_when_the_column_is_read_in_batches_then_are_those_of_the_rows(tmp_path: Path) -> None:
    # Two row groups, the first longer than a batch of Arrow's.
    num_rows, group = 150_000, 140_000
    pq.write_table(
        pa.table({"instruction": [f"do {row}" for row in range(num_rows)]}),
        tmp_path / "scores.parquet",
        row_group_size=group,
    )
    positions = np.array([num_rows - 1, 0, 65_535, 65_536, 131_072, group - 1, group, 0])

    found = partition._read_instructions(tmp_path / "scores.parquet", positions)

    assert found == [f"do {position}" for position in positions]


def test_beginning_when_the_instruction_is_long_then_is_its_first_200_characters() -> None:
    assert Record("a", "é" * 300, "", ("yes",)).beginning == "é" * 200


def test_partition_when_the_rows_were_measured_then_no_model_library_is_loaded(tmp_path: Path) -> None:
    words = overrides(tmp_path)
    commit_scores(compose(words, "partition"), rows(20), row_group_size=1000)
    code = (
        "import sys; from pocl_cli import cli\n"
        "try: cli.main(['partition', *sys.argv[1:]])\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=PROJECT, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_random_when_there_are_more_ids_than_are_strings_at_once_then_each_gets_its_own_number() -> None:
    ids = [f"{index:x}" for index in range(70_000)]
    whole = Random(seed=10)(partition.Scores(pa.table({"id": ids})))

    picked = [0, 65_535, 65_536, 69_999]

    assert (
        whole[picked].tolist() == Random(seed=10)(partition.Scores(pa.table({"id": [ids[i] for i in picked]}))).tolist()
    )
