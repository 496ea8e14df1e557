"""Seconds of scoring rows and of answering test rows: a plain use of transformers against ours, on the same rows.

    python benchmarks/generation.py                                                   a small model made here
    python benchmarks/generation.py --model FOLDER --rows FILE --layers 6             a real one, pruned

Scoring: the cross entropy of the responses and one near-greedy answer a row. Evaluation: an answer to each row with
each of five seeds. The plain use takes batches of 16 rows in the order of the file: a padded pass for the cross
entropy, and `generate`, which goes on until the batch's longest answer ends.

Standard output has the JSON lines of a table, which comes last, on standard error. OMP_NUM_THREADS sets the threads.
Exit code 1: the two sides disagree about the cross entropy, about greedy answers (in float64), or about the mean
length of the sampled ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import entry
import measuring
import results
from pocl_cli import tables
from pocl_cli.errors import DataError
from pocl_cli.records import TokenisedRow

# The measuring processes import torch and transformers themselves.
if TYPE_CHECKING:
    from pocl_cli.models.load import LoadedModel

CONF = Path(__file__).resolve().parents[1] / "conf"
TASKS = ("score", "evaluate")
SEEDS = {"score": [10], "evaluate": [10, 20, 30, 40, 50]}
TEMPERATURE = {"score": 0.01, "evaluate": 1.0, "greedy": 0.0}
NO_REPEAT_NGRAM_SIZE, BATCH_SIZE, MAX_TOKENS = 6, 16, 512
CROSS_ENTROPY_TOLERANCE = 1e-5
GREEDY_ROWS, GREEDY_TOKENS = 24, 32
# Prompt and response tokens of made-up rows: the medians of the thirds of DollyEval in SmolLM2's tokens.
DOLLY_LENGTHS = ((43, 17), (122, 51), (37, 159))
TINY = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # wide: answers must differ
}
TINY_ENDS = range(3, 8192, 200)  # the small model never learned to end: every two hundredth token ends an answer


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides are given."""

    loaded: LoadedModel
    rows: Sequence[TokenisedRow]
    num_real_tokens: int
    eos_token_ids: Sequence[int]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process measured. Times are medians over the repeats.

    Attributes:
        seconds: wall time; `cpu_seconds` is that of all threads.
        num_tokens: generated tokens, the EOS that ends an answer included, of the last repeat.
        mean_length: tokens an answer; `length_deviation` is their standard deviation.
        cross_entropy: in nats per response token over all rows; None where it was not measured.
    """

    task: str
    formulation: str
    seconds: float
    cpu_seconds: float
    num_rows: int
    num_answers: int
    num_tokens: int
    mean_length: float
    length_deviation: float
    cross_entropy: float | None
    num_threads: int


def main(arguments: Sequence[str]) -> int:
    """Measures both sides of every task and draws the table. Returns the exit code."""
    options = _options(arguments)
    wrong = []
    greedy = [
        measuring.in_fresh_process(f"greedy answers, {side}", greedy_answers, side, options)
        for side in ("reference", "ours")
    ]
    if greedy[0] != greedy[1]:
        wrong.append("greedy answers differ")
    found = []
    for task in options.tasks:
        for formulation in ("reference", "ours"):
            found.append(measuring.in_fresh_process(f"{task}, {formulation}", measure, task, formulation, options))
            print(f"{task}, {formulation}: {found[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    pairs = list(zip(found[::2], found[1::2], strict=True))
    show(pairs, options)
    wrong += [problem for reference, ours in pairs for problem in disagreements(reference, ours)]
    if wrong:
        print(f"the two sides disagree: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def measure(task: str, formulation: str, options: argparse.Namespace) -> Measurement:
    """Warms up on a few rows, and then makes the timed repeats."""
    import torch

    case = _case(options)
    side = {"reference": reference_side, "ours": our_side}[formulation]
    side(dataclasses.replace(case, rows=case.rows[:BATCH_SIZE], max_new_tokens=4), task)
    times = []
    for _ in range(options.repeats):
        started = time.perf_counter(), time.process_time()
        cross_entropy, answers = side(case, task)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    lengths = [len(answer) for answer in answers]
    return Measurement(
        task=task,
        formulation=formulation,
        seconds=statistics.median(wall for wall, _ in times),
        cpu_seconds=statistics.median(cpu for _, cpu in times),
        num_rows=len(case.rows),
        num_answers=len(lengths),
        num_tokens=sum(lengths),
        mean_length=statistics.mean(lengths),
        length_deviation=statistics.pstdev(lengths),
        cross_entropy=cross_entropy,
        num_threads=torch.get_num_threads(),
    )


def greedy_answers(formulation: str, options: argparse.Namespace) -> list[list[int]]:
    """Greedy answers to the first rows in float64, where the order of additions does not decide between tokens."""
    case = _case(options)
    case.loaded.model.double()
    side = {"reference": reference_side, "ours": our_side}[formulation]
    new_tokens = min(GREEDY_TOKENS, case.max_new_tokens)
    return side(dataclasses.replace(case, rows=case.rows[:GREEDY_ROWS], max_new_tokens=new_tokens), "greedy")[1]


# ── the plain use of transformers ─────────────────────────────────────────────────────────────────────────────────────


def reference_side(case: Case, task: str) -> tuple[float | None, list[list[int]]]:
    """A padded pass for the cross entropy where the task has one, and `generate` once a seed."""
    batches = [case.rows[start : start + BATCH_SIZE] for start in range(0, len(case.rows), BATCH_SIZE)]
    cross_entropy = _plain_cross_entropy(case, batches) if task == "score" else None
    answers = []
    for seed in SEEDS.get(task, [0]):
        for batch in batches:
            answers += _plain_answers(case, batch, TEMPERATURE[task], seed)
    return cross_entropy, answers


def _plain_cross_entropy(case: Case, batches: Sequence[Sequence[TokenisedRow]]) -> float:
    """Logits of every position of rows padded on the right, and the mean over all response tokens."""
    import torch
    from torch.nn import functional as F

    total = 0.0
    for batch in batches:
        longest = max(row.num_tokens for row in batch)
        input_ids_BL = torch.full((len(batch), longest), case.loaded.pad_token_id)
        attention_mask_BL = torch.zeros_like(input_ids_BL)
        labels_BL = torch.full_like(input_ids_BL, -100)
        for i, row in enumerate(batch):
            input_ids_BL[i, : row.num_tokens] = torch.tensor([*row.prompt_ids, *row.response_ids])
            attention_mask_BL[i, : row.num_tokens] = 1
            labels_BL[i, len(row.prompt_ids) - 1 : row.num_tokens - 1] = torch.tensor(row.response_ids)
        with torch.no_grad():
            logits_BLV = case.loaded.model(input_ids=input_ids_BL, attention_mask=attention_mask_BL).logits
        flat = logits_BLV[..., : case.num_real_tokens].flatten(0, 1)
        total += F.cross_entropy(flat, labels_BL.flatten(), ignore_index=-100, reduction="sum").item()
    return total / sum(len(row.response_ids) for batch in batches for row in batch)


def _plain_answers(case: Case, batch: Sequence[TokenisedRow], temperature: float, seed: int) -> list[list[int]]:
    """`generate` with prompts padded on the left; an answer's EOS, whichever it is, stands as -1."""
    import torch

    longest = max(len(row.prompt_ids) for row in batch)
    padding = [longest - len(row.prompt_ids) for row in batch]
    padded = [[case.loaded.pad_token_id] * n + list(row.prompt_ids) for n, row in zip(padding, batch, strict=True)]
    mask = [[0] * n + [1] * len(row.prompt_ids) for n, row in zip(padding, batch, strict=True)]
    torch.manual_seed(seed)
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    case.loaded.model.generation_config.max_length = None
    output = case.loaded.model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=case.max_new_tokens,
        no_repeat_ngram_size=NO_REPEAT_NGRAM_SIZE,
        eos_token_id=list(case.eos_token_ids),
        pad_token_id=case.loaded.pad_token_id,
        **(sampled if temperature else {"do_sample": False}),
    )
    return [_until_end(tokens, case.eos_token_ids) for tokens in output[:, longest:].tolist()]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return [*tokens[:place], -1]
    return tokens


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def our_side(case: Case, task: str) -> tuple[float | None, list[list[int]]]:
    """What score and evaluate do with a shard. Evaluation measures the cross entropy on top of what is compared."""
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.models.head import split_model
    from pocl_cli.models.sampling import row_seed
    from pocl_cli.schema import DecodingConfig, HardwareConfig
    from pocl_cli.training.measure import measure_and_generate

    hardware = set_up_hardware(HardwareConfig(**_yaml("hardware/cpu")))
    decoding = DecodingConfig(
        sampling_temperature=TEMPERATURE[task],
        top_p=1.0,
        top_k=0,
        no_repeat_ngram_size=NO_REPEAT_NGRAM_SIZE,
        max_new_tokens=case.max_new_tokens,
    )
    measured, answers = measure_and_generate(
        split_model(case.loaded.model),
        case.rows,
        seeds=[[row_seed(seed, row.id, task) for seed in SEEDS.get(task, [0])] for row in case.rows],
        decoding=decoding,
        eos_token_ids=case.eos_token_ids,
        context_length=case.loaded.context_length,
        num_real_tokens=case.num_real_tokens,
        pad_token_id=case.loaded.pad_token_id,
        hardware=hardware,
    )
    num_tokens = sum(row.num_response_tokens for row in measured)
    cross_entropy = sum(row.cross_entropy * row.num_response_tokens for row in measured) / num_tokens
    ended = [[*one.token_ids, *([-1] if one.ended else [])] for its_answers in answers for one in its_answers]
    return cross_entropy, ended


