"""The student in one process: what a step runs, and how its gradients become those of the whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocl_cli.training.sampler import share

if TYPE_CHECKING:
    from pocl_cli.models.batch import Batch
    from pocl_cli.models.teacher import Teacher
    from pocl_cli.records import TokenisedRow
    from pocl_cli.training.objective import ObjectiveOutput
    from pocl_cli.training.parallel import Processes
    from pocl_cli.training.student import StudentWithObjective

# Gradients are summed in groups of so many bytes: fewer calls than parameters, little memory beside the gradients.
BUCKET_BYTES = 2**25


class Replica:
    """A student that is whole in its process, which trains alone.

    The optimizer always works on the parameters of `student`; `module` is what a step calls.
    """

    def __init__(self, student: StudentWithObjective, processes: Processes) -> None:
        self.student, self.processes = student, processes
        self.module: nn.Module = student

    def teach(self, teacher: Teacher | None) -> None:
        """Another teacher from now on; None: for a while nobody, so that the one before can be let go."""
        self.student.teacher = teacher

    def micro_batches(
        self, rows: Sequence[TokenisedRow], split: Callable[[Sequence[TokenisedRow]], list[list[TokenisedRow]]]
    ) -> Iterator[list[TokenisedRow]]:
        """What this process has to work on of a global batch, as `split` divides it. To be gone through to its end."""
        yield from split(share(rows, self.processes.rank, self.processes.size))

    def add_gradients(self, batch: Batch, **terms: Any) -> ObjectiveOutput:
        """Forward and backward of a micro-batch.

        Args:
            batch: its rows.
            terms: what the student's forward pass wants besides.
        """
        output: ObjectiveOutput = self.module(batch, **terms)
        output.loss.backward()
        return output

    def sum_gradients(self) -> None:
        """Makes each gradient that of all processes' micro-batches. Raises WorkerError where a process is gone."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients down to `max_norm` together; the norm that they had. The same in every process."""
        return torch.nn.utils.clip_grad_norm_(self.student.parameters(), max_norm)

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer | None = None, *, changes: bool = False) -> Iterator[None]:
        """Meanwhile the student is an ordinary model, and the state of `optimizer` that of its whole parameters.

        All processes come here together. The optimizer's state need be whole in the first one only: it writes.

        Args:
            optimizer: whose state is wanted as well.
            changes: whether every process puts the same new values into the student, which are to stay.
        """
        yield

    def part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """What the optimizer of this process works on of a `value` for the whole `parameter`."""
        return value

    def make_whole(self) -> None:
        """Ends the training: from now on the student is an ordinary model."""


class SummedReplica(Replica):
    """A student that is whole in each of several processes, which add up their gradients."""

    def __init__(self, student: StudentWithObjective, processes: Processes) -> None:
        super().__init__(student, processes)
        self._trained: list[nn.Parameter] | None = None

    def sum_gradients(self) -> None:
        if self._trained is None:
            self._trained = self._with_gradient(list(self.student.parameters()))
        for parameter in self._trained:
            if parameter.grad is None:  # this process had no row
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in self._trained if parameter.grad is not None]):
            # The places in a bucket are the same in every step of every run: the order of additions may depend on them.
            total = self.processes.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            for gradient, part in zip(bucket, total.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _with_gradient(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that have a gradient in any process: the others stay as they are, as with one process."""
        flags = self.processes.sum(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        return [parameter for parameter, flag in zip(parameters, flags.tolist(), strict=True) if flag]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours together, up to `BUCKET_BYTES`; a larger one is by itself."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.nbytes for one in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
