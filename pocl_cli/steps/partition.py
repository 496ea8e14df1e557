"""`pocl partition`: rank the rows and cut them into subsets, easy to hard."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.artifacts.store import Store
from pocl_cli.config import Run
from pocl_cli.curriculum.partition import cut, partition_summary
from pocl_cli.difficulty.ranking import rank_rows, tie_shares, tie_warning
from pocl_cli.log import get_logger
from pocl_cli.models.load import load_tokenizer
from pocl_cli.records import ScoredRecord, Subset
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import StepResult, obtain
from pocl_cli.steps.rows import training_rows
from pocl_cli.steps.score import read_scores

PARTITION = pa.schema([("id", pa.string()), ("difficulty_rank", pa.int64()), ("subset", pa.int32())])


def run(run: Run) -> StepResult:
    """Orders the rows by the configured difficulty; the ranking is written with a summary that a person can read."""
    chain = Chain(run)
    key = chain.partition_key
    found = chain.store.find(key)
    if found is not None:
        return StepResult(found, made=False)
    difficulty = run.config.difficulty
    scores = _scores(chain) if difficulty.needs else None
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return StepResult(work.finished, made=False)
        rows = training_rows(run.config, load_tokenizer(chain.student))
        scored = (
            read_scores(chain.store, scores) if scores else [_unmeasured(record_id) for record_id in rows.train.ids]
        )

        # ── measure, order, cut ───────────────────────────────────────────────────────────────────────────────────
        values = difficulty(scored)
        ordered = [scored[position].id for position in rank_rows([row.id for row in scored], values)]
        ties = tie_shares(scored, difficulty.needs, values)
        warning = tie_warning(ties)
        if warning:
            get_logger().warning(warning)
        subsets = cut(ordered, run.config.curriculum.stages)

        # ── write ─────────────────────────────────────────────────────────────────────────────────────────────────
        summary = partition_summary(subsets, rows.records, {row.id: row for row in scored} if scores else {})
        durable.write_parquet(work.path / "partition.parquet", _table(subsets))
        durable.write_json(
            work.path / "summary.json",
            {"difficulty": difficulty.name, "subsets": summary, "tie_shares": ties, "warning": warning},
        )
        artifact = work.commit(
            config=run.resolved,
            inputs={"scores": scores.id} if scores else {},
            command=run.command,
            seed=getattr(difficulty, "seed", None),
        )
    tables.partition_table(summary)
    return StepResult(artifact, made=True)


def read_partition(store: Store, artifact: Artifact) -> list[Subset]:
    """The subsets of a partition artifact, easiest first, each in order of difficulty; its files are hashed again."""
    store.verify(artifact)
    members: dict[int, list[str]] = {}
    for row in pq.read_table(artifact.path / "partition.parquet").sort_by("difficulty_rank").to_pylist():
        members.setdefault(row["subset"], []).append(row["id"])
    return [Subset(index, tuple(members[index])) for index in sorted(members)]


def _scores(chain: Chain) -> Artifact:
    return obtain(chain.run, "score", chain.score_key("student"), chain.store)


def _unmeasured(record_id: str) -> ScoredRecord:
    return ScoredRecord(record_id, 0, 0, float("nan"))


def _table(subsets: Sequence[Subset]) -> pa.Table:
    rows = [(record_id, subset.index) for subset in subsets for record_id in subset.record_ids]
    columns = {
        "id": [record_id for record_id, _ in rows],
        "difficulty_rank": list(range(1, len(rows) + 1)),
        "subset": [subset for _, subset in rows],
    }
    return pa.table(columns, schema=PARTITION)
