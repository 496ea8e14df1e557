"""Seconds and memory of `pocl partition`: the real command on made-up scores of more and more rows.

    python benchmarks/partition.py                                          a thousand rows to ten million
    python benchmarks/partition.py --rows 1000000 --difficulty rouge_l      one size, another difficulty

Standard output has the JSON lines of a table, which comes last, on standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import entry
import results
from pocl_cli import tables
from pocl_cli.errors import ArtifactError

# This process stays small: a system may count a parent's memory towards the peak of its child.
if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ROWS = (10**3, 10**4, 10**5, 10**6, 10**7)
DIFFICULTIES = ("rrf", "cross_entropy", "rouge_l")
NUM_SUBSETS = 4
# Hex digits of made-up texts: random ones compress by half, about as English does.
TEXT_DIGITS = 160
ROWS_AT_ONCE = 1 << 17
COMMAND = [sys.executable, "-m", "pocl_cli.cli"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one command took, from the start of its process to the end.

    Attributes:
        seconds: wall time; `cpu_seconds` is that of all threads, in user and in system mode.
        peak_gb: 10⁹ bytes, of the whole life of the process: interpreter and libraries are in it.
        scores_gb: 10⁹ bytes, the size of the file that it ranks.
    """

    num_rows: int
    difficulty: str
    seconds: float
    cpu_seconds: float
    peak_gb: float
    scores_gb: float
    num_cores: int | None


