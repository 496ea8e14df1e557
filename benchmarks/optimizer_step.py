"""Seconds and memory of one optimizer step: a plain formulation of the reference's against ours, on the same rows.

    python benchmarks/optimizer_step.py                                             a small model made here
    python benchmarks/optimizer_step.py --model FOLDER --rows FILE --methods fkl    a real one

Standard output has one JSON line a measurement; the table comes last, on standard error. Exit code 1: the two sides
disagree about the loss or the gradient norm.

B rows, L positions, V logits of real tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pocl_cli import tables
from pocl_cli.errors import DataError, PoclError, ResourceError
from pocl_cli.records import TokenisedRow
from pocl_cli.registry import kd_methods

# The measuring processes import torch and transformers themselves: the one that starts them stays small, because a
# system may count a parent's memory towards the peak of its child.
if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.models.load import LoadedModel

METHODS = ("fkl", "rkl", "jsd", "tvd", "sfkl", "srkl")
CONF = Path(__file__).resolve().parents[1] / "conf"
TOLERANCE = 1e-4
NUM_ROWS, PADDED_LENGTH = 8, 512
# The second stage of the paper: cross entropy and divergence both count, and the temperature is not 1.
KD_RATIO, TEMPERATURE = 0.8, 4 / 3
# At a learning rate of 0 the optimizer does all its work and every step has the same loss.
LR, WEIGHT_DECAY, GRAD_CLIP = 0.0, 0.01, 1.0
# Prompt and response tokens of made-up rows: the medians of the thirds of DollyEval in SmolLM2's tokens.
DOLLY_LENGTHS = ((43, 17), (122, 51), (37, 159))
TINY = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": PADDED_LENGTH,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # wide: teacher and student must not be almost the same
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides are given. The student is the teacher without some of its layers."""

    method: Any
    student: LoadedModel
    teacher: LoadedModel
    rows: Sequence[TokenisedRow]
    num_real_tokens: int
    max_tokens_per_micro_batch: int | None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process measured. Times are medians over the repeats, per optimizer step.

    Attributes:
        seconds: wall time; `cpu_seconds` is that of all threads.
        peak_gb: 10⁹ bytes, of the whole life of the process: libraries and both models included.
        loss: of the whole batch, in nats per response token; `gradient_norm` is the one before clipping.
    """

    method: str
    formulation: str
    seconds: float
    cpu_seconds: float
    peak_gb: float
    loss: float
    gradient_norm: float
    num_rows: int
    num_tokens: int
    num_response_tokens: int
    num_threads: int


def main(arguments: Sequence[str]) -> int:
    """Measures both sides for every method and draws the table. Returns the exit code."""
    options = _options(arguments)
    found = []
    for method in options.methods:
        for formulation in ("reference", "ours"):
            found.append(in_fresh_process(method, formulation, options))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    pairs = list(zip(found[::2], found[1::2], strict=True))
    show(pairs, options.repeats)
    wrong = [reference.method for reference, ours in pairs if not difference(reference, ours) <= TOLERANCE]
    if wrong:
        print(f"the two sides differ by more than {TOLERANCE:g}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def in_fresh_process(method: str, formulation: str, options: argparse.Namespace) -> Measurement:
    """`measure` in a process of its own, so that the peak memory is its own.

    Raises:
        ResourceError: the process died.
        PoclError: as the process raised it.
    """
    # The server imports the libraries once and forks itself for every measurement; off Linux, forking is not safe.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["pocl_cli.models.load", "transformers.models.llama.modeling_llama"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, method, formulation, options).result()
    except BrokenProcessPool as error:
        why, fix = "it was probably out of memory", "take a smaller --model"
        raise ResourceError("the measuring process died", where=f"{method}, {formulation}", why=why, fix=fix) from error


def measure(method: str, formulation: str, options: argparse.Namespace) -> Measurement:
    """Makes one untimed step and then the timed ones, each with forward, backward, clipping and optimizer."""
    import torch

    from pocl_cli.training.optimizer import make_optimizer

    case = _case(method, options)
    forward_and_backward = {"reference": reference_side, "ours": our_side}[formulation](case)
    model = case.student.model.train()
    optimizer = make_optimizer(model, lr=LR, weight_decay=WEIGHT_DECAY)
    times = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = forward_and_backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measurement(
        method=method,
        formulation=formulation,
        seconds=statistics.median(wall for wall, _ in times[1:]),
        cpu_seconds=statistics.median(cpu for _, cpu in times[1:]),
        peak_gb=peak / 1e9,
        loss=loss,
        gradient_norm=float(gradient_norm),
        num_rows=len(case.rows),
        num_tokens=sum(row.num_tokens for row in case.rows),
        num_response_tokens=sum(len(row.response_ids) for row in case.rows),
        num_threads=torch.get_num_threads(),
    )


# ── the reference formulation ─────────────────────────────────────────────────────────────────────────────────────────


def reference_side(case: Case) -> Callable[[], float]:
    """All rows padded to one length, both models' logits of every position, the loss of all of them, then the mask."""
    import torch
    from torch.nn import functional as F

    factor = TEMPERATURE**2 if case.method.t_squared else 1.0

    def step() -> float:
        input_ids_BL = torch.full((len(case.rows), PADDED_LENGTH), case.teacher.pad_token_id)
        attention_mask_BL = torch.zeros_like(input_ids_BL)
        labels_BL = torch.full_like(input_ids_BL, -100)
        for i, row in enumerate(case.rows):
            input_ids_BL[i, : row.num_tokens] = torch.tensor([*row.prompt_ids, *row.response_ids])
            attention_mask_BL[i, : row.num_tokens] = 1
            labels_BL[i, len(row.prompt_ids) - 1 : row.num_tokens - 1] = torch.tensor(row.response_ids)
        inputs = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "use_cache": False}
        with torch.no_grad():
            teacher_BLV = case.teacher.model(**inputs).logits[..., : case.num_real_tokens]
        student_BLV = case.student.model(**inputs).logits[..., : case.num_real_tokens]
        ce = F.cross_entropy(student_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=-100)
        log_p_BLV = F.log_softmax(teacher_BLV / TEMPERATURE, dim=-1)
        log_q_BLV = F.log_softmax(student_BLV / TEMPERATURE, dim=-1)
        mask_BL = labels_BL != -100
        kd = (plain_divergence(case.method, log_p_BLV, log_q_BLV) * mask_BL).sum() / mask_BL.sum()
        loss = (1 - KD_RATIO) * ce + KD_RATIO * factor * kd
        loss.backward()
        return loss.item()

    return step


