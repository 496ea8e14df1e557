"""What the benchmarks measure on: a teacher, a student that keeps some of its layers, and rows to train on.

Every measuring process makes its own from a `Setup` of plain values, so nothing but the setup travels.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pocl_cli.errors import DataError
from pocl_cli.records import TokenisedRow
from pocl_cli.registry import kd_methods

# The measuring processes import torch and transformers themselves: the one that starts them stays small, because a
# system may count a parent's memory towards the peak of its child.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_cli.models.load import LoadedModel
    from pocl_cli.models.source import ModelSource

CONF = Path(__file__).resolve().parents[1] / "conf"
METHODS = ("fkl", "rkl", "jsd", "tvd", "sfkl", "srkl")
# To what the reference pads every row; longer made-up rows raise it.
PADDED_LENGTH = 512
# The second stage of the paper: cross entropy and divergence both count, and the temperature is not 1.
KD_RATIO, TEMPERATURE = 0.8, 4 / 3
# Prompt and response tokens of made-up rows: the medians of the thirds of DollyEval in SmolLM2's tokens.
DOLLY_LENGTHS = ((43, 17), (122, 51), (37, 159))
TINY: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # wide: teacher and student must not be almost the same
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Models and rows as plain values.

    Attributes:
        model: folder of the teacher; None makes a small one of `architecture`.
        rows: file to take the first `num_rows` usable rows of; None makes rows of random tokens.
        layers: how many of the teacher's layers the student keeps.
        lengths: prompt and response tokens of each made-up row.
        max_tokens_per_micro_batch: of our sides; None is the default of `hardware=cpu`.
        compiled: whether Liger may use `torch.compile`, where there is a compiler.
    """

    model: Path | None = None
    rows: Path | None = None
    layers: int = 6
    num_rows: int = 8
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(TINY))
    lengths: Sequence[tuple[int, int]] = DOLLY_LENGTHS
    max_tokens_per_micro_batch: int | None = None
    compiled: bool = True

    @property
    def name(self) -> str:
        """What the tables' names end in: nothing for the small model, else the model's folder."""
        return "" if self.model is None else f"-{self.model.name}"


class Case:
    """A setup in a measuring process, with one divergence. Models are loaded when they are first asked for."""

    def __init__(self, setup: Setup, *, method: str = "fkl", kd_ratio: float = KD_RATIO, store: Path | None = None):
        self.setup, self.kd_ratio, self.temperature, self.store = setup, kd_ratio, TEMPERATURE, store
        self.method: Any = kd_methods.build(shipped(f"kd_method/{method}"))

    @cached_property
    def student(self) -> LoadedModel:
        return _loaded(dataclasses.replace(self._source, label="student", layers=self.setup.layers))

    def load_teacher(self) -> LoadedModel:
        """A teacher that only the caller holds, so that it can be given up."""
        return _loaded(self._source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from pocl_cli.models.load import load_tokenizer

        return load_tokenizer(self._source)

    @cached_property
    def num_real_tokens(self) -> int:
        """V. The small model's tokenizer has a few hundred tokens; there the whole output layer counts."""
        from pocl_cli.models.vocabulary import num_real_tokens

        if self.setup.model is None:
            return int(self.setup.architecture["vocab_size"])
        return num_real_tokens(self.tokenizer)

    @cached_property
    def rows(self) -> list[TokenisedRow]:
        if self.setup.rows is not None:
            return self._rows_of_file(self.setup.rows)
        dice, ids = random.Random(0), range(self.num_real_tokens)
        parts = [[dice.choices(ids, k=num_tokens) for num_tokens in lengths] for lengths in self.setup.lengths]
        return [TokenisedRow(f"row-{i}", prompt, response) for i, (prompt, response) in enumerate(parts)]

    @property
    def num_response_tokens(self) -> int:
        return sum(len(row.response_ids) for row in self.rows)

    @property
    def padded_length(self) -> int:
        """The reference's one length for all rows."""
        return max(PADDED_LENGTH, *(row.num_tokens for row in self.rows))

    @cached_property
    def _source(self) -> ModelSource:
        from pocl_cli.models.folder import check_model_folder
        from pocl_cli.models.source import ModelSource

        model = self.setup.model
        if model is not None:
            check_model_folder(model)
        # Every process makes the small model anew from one seed: nothing is written, and the weights are the same.
        made = None if model else self.setup.architecture
        return ModelSource("teacher", {}, {}, "float32", model, model, architecture=made)

    def _rows_of_file(self, path: Path) -> list[TokenisedRow]:
        from pocl_cli.data.sources import load_dataset
        from pocl_cli.data.template import RowEncoder
        from pocl_cli.schema import DatasetConfig

        config = DatasetConfig(**{**shipped("dataset/local"), "path": str(path), "max_tokens": PADDED_LENGTH})
        encoder = RowEncoder(self.tokenizer, config.max_tokens, config.max_prompt_tokens, config.long_prompts)
        encoded = encoder.encode_batch(load_dataset(config).records)
        wanted = self.setup.num_rows
        rows = [row for row in encoded if isinstance(row, TokenisedRow)][:wanted]
        if len(rows) < wanted:
            why, fix = f"it takes the first {wanted}", "give a file with more of them, or a smaller --num-rows"
            raise DataError(f"{len(rows)} usable rows", where=str(path), why=why, fix=fix)
        return rows


def shipped(name: str) -> dict[str, Any]:
    """The values of a shipped YAML file, `hardware/cpu` for one."""
    values: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _loaded(source: ModelSource) -> LoadedModel:
    import torch

    from pocl_cli.models.load import load_model

    return load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=0.0)


