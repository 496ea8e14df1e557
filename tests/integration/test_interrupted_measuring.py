"""Scoring and evaluation that were interrupted: the same command goes on with the next shard, to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import initialize_config_dir
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pocl_cli.config import compose_run, conf_dir
from pocl_cli.steps import evaluate, score
from pocl_cli.training import shards

from ..support.recipe import recipe, write_inputs

CHANGES = {
    "score": ("score.max_new_tokens=4", "score.teacher=false", "score.sampling_temperature=1"),
    "evaluate": (
        "evaluation.decoding.max_new_tokens=4",
        "evaluation.decoding.sampling_temperature=1",
        "evaluation.seeds=[1,2]",
        "evaluation.model=teacher",
    ),
}
FILES = {"score": ["scores.parquet"], "evaluate": ["metrics.json", "predictions.jsonl"]}


@contextmanager
def counting_embeddings(on_call: Callable[[int], None]) -> Iterator[list[int]]:
    """The number of rows of every forward pass of a language model; `on_call` gets how many passes there were."""
    sizes: list[int] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and module.num_embeddings > 64:  # not the one of positions
            sizes.append(len(inputs[0]))
            on_call(len(sizes))

    handle = register_module_forward_pre_hook(hook)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("step", [score, evaluate], ids=["score", "evaluate"])
def test_measuring_when_interrupted_then_goes_on_with_the_next_shard_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: ModuleType
) -> None:
    name = step.__name__.rpartition(".")[2]
    monkeypatch.setattr(shards if step is score else step, "SHARD_ROWS", 8)
    write_inputs(tmp_path / "inputs")
    rows = f"{{name: rows, path: {tmp_path}/inputs/rows.jsonl, max_tokens: 60, max_prompt_tokens: 48}}"
    changes = (*CHANGES[name], f"evaluation.datasets=[{rows}]")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        undisturbed, disturbed = (
            compose_run(name, recipe(tmp_path / "inputs", tmp_path / outputs, *changes))
            for outputs in ("undisturbed", "disturbed")
        )
    with counting_embeddings(lambda num_passes: None) as whole:
        expected = step.run(undisturbed).artifact

    def interrupt(num_passes: int) -> None:
        if num_passes == len(whole) - 2:  # in the last shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), counting_embeddings(interrupt):
        step.run(disturbed)
    with counting_embeddings(lambda num_passes: None) as rest:
        found = step.run(disturbed).artifact

    assert len(rest) < len(whole) / 2
    assert found.id == expected.id
    for file in FILES[name]:
        assert (found.path / file).read_bytes() == (expected.path / file).read_bytes()
