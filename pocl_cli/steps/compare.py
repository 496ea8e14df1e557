"""`pocl compare`: train and evaluate the arms of a comparison, and say whether they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.hashing import short_id
from pocl_cli.artifacts.manifest import Artifact, ArtifactKey
from pocl_cli.comparison import arms, report, results
from pocl_cli.comparison.arms import ArmRun, Cell
from pocl_cli.comparison.matching import Spent, mismatches, spent_by
from pocl_cli.comparison.outcome import ANSWER_METRICS, Outcome, check_same_prompts, read_outcome
from pocl_cli.errors import ArtifactError, ConfigError
from pocl_cli.log import get_logger
from pocl_cli.records import answers_of
from pocl_cli.steps import arm_runs
from pocl_cli.steps.chain import VERSIONS, Chain
from pocl_cli.steps.result import StepResult, obtain
from pocl_cli.steps.stages import num_partitioned_rows, planned_stages, planned_table, stages_of, training_records

if TYPE_CHECKING:
    from pocl_cli.run import Run
    from pocl_cli.schema import ComparisonConfig


def run(run: Run) -> StepResult | None:
    """Runs what is missing, compares the answers, and writes the tables; None where only the plan was asked for."""
    comparison = arms.of_run(run)
    expanded = arms.expand(run)
    if run.config.plan.enabled:
        _show_plan(run, expanded)
        return None

    # ── which runs these are, and whether they can be compared ────────────────────────────────────────────────────────
    runs = {one.cell: one for one in _with_matched_steps(run, expanded)}
    chains = {cell: Chain(one.run) for cell, one in runs.items()}
    students = {cell: chain.student_key.id for cell, chain in chains.items()}
    arms.refuse_equal_arms(students, comparison.name)
    _refuse_other_protocols(chains, comparison)
    store = Chain(run).store
    key = _key(comparison, chains, students)
    found = store.find(key)
    if found is not None:
        return _reported(StepResult(found, made=False), comparison)

    # ── run what is missing ───────────────────────────────────────────────────────────────────────────────────────────
    spent = _planned(chains)
    _warn_of_mismatches(spent, comparison)
    missing = [runs[cell] for cell, chain in chains.items() if _evaluation(chain) is None]
    if missing:
        # What several runs share is made once, before they start side by side.
        for one in missing:
            if one.run.config.curriculum.needs_partition:
                obtain(one.run, "partition", chains[one.cell].partition_key, store)
            _make_answers(chains[one.cell])
        arm_runs.make(missing, arm_runs.num_jobs(run.config))

    # ── compare ───────────────────────────────────────────────────────────────────────────────────────────────────────
    artifacts = {cell: _made(chain) for cell, chain in chains.items()}
    outcomes = {cell: read_outcome(cell, spent[cell], *of_cell) for cell, of_cell in artifacts.items()}
    check_same_prompts(list(outcomes.values()))
    with store.open_work(key) as work:
        if work.finished is not None:
            return _reported(StepResult(work.finished, made=False), comparison)
        content = _content(outcomes, artifacts, comparison)
        durable.write_json(work.path / "comparison.json", content)
        durable.write_text(work.path / "table.csv", report.csv_text(content["rows"]))
        durable.write_text(work.path / "table.md", report.markdown(comparison.name, *_shown(content, comparison)))
        durable.write_parquet(work.path / "differences.parquet", _answer_table(outcomes, comparison))
        artifact = work.commit(
            config=run.resolved,
            inputs={
                f"{artifact.kind} {'/'.join(str(part) for part in cell)}": artifact.id
                for cell, of_cell in artifacts.items()
                for artifact in of_cell
            },
            command=run.command,
            seed=comparison.resampling_seed,
        )
    return _reported(StepResult(artifact, made=True), comparison)


# ── which runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _with_matched_steps(run: Run, expanded: Sequence[ArmRun]) -> list[ArmRun]:
    """The runs, those of one stage with the steps that the arm `comparison.steps_of` makes in all."""
    comparison = arms.of_run(run)
    if comparison.steps_of is None or all(one.run.config.curriculum.stages > 1 for one in expanded):
        return list(expanded)
    cell = expanded[0].cell._replace(arm=comparison.steps_of)
    pattern = next((one for one in expanded if one.cell == cell), None) or arms.compose_arm(run, cell)
    num_steps = _num_steps(Chain(pattern.run))
    return [
        replace(one, run=arms.with_train(one.run, max_steps=num_steps))
        if one.run.config.curriculum.stages == 1
        else one
        for one in expanded
    ]


def _num_steps(chain: Chain) -> int:
    return sum(row["steps"] for row in planned_table(chain, _num_rows(chain)))


def _num_rows(chain: Chain) -> int:
    """How many rows a run trains on: by its partition, which is made where it is missing, or by its data set."""
    config = chain.config
    if config.plan.num_rows is not None:
        return config.plan.num_rows
    if config.plan.enabled:
        return len(training_records(config))
    if config.curriculum.needs_partition:
        return num_partitioned_rows(obtain(chain.run, "partition", chain.partition_key, chain.store))
    # Seconds of imports, which the rows of a partition do without.
    from pocl_cli.models.load import load_tokenizer
    from pocl_cli.steps.rows import training_rows

    return len(training_rows(config, load_tokenizer(chain.student)).train)


def _refuse_other_protocols(chains: Mapping[Cell, Chain], comparison: ComparisonConfig) -> None:
    protocols = {cell.arm: chain.protocol for cell, chain in chains.items()}
    other = [arm for arm, protocol in protocols.items() if protocol != protocols[comparison.baseline]]
    if other:
        raise ConfigError(
            f"{', '.join(other)} would be evaluated otherwise than the baseline {comparison.baseline}",
            where=f"comparison={comparison.name}",
            why="an arm overrides evaluation.*, and answers to other questions cannot be paired",
            fix="set evaluation.* on the command line, for all arms",
        )


def _make_answers(chain: Chain) -> None:
    for who in answers_of(chain.config.kd_method):
        # Seconds of imports, which methods that train on the rows alone do without.
        from pocl_cli.steps.stored_answers import obtain_answers

        obtain_answers(chain, who)


def _planned(chains: Mapping[Cell, Chain]) -> dict[Cell, Spent]:
    """What the runs will spend. Runs on the same rows share their number, which a partition tells most quickly."""
    num_rows: dict[str, int] = {}
    spent = {}
    for cell in sorted(chains, key=lambda cell: not chains[cell].config.curriculum.needs_partition):
        chain = chains[cell]
        rows = short_id({"dataset": chain.dataset, "tokenizer": chain.student.tokenizer_identity})
        if rows not in num_rows:
            num_rows[rows] = _num_rows(chain)
        stages = planned_stages(chain, num_rows[rows])
        spent[cell] = spent_by(chain.config.train, stages, stages_of(chain.config.train, stages))
    return spent


def _warn_of_mismatches(spent: Mapping[Cell, Spent], comparison: ComparisonConfig) -> None:
    """Says before the hours of training where arms do not match in steps and learning rate."""
    method, seed = next(iter(spent)).method, comparison.seeds[0]
    baseline = spent[Cell(method, comparison.baseline, seed)]
    for arm in comparison.chosen:
        found = mismatches(spent[Cell(method, arm, seed)], baseline)
        if found:
            get_logger().warning("%s does not match %s: %s", arm, comparison.baseline, "; ".join(found))


def _key(comparison: ComparisonConfig, chains: Mapping[Cell, Chain], students: Mapping[Cell, str]) -> ArtifactKey:
    protocol = next(iter(chains.values())).protocol
    identity = {
        "students": _nested(students),
        "evaluation": {**protocol, "precision": next(iter(chains.values())).config.hardware.precision},
        **comparison.model_dump(mode="json", include={"baseline", "confidence", "num_resamples", "resampling_seed"}),
    }
    methods = "-".join(dict.fromkeys(cell.method for cell in students))
    return ArtifactKey("comparisons", f"{comparison.name}-{methods}", identity, VERSIONS["comparisons"])


def _nested(values: Mapping[Cell, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By method, arm and seed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, value in values.items():
        found.setdefault(cell.method, {}).setdefault(cell.arm, {})[str(cell.seed)] = value
    return found


# ── artifacts of the runs ─────────────────────────────────────────────────────────────────────────────────────────────


def _evaluation(chain: Chain) -> Artifact | None:
    """The finished evaluation of a run; None where it, or its student, is missing."""
    return chain.store.find(chain.evaluation_key) if chain.store.find(chain.student_key) is not None else None


def _made(chain: Chain) -> tuple[Artifact, Artifact]:
    """Student and evaluation of a run, their files hashed again."""
    student, evaluation = chain.store.find(chain.student_key), _evaluation(chain)
    if student is None or evaluation is None:
        raise ArtifactError(
            f"no {'student' if student is None else 'evaluation'} of {chain.student_key.folder_name}",
            where=str(chain.store.outputs),
            why="it has been made, and is gone",
            fix="run the same command again",
        )
    chain.store.verify(evaluation)
    return student, evaluation


# ── what is written and shown ─────────────────────────────────────────────────────────────────────────────────────────


def _content(
    outcomes: Mapping[Cell, Outcome], artifacts: Mapping[Cell, Sequence[Artifact]], comparison: ComparisonConfig
) -> dict[str, Any]:
    first = next(iter(outcomes.values()))
    return {
        "name": comparison.name,
        "baseline": comparison.baseline,
        "arms": {name: list(words) for name, words in comparison.chosen.items()},
        "seeds": list(comparison.seeds),
        "confidence": comparison.confidence,
        "num_prompts": {name: len(answers.ids) for name, answers in first.answers.items()},
        "rows": results.compare(outcomes, comparison),
        "mismatches": results.matching(outcomes, comparison),
        "runs": _nested({cell: {one.kind: one.id for one in of_cell} for cell, of_cell in artifacts.items()}),
    }


def _answer_table(outcomes: Mapping[Cell, Outcome], comparison: ComparisonConfig) -> pa.Table:
    """Every answer of every arm beside the baseline's to the same prompt, with the same training seed."""
    parts = []
    for cell, outcome in outcomes.items():
        if cell.arm == comparison.baseline:
            continue
        baseline = outcomes[cell._replace(arm=comparison.baseline)]
        for name, answers in outcome.answers.items():
            number = len(answers.ids)
            columns: dict[str, Any] = {"dataset": [name] * number, "id": list(answers.ids)}
            columns |= {part: [value] * number for part, value in cell._asdict().items()}
            for metric in ANSWER_METRICS:
                ours, theirs = answers.values[metric], baseline.answers[name].values[metric]
                columns |= {metric: ours, f"{metric}_baseline": theirs, f"{metric}_difference": ours - theirs}
            parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _shown(content: Mapping[str, Any], comparison: ComparisonConfig) -> tuple[list[report.Table], list[str]]:
    rows = content["rows"]
    num_tests = sum(bool(row["differences"]) for row in rows)
    shown = report.tables_of(rows, content["mismatches"], comparison, content["num_prompts"])
    return shown, report.notes(comparison, num_tests)


