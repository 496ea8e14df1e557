"""Runs one step under Hydra: once, or a job for every choice of a sweep."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pocl_cli import completion, config, explain, guard, log, tables
from pocl_cli.arguments import Arguments, read
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.disk import reported
from pocl_cli.errors import ConfigError, PoclError
from pocl_cli.mistakes import MultiConfigError
from pocl_cli.processes.gpus import take_gpus
from pocl_cli.processes.outer import Outer, read_outer
from pocl_cli.redaction import scrub
from pocl_cli.run import Run

# From Hydra 1.4 on there is no other, and naming it is a warning.
VERSION_BASE = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
# Where the jobs of a sweep, wherever a launcher runs them, leave what came of them.
_OUTCOMES = "POCL_SWEEP_OUTCOMES"


class SweepError(PoclError):
    """Jobs of a sweep failed; `errors` holds a line each. A sweep keeps Hydra's exit code."""

    exit_code = 1

    def __init__(self, errors: Sequence[PoclError]) -> None:
        super().__init__(f"{len(errors)} errors in the sweep")
        self.errors = list(errors)


def run_step(step: str, words: Sequence[str]) -> None:
    """Runs `pocl STEP WORDS…`; where a launcher has started it in several processes, together with the others.

    Raises:
        PoclError: the step failed; MultiConfigError where the configuration is wrong; SweepError where jobs failed.
    """
    outer = read_outer(os.environ)
    try:
        _run_step(step, words, outer)
    except MultiConfigError as error:
        if outer is None or outer.is_first:
            raise
        # The first process finds the same mistakes, and tells of them.
        raise SystemExit(error.exit_code) from error


def _run_step(step: str, words: Sequence[str], outer: Outer | None) -> None:
    arguments = read(step, words)
    if outer is not None and (arguments.multirun or step == "compare"):
        raise MultiConfigError([_no_jobs(f"{step} -m" if arguments.multirun else step, outer)])
    guard.refuse_overrides(arguments.overrides)
    guard.guard_compositions()
    folders = [*arguments.config_dirs, *config.user_config_folders()]
    if arguments.completes:
        os.environ["COMP_LINE"], typed = completion.without_config_dirs(os.environ.get("COMP_LINE", ""))
        folders = [*typed, *folders]
    config.add_user_config(folders)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    state = _State()
    job = _job(step, arguments, state, outer)
    task = hydra.main(config_path=str(config.conf_dir()), config_name=step, **VERSION_BASE)(job)
    with _run_folders(arguments, outer) as places:
        sys.argv = [f"pocl {step}", *arguments.flags, *arguments.overrides, *places]
        try:
            if arguments.multirun:
                _sweep(task)
            else:
                task()
        except explain.COMPOSITION_ERRORS as error:
            if state.begun:
                raise
            raise MultiConfigError(_diagnosed(step, arguments, error)) from error
        except OSError as error:
            if state.begun:
                raise
            with reported(Path(str(error.filename or "the run's folder")), "make"):
                raise
        except SystemExit as stop:
            if stop.code == 1 and arguments.package:
                raise _no_package(arguments.package) from stop
            raise
    if arguments.completes:
        _complete_below(os.environ["COMP_LINE"])
    if state.failure is not None:
        raise state.failure


@dataclass
class _State:
    """What the job of a single run leaves for the dispatcher: for an error raised in it, Hydra prints lines itself."""

    begun: bool = False
    failure: PoclError | None = None


@contextlib.contextmanager
def _run_folders(arguments: Arguments, outer: Outer | None) -> Iterator[list[str]]:
    """Overrides of Hydra's run folders: a plan writes nothing, so it has one that is gone when it ends.

    So has a process that follows another: one of them keeps the log.
    """
    if not arguments.plans and (outer is None or outer.is_first):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="pocl-run-") as folder:
        yield [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]


def _no_jobs(command: str, outer: Outer) -> ConfigError:
    return ConfigError(
        f"pocl {command} inside {outer.launcher}",
        why=f"it starts jobs by itself, and here are {outer.size} processes that do one together",
        fix=f"start each run with its own {outer.launcher}, or use it without (hydra/launcher=slurm for a sweep)",
    )


def _no_package(name: str) -> ConfigError:
    return ConfigError(f"no section {name!r} for -p", why="the configuration has none", fix="see --cfg job without -p")


def _complete_below(line: str) -> None:
    """Prints the options in sub-folders of a group (`experiment=paper/gpt2_fkl`): Hydra leaves them out."""
    group, equals, begun = line.rpartition(" ")[2].partition("=")
    with initialize_config_dir(str(config.conf_dir()), **VERSION_BASE):
        options = explain.options_of(group) if equals else []
    print(*(f"{group}={option}" for option in options if "/" in option and option.startswith(begun)))


