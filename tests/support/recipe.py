"""A tiny recipe for the whole step: `experiment=demo` with random models, a few rows, two stages, dropout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir

from pocl_cli.artifacts import Artifact
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.data.generators.toy import ToyInstructions
from pocl_cli.run import Run
from pocl_cli.schema import PathsConfig
from pocl_cli.steps import distill

from .training import TEACHER, make_model, toy_tokenizer

# Files whose bytes an interrupted run must share with an undisturbed one.
PROMISED = ("model/model.safetensors", "metrics.jsonl", "consumed.parquet", "stages.json")


def write_inputs(folder: Path) -> None:
    """24 training and 6 dev rows with answers that a tiny student learns in a few steps, and a random teacher."""
    drawn = ToyInstructions().rows("train", 30, 0)
    rows = [{**row, "output": "red cat" if len(row["input"]) % 3 else "blue dog"} for row in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_model(TEACHER, 2).save_pretrained(folder / "teacher")
    toy_tokenizer().save_pretrained(folder / "teacher")


def recipe(inputs: Path, outputs: Path, *changes: str) -> list[str]:
    """Overrides of all steps: 8 + 16 steps, a dev evaluation every epoch, the best state handed on."""
    return [
        "experiment=demo",
        f"teacher.path={inputs}/teacher",
        "teacher.experiment=null",
        "student.name=small",
        "student.experiment=null",
        "student.architecture={model_type: gpt2, hidden_size: 16, n_layer: 1, n_head: 2, n_positions: 64}",
        "student.tokenizer=toy",
        "dataset=local",
        f"dataset.path={inputs}/rows.jsonl",
        "dataset.dev_size=6",
        "dataset.max_tokens=64",
        "dataset.max_prompt_tokens=48",
        "difficulty=random",
        "curriculum.stages=2",
        "curriculum.epochs_per_stage=2",
        "train.global_batch_size=3",
        "train.log_every=1",
        "train.checkpoint_every=5",
        "train.dev_decoding.max_new_tokens=4",
        f"evaluation.datasets=[{{name: rows, path: {inputs}/rows.jsonl}}]",
        "upstream=auto",
        f"paths.outputs={outputs}",
        *changes,
    ]


def compose(overrides: Sequence[str], step: str = "distill") -> Run:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose_run(step, overrides)


def changed(run: Run, *, outputs: Path | None = None, **sections: Any) -> Run:
    """The same run elsewhere, or with whole sections replaced; composing anew takes a second."""
    if outputs is not None:
        sections["paths"] = PathsConfig(outputs=str(outputs))
    return replace(run, config=run.config.model_copy(update=sections))


def distilled(run: Run) -> Artifact:
    result = distill.run(run)
    assert result is not None, "this is no plan"
    return result.artifact


def promised_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every promised file of a student."""
    return {name: sha256_file(folder / name) for name in PROMISED}
