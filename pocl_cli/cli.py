"""The console command: takes the first word, hands the rest to Hydra, maps errors to one line and an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.errors import ConfigError, Interrupted, PoclError, SecurityError, nearest, printable

if TYPE_CHECKING:
    from pocl_cli.config import Run

STEPS = {
    "score": "measure every training row with the student and the teacher: the difficulty measurer's raw material",
    "partition": "rank the rows and cut them into subsets, easy to hard",
    "distill": "train the student stage by stage",
    "evaluate": "generate answers on test sets with several seeds and score them",
}
HELP = f"""\
pocl: curriculum knowledge distillation of language models (POCL, arXiv 2506.05695)

usage: pocl STEP [GROUP=OPTION] [KEY=VALUE] …      each step finds its inputs by the same overrides

{"".join(f"  {name:<11}{what}{chr(10)}" for name, what in STEPS.items())}
  env        versions, devices and places, for a bug report
  --version | --completion bash|zsh | --help

examples
  pocl distill experiment=demo upstream=auto         the whole chain on tiny models, without network
  pocl score teacher=gpt2-xl                         measure the rows
  pocl distill kd_method=rkl curriculum.stages=4     train with reverse KL in four stages
  pocl distill -m kd_method=fkl,rkl train.seed=1,2   sweep: four runs
  pocl distill plan=true                             the stage table and the costs, nothing written

pocl STEP --help lists a step's groups and keys; pocl STEP --cfg job prints what would run.
"""
# Hydra's own keys that users need; the others build loggers, callbacks and launchers from a name (FAULTS: security).
HYDRA_OVERRIDES = re.compile(
    r"^(hydra/launcher|hydra/sweeper|hydra\.launcher\.\w+|hydra\.sweep(\.\w+|er\.\w+)?|hydra\.run\.dir|hydra\.verbose)="
)
OUTCOMES = "POCL_SWEEP_OUTCOMES"
_failure: list[PoclError] = []


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `pocl`. Exits with DESIGN's codes."""
    sys.exit(_exit_code(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv))))


def _dispatch(argv: list[str]) -> int:
    word, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if word in STEPS:
        return _run_step(word, rest)
    if word in ("--help", "-h", "help"):
        print(HELP, end="")
    elif word == "--version":
        from pocl_cli import __version__

        print(f"pocl {__version__}")
    elif word == "env":
        from pocl_cli.environment import print_environment

        print_environment()
    elif word == "--completion":
        from pocl_cli.completion import script

        print(script(rest[0] if rest else "bash"), end="")
    else:
        guess = nearest(word, [*STEPS, "env", "--version", "--completion", "--help"])
        raise ConfigError(
            f"unknown command {word!r}",
            why=f"commands are {', '.join(STEPS)}, env",
            fix=f"did you mean 'pocl {guess}'?" if guess else "see pocl --help",
        )
    return 0


def _run_step(step: str, argv: list[str]) -> int:
    import hydra

    from pocl_cli import config

    argv = [re.sub(r"^plan=", "plan.enabled=", word) for word in argv]
    _refuse_hydra_overrides(argv)
    folders, argv = _take_config_dirs(argv)
    config.add_user_config([*folders, *config.user_config_folders()])
    if "plan.enabled=true" in [word.lower() for word in argv]:
        argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]  # a plan writes nothing

    multirun = any(word in ("-m", "--multirun") for word in argv)
    sys.argv = [f"pocl {step}", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting 1
    task = hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name=step)(_task(step))
    try:
        if multirun:
            return _sweep(task)
        task()
        if _failure:
            raise _failure.pop()
        return 0
    except _composition_errors() as error:
        raise config.ConfigErrors(_diagnosed(step, argv, error)) from error


def _task(step: str) -> Callable[[Any], None]:
    """What Hydra calls with the composed configuration, once a job."""

    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from pocl_cli import config, log

        hydra_config = HydraConfig.get()
        overrides = [o for o in hydra_config.overrides.task if o != "plan.enabled=false"]
        outcome: dict[str, Any] = {"overrides": list(hydra_config.overrides.task), "started": time.time()}
        try:
            run = config.from_hydra(step, cfg, overrides)
            log.set_up_console_log()
            if not run.config.plan.enabled:
                log.set_up_run_log(Path(hydra_config.runtime.output_dir) / "pocl.log")
            outcome.update(_work(run))
        except PoclError as error:
            outcome.update(status="failed", message=str(error), exit_code=error.exit_code)
            log.get_logger().debug("failed", exc_info=True)
            if hydra_config.mode is RunMode.MULTIRUN:
                raise
            _failure.append(error)  # raised by the dispatcher: Hydra would print a line of its own
        finally:
            outcome.setdefault("status", "failed")
            outcome["seconds"] = time.time() - outcome.pop("started")
            if folder := os.environ.get(OUTCOMES):
                number = hydra_config.job.get("num", 0)
                Path(folder, f"{number:05d}.json").write_text(json.dumps(outcome))

    job.__name__ = job.__qualname__ = step
    return job