# ── models and rows ───────────────────────────────────────────────────────────────────────────────────────────────────


def _case(options: argparse.Namespace) -> Case:
    import torch

    from pocl_cli.models.folder import check_model_folder
    from pocl_cli.models.load import load_model
    from pocl_cli.models.source import ModelSource
    from pocl_cli.models.vocabulary import num_real_tokens

    if options.model is not None:
        check_model_folder(options.model)
    # Every process makes the small model anew from one seed: nothing is written, and the weights are the same.
    made = None if options.model else TINY
    source = ModelSource("student", {}, {}, "float32", options.model, options.model, architecture=made)
    if options.layers is not None:
        source = dataclasses.replace(source, layers=options.layers)
    loaded = load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=0.0)
    loaded.model.eval()
    if options.model is None:  # its tokenizer has a few hundred tokens; here the whole output layer counts
        rows = _random_rows(TINY["vocab_size"], options.num_rows)
        return Case(loaded, rows, TINY["vocab_size"], list(TINY_ENDS), options.max_new_tokens)
    rows = _random_rows(num_real_tokens(loaded.tokenizer), options.num_rows)
    if options.rows is not None:
        rows = _rows(options.rows, loaded, options.num_rows)
    ends = sorted(loaded.eos_token_ids)
    return Case(loaded, rows, num_real_tokens(loaded.tokenizer), ends, options.max_new_tokens)