def _diagnosed(step: str, arguments: Arguments, error: Exception) -> list[PoclError]:
    """Everything that is wrong with the overrides, where Hydra told of one thing."""
    name = arguments.config_name or step
    with initialize_config_dir(str(config.conf_dir()), **VERSION_BASE):
        errors, cfg = explain.diagnose(name, arguments.overrides, sweeps=arguments.multirun)
        if cfg is not None:
            try:
                config.from_hydra(step, cfg, arguments.overrides)
            except MultiConfigError as more:
                errors += more.errors
    return errors or [explain.explain(error)]


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _job(step: str, arguments: Arguments, state: _State, outer: Outer | None) -> Callable[[DictConfig], None]:
    """What Hydra calls with a composed configuration, once a job."""
    options = [f"--config-dir={folder}" for folder in arguments.config_dirs]
    options += [f"--config-name={arguments.config_name}"] if arguments.config_name else []

    def job(cfg: DictConfig) -> None:
        state.begun = True
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        sweeps = hydra_config.mode is RunMode.MULTIRUN
        outcome: dict[str, Any] = {"overrides": overrides, "status": "interrupted", "errors": []}
        started = time.monotonic()
        try:
            run = config.from_hydra(step, cfg, overrides, options=options)
            run = replace(run, waits=arguments.waits or (sweeps and not _one_after_another(hydra_config)))
            outcome |= _work(run, hydra_config, outer)
        except PoclError as error:
            outcome |= {"status": "failed", "errors": [str(one) for one in getattr(error, "errors", [error])]}
            if isinstance(error, MultiConfigError):
                _remove_empty(Path(hydra_config.runtime.output_dir))
            if sweeps:
                raise
            state.failure = error
        finally:
            outcome["seconds"] = time.monotonic() - started
            if isinstance(bug := sys.exc_info()[1], Exception) and not outcome["errors"]:
                outcome |= {"status": "failed", "errors": [f"internal bug {type(bug).__name__}: {bug}"]}
            folder = Path(os.environ.get(_OUTCOMES, ""))
            if sweeps and _OUTCOMES in os.environ and folder.is_dir():  # it is not on another machine
                number = int(hydra_config.job.num)
                durable.write_json(folder / f"{number:06d}.json", {"job": number, **outcome})

    job.__name__ = job.__qualname__ = step
    return job


def _one_after_another(hydra_config: HydraConf) -> bool:
    """Whether the jobs of a sweep run in turn; jobs at once may need the same upstream artifact, and wait for it."""
    return "basic_launcher" in str(hydra_config.launcher._target_)


def _work(run: Run, hydra_config: HydraConf, outer: Outer | None) -> dict[str, Any]:
    """Runs one step and prints the path of its artifact, the only thing on stdout."""
    from pocl_cli.steps import dispatch  # half a second that configuration errors do without

    log.set_up_console_log(logging.DEBUG if hydra_config.verbose is True else logging.INFO)
    logger = log.get_logger()
    if hydra_config.mode is RunMode.MULTIRUN:
        _clean_sweep_file(Path(hydra_config.sweep.dir) / "multirun.yaml")
        logger.info("job %s: %s", hydra_config.job.num, " ".join(run.overrides))
        if "joblib" in str(hydra_config.launcher._target_) and run.config.hardware.device in ("auto", "cuda"):
            take_gpus(int(hydra_config.job.num), run.config.hardware.num_processes)
    with contextlib.ExitStack() as stack:
        if not run.config.plan.enabled:
            stack.enter_context(log.set_up_run_log(Path(hydra_config.runtime.output_dir) / "pocl.log"))
        logger.debug("%s, configuration %s", shlex.join(run.command), json.dumps(run.resolved))
        try:
            with contextlib.redirect_stdout(sys.stderr), _launched(run, outer):
                result = dispatch.run_step(run)
        except BaseException:
            logger.debug("stopped", exc_info=True)
            raise
    if result is None:
        return {"status": "planned"}
    print(result.artifact.path, flush=True)
    return {"status": "made" if result.made else "reused", "figures": result.figures}


def _launched(run: Run, outer: Outer | None) -> contextlib.AbstractContextManager[None]:
    """Around a step: where a launcher has started several processes, they work on it together.

    Raises SystemExit in those that follow the first one, when that ends.
    """
    if outer is None:
        return contextlib.nullcontext()
    try:
        outer.check_num_nodes(run.config.hardware.num_nodes)
    except ConfigError as error:
        raise MultiConfigError([error]) from error
    if outer.is_first and run.config.plan.enabled:
        return contextlib.nullcontext()
    if run.config.plan.enabled:
        raise SystemExit(0)
    from pocl_cli.steps import joined  # torch: seconds

    if outer.is_first:
        return joined.leading(outer, run.config.hardware)
    log.set_up_console_log(logging.ERROR)
    joined.follow(outer, run.config.hardware)


def _remove_empty(folder: Path) -> None:
    """Takes away the run folder that Hydra made before the configuration was found to be wrong, where it is empty."""
    here = Path.cwd()
    with contextlib.suppress(OSError):
        for one in (folder, *list(folder.parents)[:3]):
            if here.is_relative_to(one):
                return
            one.rmdir()


def _clean_sweep_file(path: Path) -> None:
    """Hides secrets in what Hydra's sweeper has written down of the command line."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if scrub(text) != text:
            durable.write_text(path, scrub(text))


# ── sweeps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sweep(task: Callable[[], Any]) -> None:
    """Runs all jobs and shows a table of them, also where one failed. Raises SweepError with a line a failed job."""
    with tempfile.TemporaryDirectory(prefix="pocl-sweep-") as folder:
        os.environ[_OUTCOMES] = folder
        failure: PoclError | None = None
        outcomes: list[dict[str, Any]] = []
        try:
            task()
        except PoclError as error:
            failure = error
        finally:
            del os.environ[_OUTCOMES]
            outcomes = [json.loads(path.read_bytes()) for path in sorted(Path(folder).glob("*.json"))]
            if outcomes:
                tables.sweep_table(_rows(outcomes))
    errors = [PoclError(f"job {outcome['job']}: {line}") for outcome in outcomes for line in outcome["errors"]]
    if errors:
        raise SweepError(errors)
    if failure is not None:
        raise failure


def _rows(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a job: what sets it apart from the others, what came of it, its figures."""
    shared = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes))
    return [
        {
            "job": outcome["job"],
            "overrides": " ".join(word for word in outcome["overrides"] if word not in shared),
            "status": outcome["status"],
            **outcome.get("figures", {}),
            "time": log.duration(outcome["seconds"]),
        }
        for outcome in outcomes
    ]