def _reported(result: StepResult, comparison: ComparisonConfig) -> StepResult:
    """Shows the tables of a comparison, made now or before."""
    content = json.loads((result.artifact.path / "comparison.json").read_text(encoding="utf-8"))
    shown, remarks = _shown(content, comparison)
    for table in shown:
        tables.paragraph()
        tables.results_table(table.title, table.columns, table.cells)
    for remark in remarks:
        tables.paragraph(remark)
    return result


def _show_plan(run: Run, expanded: Sequence[ArmRun]) -> None:
    """Lists the runs, their steps, and which exist already; makes and writes nothing."""
    cells = []
    for one in _with_matched_steps(run, expanded):
        chain = Chain(one.run)
        cells.append([one.cell.method, one.cell.arm, one.cell.seed, _num_steps(chain), *_state(chain)])
    tables.results_table("Plan", ["method", "arm", "seed", "steps", "state", "student"], cells)


def _state(chain: Chain) -> tuple[str, str | None]:
    """How far a run is, and the id of its student, which is not known before its inputs are there."""
    try:
        identifier = chain.student_key.id
        student = chain.store.find(chain.student_key)
        state = "to do" if student is None else "to evaluate" if _evaluation(chain) is None else "done"
    except ArtifactError:
        return "to do, and its inputs", None
    return state, identifier