def _random_rows(num_real_tokens: int, num_rows: int) -> list[TokenisedRow]:
    dice, ids = random.Random(0), range(num_real_tokens)
    lengths = [DOLLY_LENGTHS[i % len(DOLLY_LENGTHS)] for i in range(num_rows)]
    parts = [[dice.choices(ids, k=num_tokens) for num_tokens in both] for both in lengths]
    return [TokenisedRow(f"row-{i}", prompt_ids, response_ids) for i, (prompt_ids, response_ids) in enumerate(parts)]


def _rows(path: Path, loaded: LoadedModel, num_rows: int) -> list[TokenisedRow]:
    from pocl_cli.data.sources import load_dataset
    from pocl_cli.data.template import RowEncoder
    from pocl_cli.schema import DatasetConfig

    config = DatasetConfig(**{**_yaml("dataset/local"), "path": str(path), "max_tokens": MAX_TOKENS})
    encoder = RowEncoder(loaded.tokenizer, config.max_tokens, config.max_prompt_tokens, config.long_prompts)
    encoded = encoder.encode_batch(load_dataset(config).records)
    rows = [row for row in encoded if isinstance(row, TokenisedRow)][:num_rows]
    if len(rows) < num_rows:
        fix = "give a file with more of them, or a smaller --num-rows"
        raise DataError(f"{len(rows)} usable rows", where=str(path), why=f"{num_rows} are wanted", fix=fix)
    return rows