def _work(run: Run) -> dict[str, Any]:
    """Runs one step; prints the artifact's path, the only thing on stdout."""
    import importlib

    result = importlib.import_module(f"pocl_cli.steps.{run.step}").run(run)
    if result is None:
        return {"status": "planned"}
    print(result.artifact.path, flush=True)
    return {"status": "made" if result.made else "reused", "path": str(result.artifact.path), "figures": result.figures}


def _sweep(task: Callable[[], Any]) -> int:
    """Runs a multirun, then shows one table of all its jobs, also where one failed."""
    from pocl_cli import tables

    with tempfile.TemporaryDirectory(prefix="pocl-sweep-") as folder:
        os.environ[OUTCOMES] = folder
        failure: Exception | None = None
        try:
            task()
        except PoclError as error:
            failure = error
        finally:
            del os.environ[OUTCOMES]
            outcomes = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            if outcomes:
                tables.show_sweep(outcomes)
    if failure is not None and not outcomes:
        raise failure
    for number, outcome in enumerate(outcomes):
        if outcome["status"] == "failed":
            _print_error(f"job {number}: {outcome.get('message', 'failed: see its log')}")
    return 1 if failure is not None or any(outcome["status"] == "failed" for outcome in outcomes) else 0


def _composition_errors() -> tuple[type[Exception], ...]:
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (HydraException, OmegaConfBaseException, yaml.YAMLError)


def _diagnosed(step: str, argv: Sequence[str], error: Exception) -> list[PoclError]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from pocl_cli import config

    names = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in ("-cn", "--config-name")]
    overrides = [word for word in argv if "=" in word and not word.startswith(("-", "hydra"))]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        if names:
            return [config.explain(error, None, step)]
        multirun = any(word in ("-m", "--multirun") for word in argv)
        found = [] if multirun else config.diagnose(step, overrides)
        return found or [config.explain(error, None, step)]


def _refuse_hydra_overrides(argv: Sequence[str]) -> None:
    for word in argv:
        key = word.lstrip("+~")
        if key.startswith("hydra") and not HYDRA_OVERRIDES.match(word):
            raise SecurityError(
                f"refused override {word.split('=', 1)[0]}",
                where="the command line",
                why="Hydra's own configuration can name code to run",
                fix="allowed are hydra/launcher, hydra.launcher.*, hydra/sweeper, hydra.sweep*, hydra.run.dir, hydra.verbose",
            )


def _take_config_dirs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    folders, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return folders, rest


def _exit_code(action: Callable[[], int]) -> int:
    """Runs `action`; every way to fail ends in one line on stderr and its exit code."""
    signal.signal(signal.SIGTERM, _raise_interrupted)
    debug = os.environ.get("POCL_DEBUG") == "1"
    try:
        return action()
    except PoclError as error:
        if debug:
            traceback.print_exc()
        for one in getattr(error, "errors", [error]):
            _print_error(str(one))
        return error.exit_code
    except Interrupted as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted — the same command goes on from the last checkpoint")
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter's last flush must not fail again
        return 141
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug of ours is one line and exit 70
        if debug:
            traceback.print_exc()
        _log_bug()
        where = traceback.extract_tb(error.__traceback__)[-1]
        _print_error(
            f"internal bug {type(error).__name__}: {error} in {Path(where.filename).name}:{where.lineno} — "
            "the program is wrong, not you — run again with POCL_DEBUG=1 and report the traceback"
        )
        return 70


def _log_bug() -> None:
    from pocl_cli import log

    log.get_logger().debug("internal bug", exc_info=True)


def _raise_interrupted(number: int, frame: object) -> None:
    raise Interrupted("terminated", why="SIGTERM", fix="the same command goes on from the last checkpoint")


def _print_error(text: str) -> None:
    print(f"pocl: error: {printable(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
