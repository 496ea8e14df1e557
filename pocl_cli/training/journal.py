"""What a run writes down as it goes: metrics.jsonl, timings.jsonl, and which rows were consumed when."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_cli.artifacts import durable
from pocl_cli.log import get_logger
from pocl_cli.training.state import TrainingState

CONSUMED = pa.schema([("stage", pa.int32()), ("epoch", pa.int32()), ("step", pa.int64()), ("id", pa.string())])


class Pace(NamedTuple):
    """How fast steps were made; tokens are response tokens."""

    seconds_per_step: float
    tokens_per_second: float


class Waited:
    """When the host last waited for the device, and in which state; `note` goes beside the progress from then on."""

    def __init__(self, state: TrainingState, note: str = "") -> None:
        self.time, self.state, self.note = time.perf_counter(), state, note

    def pace(self, state: TrainingState) -> Pace:
        seconds = time.perf_counter() - self.time
        return Pace(seconds / (state.step - self.state.step), (state.num_tokens - self.state.num_tokens) / seconds)


class Journal:
    """Lines since the last checkpoint are kept in memory and written by `flush`, so that a resumed run repeats none.

    `metrics.jsonl` holds no clock reading: its bytes are a function of the configuration. Those go to `timings.jsonl`.
    """

    def __init__(self, folder: Path, state: TrainingState, *, track: Callable[[Mapping[str, Any], int], None]) -> None:
        self.folder, self.track = folder, track
        self._lines: list[dict[str, Any]] = []
        self._timings: list[dict[str, Any]] = []
        self._consumed: dict[str, list[Any]] = {name: [] for name in CONSUMED.names}
        durable.truncate(folder / "metrics.jsonl", state.metrics_bytes)
        for part in (folder / "consumed").glob("*.parquet"):
            if int(part.stem) > state.step:
                durable.remove_file(part)

    def train_line(self, values: dict[str, Any], *, pace: Pace) -> None:
        """A line of one optimizer step; `pace` is that of the steps since the line before."""
        self._lines.append(values)
        self._timings.append(
            {
                "step": values["step"],
                "seconds": pace.seconds_per_step,
                "response_tokens_per_second": pace.tokens_per_second,
                "time": time.time(),
            }
        )
        self.track(values, values["step"])
        get_logger().debug(
            "step %(step)d: loss %(loss).4f, ce %(ce).4f, kd %(kd).4f, grad_norm %(grad_norm).3f", values
        )

    def dev_line(self, figures: Mapping[str, float], *, step: int, stage: int, epoch: int) -> None:
        """A line of one dev evaluation; its keys start with `dev_`."""
        line = {"step": step, "stage": stage, "epoch": epoch, **figures}
        self._lines.append(line)
        self.track(line, step)
        rouge_l = f"dev ROUGE-L {figures['dev_rouge_l']:.2f}, " if "dev_rouge_l" in figures else ""
        get_logger().info(
            "step %d, stage %d, epoch %d: %sdev cross entropy %.4f",
            step, stage, epoch, rouge_l, figures["dev_cross_entropy"],
        )  # fmt: skip

    def consumed(self, record_ids: Sequence[str], *, stage: int, epoch: int, step: int) -> None:
        """Notes the rows of one global batch, in order."""
        for name, values in zip(CONSUMED.names, ([stage], [epoch], [step]), strict=False):
            self._consumed[name] += values * len(record_ids)
        self._consumed["id"] += record_ids

    def flush(self, step: int) -> int:
        """Makes all lines durable; the size of metrics.jsonl in bytes, which the checkpoint records."""
        path = self.folder / "metrics.jsonl"
        durable.append_jsonl(path, self._lines)
        durable.append_jsonl(self.folder / "timings.jsonl", self._timings)
        if self._consumed["id"]:
            durable.make_folder(self.folder / "consumed")
            part = self.folder / "consumed" / f"{step:08d}.parquet"
            durable.write_parquet(part, pa.table(self._consumed, schema=CONSUMED))
        self._lines, self._timings = [], []
        self._consumed = {name: [] for name in CONSUMED.names}
        return path.stat().st_size

    def close(self) -> None:
        """Joins the parts into consumed.parquet. All lines must have been flushed."""
        assert not self._lines, "close comes after the last flush"
        parts = sorted((self.folder / "consumed").glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(part) for part in parts]) if parts else CONSUMED.empty_table()
        durable.write_parquet(self.folder / "consumed.parquet", table)


class SilentJournal(Journal):
    """That of a process which leaves the writing to another one."""

    def __init__(self) -> None:
        """Touches no file."""

    def train_line(self, values: dict[str, Any], *, pace: Pace) -> None:
        """Notes nothing."""

    def dev_line(self, figures: Mapping[str, float], *, step: int, stage: int, epoch: int) -> None:
        """Notes nothing."""

    def consumed(self, record_ids: Sequence[str], *, stage: int, epoch: int, step: int) -> None:
        """Notes nothing."""

    def flush(self, step: int) -> int:
        """Writes nothing; 0."""
        return 0

    def close(self) -> None:
        """Writes nothing."""