def _yaml(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


# ── command line and table ────────────────────────────────────────────────────────────────────────────────────────────


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of scoring and of answering, transformers' way and ours.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: a small one made here")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows to take; default: random tokens")
    parser.add_argument("--layers", type=int, help="layers of the model that are kept (default: all)")
    parser.add_argument("--num-rows", type=int, default=32, help="rows (32)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of an answer (64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats (3)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    options = parser.parse_args(arguments)
    for name in ("num_rows", "max_new_tokens", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.rows is not None and options.model is None:
        parser.error("--rows needs --model, whose tokenizer reads them")
    return options


def disagreements(reference: Measurement, ours: Measurement) -> list[str]:
    """In what the two sides differ by more than rounding or chance explain."""
    found = []
    entropies = [one.cross_entropy for one in (reference, ours) if one.cross_entropy is not None]
    if len(entropies) == 2 and not abs(entropies[1] / entropies[0] - 1) <= CROSS_ENTROPY_TOLERANCE:
        found.append(f"{ours.task}: cross entropy {entropies[0]} and {entropies[1]}")
    deviation = (reference.length_deviation**2 + ours.length_deviation**2) ** 0.5
    expected = max(4 * deviation / ours.num_answers**0.5, 0.02 * reference.mean_length)
    if abs(reference.mean_length - ours.mean_length) > expected:
        found.append(f"{ours.task}: answers of {reference.mean_length:.1f} and {ours.mean_length:.1f} tokens")
    return found


def show(pairs: Sequence[tuple[Measurement, Measurement]], options: argparse.Namespace) -> None:
    """Prints and draws two rows a task; the ratio is of tokens per second of wall time, ours divided by the plain."""
    table = "generation" + ("" if options.model is None else f"-{options.model.name}-{options.layers or 'all'}-layers")
    first = pairs[0][0]
    title = (
        f"Scoring {first.num_rows} rows, and answering them with {len(SEEDS['evaluate'])} seeds; at most "
        f"{options.max_new_tokens} new tokens, medians of {options.repeats}; ratio = ours / reference, in tokens/s"
    )
    results.print_about(table, title, num_threads=first.num_threads)
    drawn: list[dict[str, object]] = []
    for pair in pairs:
        speeds = [one.num_tokens / one.seconds for one in pair]
        for one, speed, ratio in zip(pair, speeds, (None, speeds[1] / speeds[0]), strict=True):
            drawn.append(
                {
                    "task": one.task,
                    "formulation": one.formulation,
                    "seconds": one.seconds,
                    "cpu_seconds": one.cpu_seconds,
                    "tokens": one.num_tokens,
                    "mean_length": one.mean_length,
                    "cross_entropy": one.cross_entropy,
                    "tokens/s": speed,
                    "ratio": ratio,
                }
            )
            results.print_row(table, **drawn[-1])
    tables.results_table(title, [results.heading(one) for one in drawn[0]], [list(row.values()) for row in drawn])


if __name__ == "__main__":
    entry.run(main)