def main(arguments: Sequence[str]) -> int:
    """Measures every size and draws the table. Returns the exit code."""
    options = _options(arguments)
    found = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="pocl-partition-") as folder:
            found.append(measure(num_rows, options.difficulty, Path(folder)))
        print(f"{num_rows} rows: {found[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    show(found)
    return 0


def measure(num_rows: int, difficulty: str, folder: Path) -> Measurement:
    """Makes scores below `folder`, runs `pocl partition` on them, and looks at what it made.

    Raises:
        ArtifactError: the command failed, or its partition does not hold every row.
    """
    overrides = [
        "experiment=demo",
        "student.experiment=null",
        "student.architecture={model_type: gpt2, hidden_size: 16, n_layer: 1, n_head: 2, n_positions: 512}",
        "student.tokenizer=toy",
        "dataset=local",
        f"dataset.path={folder}/rows.jsonl",
        f"difficulty={difficulty}",
        f"curriculum.stages={NUM_SUBSETS}",
        f"paths.outputs={folder}/outputs",
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        scores_bytes = pool.submit(make_scores, num_rows, overrides, folder).result()
    command = [*COMMAND, "partition", *overrides]
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        why = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip()
        fix = "see what it says"
        raise ArtifactError(f"exit code {process.returncode}", where=shlex.join(command), why=why, fix=fix)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = Path((folder / "stdout").read_text(encoding="utf-8").strip())
        pool.submit(check_partition, folder / made / "partition.parquet", num_rows).result()
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measurement(
        num_rows=num_rows,
        difficulty=difficulty,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_gb=peak / 1e9,
        scores_gb=scores_bytes / 1e9,
        num_cores=os.cpu_count(),
    )


# ── in processes of their own ─────────────────────────────────────────────────────────────────────────────────────────


def make_scores(num_rows: int, overrides: Sequence[str], folder: Path) -> int:
    """Commits the scores artifact that `overrides` address, made from random numbers. Returns the file's bytes."""
    import numpy as np
    import pyarrow.parquet as pq
    from hydra import initialize_config_dir

    from pocl_cli.config import compose_run, conf_dir
    from pocl_cli.steps.chain import Chain

    # The file decides the artifact's id; its rows are read by whoever measures, not by whoever ranks.
    (folder / "rows.jsonl").write_text('{"instruction": "say yes", "output": "yes"}\n', encoding="utf-8")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        run = compose_run("partition", overrides)
    chain = Chain(run)
    dice = np.random.default_rng(0)
    with chain.store.open_work(chain.score_key("student")) as work:
        path = work.path / "scores.parquet"
        sizes = [min(ROWS_AT_ONCE, num_rows - start) for start in range(0, num_rows, ROWS_AT_ONCE)]
        first = random_scores(sizes[0], dice)
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for size in sizes[1:]:
                writer.write_table(random_scores(size, dice))
        num_bytes = path.stat().st_size
        work.commit(config=run.resolved, inputs={}, command=run.command, seed=None)
    return num_bytes


def random_scores(num_rows: int, dice: np.random.Generator) -> pa.Table:
    """Rows as a student leaves them: every hundredth the copy of another, many with no word of the answer right."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = _hex_texts(num_rows, 16, dice)
    is_copy = pa.array(np.arange(num_rows) % 100 == 1)
    before = pa.concat_arrays([ids[:1], ids[:-1]])
    prompt, response, answer = (dice.integers(5, 200, num_rows, dtype=np.int32) for _ in range(3))
    common = np.maximum(0, (dice.uniform(-0.3, 0.7, num_rows) * np.minimum(response, answer)).astype(np.int64))
    return pa.table(
        {
            "id": pc.if_else(is_copy, pc.binary_join_element_wise(before, "-2", ""), ids),
            "num_prompt_tokens": prompt,
            "num_response_tokens": response,
            # A model's number has 24 bits: among ten million rows many are equal.
            "cross_entropy": dice.gamma(4, 0.7, num_rows).astype(np.float32).astype(np.float64),
            "generation": _hex_texts(num_rows, TEXT_DIGITS, dice),
            "rouge_l": 2 * common / (response + answer),
            "instruction": _hex_texts(num_rows, TEXT_DIGITS, dice),
        }
    )


def _hex_texts(num_rows: int, num_digits: int, dice: np.random.Generator) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    digits = np.frombuffer(dice.bytes(num_rows * num_digits // 2).hex().encode(), dtype=np.uint8)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * num_digits
    return pa.StringArray.from_buffers(num_rows, pa.py_buffer(offsets), pa.py_buffer(digits))


def check_partition(path: Path, num_rows: int) -> None:
    """Raises ArtifactError where the partition does not hold `num_rows` ranks in subsets of like size."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["difficulty_rank", "subset"])
    ranks, sizes = table["difficulty_rank"].to_numpy(), np.bincount(table["subset"].to_numpy())
    if not np.array_equal(ranks, np.arange(1, num_rows + 1)) or sizes[0] != num_rows // NUM_SUBSETS:
        why = f"it has {len(ranks)} rows in subsets of {sizes.tolist()}"
        raise ArtifactError("the partition is wrong", where=str(path), why=why, fix="run the tests")


# ── command line and table ────────────────────────────────────────────────────────────────────────────────────────────


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and memory of pocl partition.")
    shown = ", ".join(f"{num_rows:,}" for num_rows in ROWS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="N", help=f"sizes ({shown})")
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default="rrf", help="what ranks the rows (rrf)")
    options = parser.parse_args(arguments)
    if min(options.rows) < NUM_SUBSETS:
        parser.error(f"--rows must be at least {NUM_SUBSETS}, a row for each subset")
    return options


def show(found: Sequence[Measurement]) -> None:
    """Prints and draws a row a size."""
    title = f"pocl partition difficulty={found[0].difficulty}: a whole command, {found[0].num_cores} cores"
    results.print_about(f"partition-{found[0].difficulty}", title)
    drawn: list[dict[str, object]] = [
        {
            "rows": one.num_rows,
            "seconds": one.seconds,
            "cpu_seconds": one.cpu_seconds,
            "peak_gb": one.peak_gb,
            "scores_gb": one.scores_gb,
        }
        for one in found
    ]
    for row in drawn:
        results.print_row(f"partition-{found[0].difficulty}", **row)
    tables.results_table(title, [results.heading(one) for one in drawn[0]], [list(row.values()) for row in drawn])


if __name__ == "__main__":
    entry.run(main)