# ── the small model in files, for whole runs ──────────────────────────────────────────────────────────────────────────


def make_model_and_rows(model_folder: Path, rows_file: Path, num_rows: int) -> None:
    """A small Llama whose tokenizer has as many tokens as it has logits, and rows as long as Dolly's."""
    from transformers.utils.logging import disable_progress_bar

    from pocl_cli.models.build import build_config, build_model
    from pocl_cli.models.toy_tokenizer import WORDS, build_toy_tokenizer

    disable_progress_bar()
    tokenizer = build_toy_tokenizer()
    build_model(build_config(TINY, tokenizer), seed=0).save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    # Only real tokens count in a loss: fillers make them as many as the output layer has rows.
    file = model_folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["model"]["vocab"] |= {f"<|filler-{i}|>": i for i in range(len(tokenizer), TINY["vocab_size"])}
    file.write_text(json.dumps(described), encoding="utf-8")
    dice = random.Random(0)
    lengths = itertools.islice(itertools.cycle(DOLLY_LENGTHS), num_rows)
    rows = []
    for prompt, response in lengths:
        texts = [" ".join(dice.choices(WORDS, k=round(n * dice.uniform(0.5, 1.5)))) for n in (prompt, response)]
        rows.append({"instruction": texts[0], "output": texts[1]})
    rows_file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


# ── command line ──────────────────────────────────────────────────────────────────────────────────────────────────────


def add_setup_options(parser: argparse.ArgumentParser, *, rows: bool = True) -> None:
    """The options that a `Setup` is made of, and `--repeats`; without `rows` all rows are made up."""
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the teacher; default: a small one made here")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model that the student keeps (6)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; one more comes before them (3)")
    of_ours = "of our sides; default: that of hardware=cpu"
    parser.add_argument("--max-tokens-per-micro-batch", type=int, metavar="N", help=of_ours)
    if rows:
        parser.add_argument("--rows", type=Path, metavar="FILE", help="rows to take; default: random tokens")
        parser.add_argument("--num-rows", type=int, default=8, help="how many of the file's (8)")


def setup_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Setup:
    """The setup that the options describe. A wrong combination ends the program with exit code 2."""
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if getattr(options, "rows", None) is not None and options.model is None:
        parser.error("--rows needs --model, whose tokenizer reads them")
    names = {field.name for field in dataclasses.fields(Setup)}
    return Setup(**{name: value for name, value in vars(options).items() if name in names})