def plain_divergence(method: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence over the last dimension as it stands on paper, in nats; p teacher, q student, both above zero."""
    if method.name == "jsd":
        weight: float = method.teacher_weight
        log_m = _log_mixture(log_p, log_q, weight)
        return weight * _kl(log_p, log_m) + (1 - weight) * _kl(log_q, log_m)
    others: dict[str, Callable[[], Tensor]] = {
        "fkl": lambda: _kl(log_p, log_q),
        "rkl": lambda: _kl(log_q, log_p),
        "tvd": lambda: (log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2,
        "sfkl": lambda: _kl(log_p, _log_mixture(log_p, log_q, method.alpha)),
        "srkl": lambda: _kl(log_q, _log_mixture(log_q, log_p, method.alpha)),
    }
    return others[method.name]()


def _kl(log_p: Tensor, log_r: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_r)).sum(dim=-1)


def _log_mixture(log_p: Tensor, log_r: Tensor, weight: float) -> Tensor:
    return (weight * log_p.exp() + (1 - weight) * log_r.exp()).log()


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def our_side(case: Case) -> Callable[[], float]:
    """What the training loop makes of a global batch; the teacher runs at every step here, too."""
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.models.head import split_model
    from pocl_cli.models.teacher import OnlineTeacher
    from pocl_cli.schema import HardwareConfig
    from pocl_cli.training.objective import collate
    from pocl_cli.training.sampler import micro_batches
    from pocl_cli.training.student import StudentWithObjective

    changed = {"max_tokens_per_micro_batch": case.max_tokens_per_micro_batch}
    hardware = set_up_hardware(HardwareConfig(**{**_yaml("hardware/cpu"), **changed}))
    module = StudentWithObjective(
        split_model(case.student.model),
        method=case.method,
        teacher=OnlineTeacher(split_model(case.teacher.model)),
        num_real_tokens=case.num_real_tokens,
        hardware=hardware,
    )
    num_response_tokens = sum(len(row.response_ids) for row in case.rows)

    def step() -> float:
        total = 0.0
        for group in micro_batches(case.rows, hardware.max_tokens_per_micro_batch, packs=module.packs):
            batch = collate(group)
            output = module(batch, temperature=TEMPERATURE, kd_ratio=KD_RATIO, normaliser=num_response_tokens)
            output.loss.backward()
            total += output.loss.item()
        return total

    return step


# ── models and rows ───────────────────────────────────────────────────────────────────────────────────────────────────


def _case(method: str, options: argparse.Namespace) -> Case:
    import torch

    from pocl_cli.models.folder import check_model_folder
    from pocl_cli.models.load import load_model
    from pocl_cli.models.source import ModelSource
    from pocl_cli.models.vocabulary import num_real_tokens

    if options.model is not None:
        check_model_folder(options.model)
    # Every process makes the small model anew from one seed: nothing is written, and the weights are the same.
    made = None if options.model else TINY
    whole = ModelSource("teacher", {}, {}, "float32", options.model, options.model, architecture=made)
    pruned = dataclasses.replace(whole, label="student", layers=options.layers)
    teacher, student = (
        load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=0.0) for source in (whole, pruned)
    )
    # The small model's tokenizer has a few hundred tokens; there the whole output layer counts.
    num_tokens = num_real_tokens(teacher.tokenizer) if options.model else teacher.model.config.vocab_size
    rows = _random_rows(num_tokens) if options.rows is None else _rows(options.rows, teacher)
    member = kd_methods.build(_yaml(f"kd_method/{method}"))
    return Case(member, student, teacher, rows, num_tokens, options.max_tokens_per_micro_batch)


def _random_rows(num_real_tokens: int) -> list[TokenisedRow]:
    dice, ids = random.Random(0), range(num_real_tokens)
    parts = [[dice.choices(ids, k=num_tokens) for num_tokens in lengths] for lengths in DOLLY_LENGTHS]
    return [TokenisedRow(f"row-{i}", prompt_ids, response_ids) for i, (prompt_ids, response_ids) in enumerate(parts)]


def _rows(path: Path, loaded: LoadedModel) -> list[TokenisedRow]:
    from pocl_cli.data.sources import load_dataset
    from pocl_cli.data.template import RowEncoder
    from pocl_cli.schema import DatasetConfig

    config = DatasetConfig(**{**_yaml("dataset/local"), "path": str(path), "max_tokens": PADDED_LENGTH})
    encoder = RowEncoder(loaded.tokenizer, config.max_tokens, config.max_prompt_tokens, config.long_prompts)
    encoded = encoder.encode_batch(load_dataset(config).records)
    rows = [row for row in encoded if isinstance(row, TokenisedRow)][:NUM_ROWS]
    if len(rows) < NUM_ROWS:
        why = f"it takes the first {NUM_ROWS}"
        raise DataError(f"{len(rows)} usable rows", where=str(path), why=why, fix="give a file with more of them")
    return rows


def _yaml(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


# ── command line and table ────────────────────────────────────────────────────────────────────────────────────────────


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Seconds and memory of an optimizer step, the reference's way and ours."
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the teacher; default: a small one made here")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows to take; default: random tokens")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model that the student keeps (6)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; one more comes before them (3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all of them")
    of_ours = "of our side; default: that of hardware=cpu"
    parser.add_argument("--max-tokens-per-micro-batch", type=int, metavar="N", help=of_ours)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.rows is not None and options.model is None:
        parser.error("--rows needs --model, whose tokenizer reads them")
    return options


def difference(reference: Measurement, ours: Measurement) -> float:
    """The larger of the relative differences of loss and gradient norm; NaN where one of them is."""
    ratios = (ours.loss / reference.loss, ours.gradient_norm / reference.gradient_norm)
    return max((abs(ratio - 1) for ratio in ratios), key=lambda one: (math.isnan(one), one))


def show(pairs: Sequence[tuple[Measurement, Measurement]], repeats: int) -> None:
    """Draws two lines a method; the ratios are the reference's figure divided by ours."""
    rows: list[Sequence[object]] = []
    for reference, ours in pairs:
        ratios = (reference.seconds / ours.seconds, reference.peak_gb / ours.peak_gb, difference(reference, ours))
        for one, last in ((reference, (None, None, None)), (ours, ratios)):
            rows.append([one.method, one.formulation, one.seconds, one.cpu_seconds, one.peak_gb, *last])
    first = pairs[0][0]
    title = (
        f"One optimizer step: {first.num_rows} rows, {first.num_tokens} tokens, {first.num_response_tokens} of them of "
        f"responses; threads: {first.num_threads}; medians of {repeats}; ratio = reference / ours"
    )
    figures = ["s wall", "s CPU", "peak GB", "time ratio", "GB ratio", "differ by"]
    tables.results_table(title, ["method", "formulation", *figures], rows)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PoclError as error:
        print(f"pocl: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
