"""From a comparison's configuration to its runs: every arm with every method and every training seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pocl_cli.config import compose_run, section_of
from pocl_cli.errors import ConfigError, PoclError
from pocl_cli.explain import options_of, unknown_option
from pocl_cli.mistakes import MultiConfigError
from pocl_cli.run import Run

if TYPE_CHECKING:
    from pocl_cli.schema import ComparisonConfig


class Cell(NamedTuple):
    """The place of a run in the comparison."""

    method: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class ArmRun:
    """One run of the comparison, an ordinary `pocl distill`."""

    cell: Cell
    run: Run


def of_run(run: Run) -> ComparisonConfig:
    """The comparison that a run of `pocl compare` is about."""
    assert run.config.comparison is not None, "only pocl compare has a comparison, and its configuration names one"
    return run.config.comparison


def methods_of(run: Run) -> Sequence[str]:
    """The KD methods that are compared: those named, or the composed one alone."""
    return of_run(run).methods or (run.config.kd_method.name,)


def expand(run: Run) -> list[ArmRun]:
    """Composes all runs inside an initialised Hydra: method by method, arm by arm, seed by seed.

    Raises:
        MultiConfigError: every mistake in an arm, with the arm and its file named.
    """
    comparison = of_run(run)
    _refuse_seeds_and_methods(run)
    runs: list[ArmRun] = []
    errors: dict[str, PoclError] = {}
    for method in methods_of(run):
        for arm in comparison.chosen:
            try:
                runs += _with_all_seeds(run, method, arm)
            except PoclError as error:
                wrong = [_inside(one, arm, comparison.name) for one in getattr(error, "errors", [error])]
                errors |= {str(one): one for one in wrong}
    if errors:
        raise MultiConfigError(list(errors.values()))
    return runs


def _with_all_seeds(run: Run, method: str, arm: str) -> list[ArmRun]:
    """The runs of an arm. Where two seeds differ in nothing else, the others are not composed anew."""
    cells = [Cell(method, arm, seed) for seed in of_run(run).seeds]
    composed = [compose_arm(run, cell) for cell in cells[:2]]
    first, last = composed[0].run, composed[-1].run
    expected = with_train(first, seed=cells[len(composed) - 1].seed)
    if (expected.config, expected.resolved) != (last.config, last.resolved):
        return composed + [compose_arm(run, cell) for cell in cells[2:]]
    return composed + [ArmRun(cell, with_train(first, seed=cell.seed)) for cell in cells[2:]]


def compose_arm(run: Run, cell: Cell) -> ArmRun:
    """The run of one cell: what the caller typed, then the method, the arm's overrides and the seed."""
    comparison = of_run(run)
    words = [
        *(word for word in run.overrides if section_of(word) != "comparison"),
        *((f"kd_method={cell.method}",) if comparison.methods else ()),
        *comparison.arms[cell.arm],
        f"train.seed={cell.seed}",
        f"upstream={'require' if run.config.plan.enabled else run.config.upstream}",
    ]
    prefix = "--config-name="
    primary = [word.removeprefix(prefix) for word in run.options if word.startswith(prefix)]
    config_name = primary[0] if primary else None
    composed = compose_run("distill", words, config_name=config_name, options=run.options)
    return ArmRun(cell, replace(composed, waits=run.waits))


def with_train(run: Run, **values: int) -> Run:
    """The same run with other values of `train`: in its configuration, its command, and what its manifest will keep."""
    typed = {f"train.{name}": f"train.{name}={value}" for name, value in values.items()}
    kept = (word for word in run.overrides if word.partition("=")[0] not in typed)
    resolved: dict[str, Any] = {**run.resolved, "train": {**run.resolved["train"], **values}}
    return replace(
        run,
        config=run.config.model_copy(update={"train": run.config.train.model_copy(update=values)}),
        overrides=(*kept, *typed.values()),
        resolved=resolved,
    )


def refuse_equal_arms(students: Mapping[Cell, str], comparison: str) -> None:
    """Raises ConfigError where two arms lead to the same student: a comparison of a run with itself."""
    by_student: dict[tuple[str, int, str], list[str]] = {}
    for cell, student in students.items():
        by_student.setdefault((cell.method, cell.seed, student), []).append(cell.arm)
    equal = dict.fromkeys(tuple(arms) for arms in by_student.values() if len(arms) > 1)
    if equal:
        pairs = "; ".join(" and ".join(arms) for arms in equal)
        raise ConfigError(
            f"arms are equal: {pairs}",
            where=_file(comparison),
            why="their overrides lead to the same student, so there is nothing to compare",
            fix="change the overrides of one, or leave it out with comparison.only",
        )


def _refuse_seeds_and_methods(run: Run) -> None:
    """Raises where the caller or an arm sets what the comparison decides, which would be ignored in silence."""
    comparison = of_run(run)
    errors: list[PoclError] = []
    for where, words in (("the command line", run.overrides), *_placed(comparison)):
        if any(word.startswith("train.seed=") for word in words):
            why = "every arm runs with each of comparison.seeds"
            errors.append(ConfigError("train.seed is set", where=where, why=why, fix="set comparison.seeds=[…]"))
    if comparison.methods and any(word.partition("=")[0] == "kd_method" for word in run.overrides):
        why = f"comparison.methods names {', '.join(comparison.methods)}"
        fix = "leave one of both out"
        errors.append(ConfigError("kd_method is set", where="the command line", why=why, fix=fix))
    known = options_of("kd_method")
    errors += [unknown_option("comparison.methods", one, known) for one in comparison.methods or () if one not in known]
    if errors:
        raise MultiConfigError(errors)


def _placed(comparison: ComparisonConfig) -> Iterable[tuple[str, Sequence[str]]]:
    return ((_place(arm, comparison.name), words) for arm, words in comparison.chosen.items())


def _inside(error: PoclError, arm: str, comparison: str) -> PoclError:
    where = _place(arm, comparison) + (f", {error.where}" if error.where else "")
    return type(error)(error.what, where=where, why=error.why, fix=error.fix)


def _place(arm: str, comparison: str) -> str:
    return f"arm {arm} of {_file(comparison)}"


def _file(comparison: str) -> str:
    return f"conf/comparison/{comparison}.yaml"
