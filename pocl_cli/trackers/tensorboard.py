"""TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.redaction import scrub_values
from pocl_cli.registry import trackers
from pocl_cli.trackers import TrackerRun, numbers, require_package

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@trackers.register("tensorboard")
@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files in `tensorboard/` of the run's folder; `tensorboard --logdir outputs` shows them."""

    def check(self) -> None:
        require_package("tensorboard", extra="tensorboard")

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        self.check()
        return _EventFiles(run_folder / "tensorboard", json.dumps(scrub_values(config), indent=2, default=str))


class _EventFiles(TrackerRun):
    def __init__(self, folder: Path, config: str) -> None:
        self._folder, self._config = folder, config
        self._writer: SummaryWriter | None = None

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._writer is None:
            self._writer = self._start(step)
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _start(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps since its checkpoint: TensorBoard forgets the first telling of them.
        writer = SummaryWriter(str(self._folder), purge_step=step)
        # Four spaces make the JSON a code block in TensorBoard's Markdown.
        writer.add_text("config", "    " + self._config.replace("\n", "\n    "), global_step=step)
        return writer
