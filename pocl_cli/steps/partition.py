"""`pocl partition`: rank the rows and cut them into subsets, easy to hard.

Rows are columns of arrays here, never objects: there may be ten million of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.artifacts.store import Store
from pocl_cli.curriculum.partition import (
    SUMMARISED,
    cut,
    cut_at_quantiles,
    cut_at_thresholds,
    partition_summary,
    sample_places,
)
from pocl_cli.difficulty.ranking import rank_rows, tie_shares, tie_warning
from pocl_cli.difficulty.scores import FloatArray, IntArray, Scores
from pocl_cli.errors import ArtifactError
from pocl_cli.log import get_logger
from pocl_cli.records import TEACHER, Subset, measured_by
from pocl_cli.run import Run
from pocl_cli.schema import PoclConfig
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import StepResult, obtain

PARTITION = pa.schema([("id", pa.string()), ("difficulty_rank", pa.int64()), ("subset", pa.int32())])

# The beginnings of the instructions of rows, given their positions in the scores.
Instructions = Callable[[IntArray], list[str]]


def run(run: Run) -> StepResult:
    """Orders the rows by the configured difficulty; the ranking is written with a summary that a person can read."""
    chain = Chain(run)
    key = chain.partition_key
    found = chain.store.find(key)
    if found is not None:
        return StepResult(found, made=False)
    difficulty = run.config.difficulty
    scored = _scored(chain)
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return StepResult(work.finished, made=False)
        scores, instructions = _read_scores(chain.store, scored, difficulty.needs) if scored else _unmeasured(chain)

        # ── measure, order, cut ───────────────────────────────────────────────────────────────────────────────────
        values = difficulty(scores)
        order = rank_rows(scores.ids, values)
        ties = tie_shares(scores, difficulty.needs, values)
        warning = tie_warning(ties)
        if warning:
            get_logger().warning(warning)
        subsets = _cut(run.config, values[order])

        # ── write ─────────────────────────────────────────────────────────────────────────────────────────────────
        ordered = scores.table.take(order)
        places = [place for subset in subsets for place in sample_places(subset)]
        shown = dict(zip(places, instructions(order[places]), strict=True))
        summary = partition_summary(subsets, ordered, shown)
        durable.write_parquet(work.path / "partition.parquet", _table(ordered["id"], subsets))
        durable.write_json(
            work.path / "summary.json",
            {
                "difficulty": difficulty.name,
                "subsets": summary,
                "hardest": [float(values[order[subset[-1]]]) for subset in subsets],
                "tie_shares": ties,
                "warning": warning,
            },
        )
        artifact = work.commit(
            config=run.resolved,
            inputs={name: artifact.id for name, artifact in scored.items()},
            command=run.command,
            seed=getattr(difficulty, "seed", None),
        )
    tables.partition_table(summary)
    return StepResult(artifact, made=True)


def read_partition(store: Store, artifact: Artifact) -> list[Subset]:
    """The subsets of a partition artifact, easiest first, each in order of difficulty; its files are hashed again."""
    store.verify(artifact)
    rows = pq.read_table(artifact.path / "partition.parquet").sort_by("difficulty_rank")
    indices, starts, sizes = np.unique(rows["subset"].to_numpy(), return_index=True, return_counts=True)
    return [
        Subset(index, tuple(rows["id"].slice(start, size).to_pylist()))
        for index, start, size in zip(indices.tolist(), starts.tolist(), sizes.tolist(), strict=True)
    ]


def _cut(config: PoclConfig, ordered: FloatArray) -> tuple[range, ...]:
    """The subsets under the `partition` section; `ordered` are the difficulties, ascending."""
    num_subsets, at = config.curriculum.stages, config.partition.at
    if config.partition.by == "counts":
        return cut(len(ordered), num_subsets)
    if config.partition.by == "quantiles":
        return cut_at_quantiles(ordered, num_subsets, at)
    assert at is not None, "configuration refuses thresholds that are not given"
    return cut_at_thresholds(ordered, at)


def _scored(chain: Chain) -> dict[str, Artifact]:
    """The scores that the difficulty reads, by the part that they play."""
    models = {"scores": "student"} if chain.config.difficulty.needs else {}
    models |= {f"{who}_scores": who for who in chain.scores_beside}
    return {name: obtain(chain.run, "score", chain.score_key(who), chain.store) for name, who in models.items()}


def _read_scores(store: Store, scored: Mapping[str, Artifact], needs: Iterable[str]) -> tuple[Scores, Instructions]:
    """What scores say of the rows, after their files have been hashed again; their texts stay on the disk."""
    path = scored["scores"].path / "scores.parquet"
    of: dict[str, list[str]] = {}
    for name in sorted(needs):
        of.setdefault(measured_by(name), []).append(name)
    table = _columns(store, scored["scores"], {*SUMMARISED, *of.pop("student", ())})
    for who, names in sorted(of.items()):
        beside = scored[f"{who}_scores"]
        theirs = _columns(store, beside, {name.removeprefix(TEACHER) for name in names})
        if theirs["id"] != table["id"]:
            raise ArtifactError(
                f"the {who}'s scores are of other rows than the student's",
                where=str(beside.path),
                fix="delete both, and measure the rows again with `pocl score`",
            )
        for name in names:
            table = table.append_column(name, theirs[name.removeprefix(TEACHER)])
    return Scores(table), partial(_read_instructions, path)


def _columns(store: Store, artifact: Artifact, names: Iterable[str]) -> pa.Table:
    store.verify(artifact)
    with pq.ParquetFile(artifact.path / "scores.parquet") as file:
        return file.read(columns=["id", *names])


def _read_instructions(path: Path, positions: IntArray) -> list[str]:
    """The column `instruction` of single rows, in batches: the whole column may be larger than the memory."""
    found: dict[int, str] = {}
    with pq.ParquetFile(path) as file:
        end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if not np.any((positions >= start) & (positions < end)):
                continue
            for batch in file.iter_batches(row_groups=[group], columns=["instruction"]):
                inside = positions[(positions >= start) & (positions < start + batch.num_rows)]
                found.update(zip(inside.tolist(), batch[0].take(inside - start).to_pylist(), strict=True))
                start += batch.num_rows
    return [found[position] for position in positions.tolist()]


def _unmeasured(chain: Chain) -> tuple[Scores, Instructions]:
    """The ids alone, which come from the data set: what a difficulty gets that needs no measurement."""
    # torch and transformers: seconds, and most of a GB, which the rows that were measured do without.
    from pocl_cli.models.load import load_tokenizer
    from pocl_cli.steps.rows import training_rows

    rows = training_rows(chain.config, load_tokenizer(chain.student))
    ids = rows.train.ids
    scores = Scores(pa.table({"id": pa.array(ids, pa.string())}))
    return scores, lambda positions: [rows.records[ids[position]].beginning for position in positions.tolist()]


def _table(ids: pa.ChunkedArray, subsets: Iterable[range]) -> pa.Table:
    sizes = [len(subset) for subset in subsets]
    columns = {
        "id": ids,
        "difficulty_rank": np.arange(1, len(ids) + 1),
        "subset": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
    }
    # In one chunk: the file's bytes must not depend on how the scores were read.
    return pa.table(columns, schema=PARTITION).combine_chunks()
