"""A student of which each process keeps a part of every parameter, its gradient and its optimizer's state (FSDP2).

What is trained is a second module of the same architecture, which torch's `fully_shard` has cut into parts. The
parameters of the student itself hold this process's parts of it, so that an optimizer over them changes the second
module's; and now and then they hold everything, so that the student can be evaluated and saved like any other model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pocl_cli.models.batch import Batch
from pocl_cli.models.prune import decoder_layers
from pocl_cli.models.teacher import Teacher
from pocl_cli.records import TokenisedRow
from pocl_cli.training.objective import ObjectiveOutput
from pocl_cli.training.parallel import Processes, in_touch
from pocl_cli.training.replica import Replica
from pocl_cli.training.sampler import share
from pocl_cli.training.student import StudentWithObjective

# The parts of a flat tensor begin where kernels read fastest, as separate tensors do.
_ALIGNMENT = 64


class ShardedReplica(Replica):
    """One process's part of a student, and of its teacher where that runs in every step."""

    def __init__(self, student: StudentWithObjective, processes: Processes, device: torch.device) -> None:
        super().__init__(student, processes)
        self.module = self._sharded = sharded = _second_student(student)
        mesh = init_device_mesh(device.type, (processes.size,))
        for layer in decoder_layers(sharded.backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        self._parts = [part for part in sharded.modules() if isinstance(part, FSDPModule)]
        for part in self._parts:
            # The loss is divided by the tokens of all processes already: gradients are summed, not averaged.
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        self._shards: dict[Tensor, DTensor] = dict(
            zip(student.parameters(), map(_as_shard, sharded.parameters()), strict=True)
        )
        self._hold_parts()
        self.teach(student.teacher)

    def teach(self, teacher: Teacher | None) -> None:
        self.student.teacher = self._sharded.teacher = teacher
        if teacher is not None and teacher.backbone is not None:
            for layer in decoder_layers(teacher.backbone):
                _FrozenLayer(layer, self.processes)

    def micro_batches(
        self, rows: Sequence[TokenisedRow], split: Callable[[Sequence[TokenisedRow]], list[list[TokenisedRow]]]
    ) -> Iterator[list[TokenisedRow]]:
        """As many in every process: layers are put together from their parts by all processes at the same time.

        Where others have more, this one goes through a row without a response, which has a loss and gradients of 0.
        """
        groups = [split(share(rows, rank, self.processes.size)) for rank in range(self.processes.size)]
        most, own = max(map(len, groups)), groups[self.processes.rank]
        nothing = TokenisedRow("", rows[0].prompt_ids[:1], [])
        for number, group in enumerate([*own, *[[nothing]] * (most - len(own))], start=1):
            # Until the last one, gradients add up whole in each process: one sum over the processes a step.
            self._parts[0].set_requires_gradient_sync(number == most)
            yield group

    def add_gradients(self, batch: Batch, **terms: Any) -> ObjectiveOutput:
        with in_touch(computes=True):
            return super().add_gradients(batch, **terms)

    def sum_gradients(self) -> None:
        # They have been summed in the backward pass of the last micro-batch.
        for parameter, shard in self._shards.items():
            gradient, shard.grad = shard.grad, None
            parameter.grad = gradient.to_local() if isinstance(gradient, DTensor) else None

    def clip_gradients(self, max_norm: float) -> Tensor:
        gradients = [parameter.grad for parameter in self._shards if parameter.grad is not None]
        # Rounded once at the end: the squares of float32 norms need a wider range.
        square = torch.nn.utils.get_total_norm(gradients).double() ** 2
        norm = self.processes.sum(square).sqrt().to(gradients[0].dtype)
        torch.nn.utils.clip_grads_with_norm_(self._shards, max_norm, norm)
        return norm

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer | None = None, *, changes: bool = False) -> Iterator[None]:
        self._hold_everything()
        before = self._gather_state(optimizer) if optimizer is not None else {}
        try:
            yield
            # A process that has nothing to write does not end while the first one writes.
            self.processes.barrier()
            if changes:
                for parameter, shard in self._shards.items():
                    shard.to_local().detach().copy_(self.part(parameter, parameter.detach()))
        finally:
            if optimizer is not None:
                optimizer.state.update(before)
            self._hold_parts()

    def part(self, parameter: Tensor, value: Tensor) -> Tensor:
        if value.ndim == 0:  # the count of steps
            return value
        num_rows = len(self._shards[parameter].to_local())
        # The first processes have so many, the last ones fewer, or none.
        most_rows = math.ceil(len(value) / self.processes.size)
        return value.narrow(0, min(self.processes.rank * most_rows, len(value) - num_rows), num_rows)

    def make_whole(self) -> None:
        self._hold_everything()

    def _hold_everything(self) -> None:
        for parameter, shard in self._shards.items():
            parameter.data = _gathered(shard)

    def _hold_parts(self) -> None:
        for parameter, shard in self._shards.items():
            parameter.data = shard.to_local().detach()

    def _gather_state(self, optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
        """Makes the state of `optimizer` whole in the first process; what this process had of it."""
        before = dict(optimizer.state)
        for parameter, slots in before.items():
            whole = {name: self._whole_moment(value, self._shards[parameter]) for name, value in slots.items()}
            if self.processes.is_first:
                # Beside the weights, a device may have no room for the moments of all parameters.
                optimizer.state[parameter] = {name: value.cpu() for name, value in whole.items()}
        return before

    @staticmethod
    def _whole_moment(part: Tensor, shard: DTensor) -> Tensor:
        if part.ndim == 0:  # the count of steps
            return part
        moment = DTensor.from_local(
            part, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )
        return _gathered(moment)


class _FrozenLayer:
    """Keeps a part of a layer that never changes; the layer is whole while it runs.

    torch's `fully_shard` notes every forward pass until a backward pass comes, and here none ever does.
    """

    def __init__(self, layer: nn.Module, processes: Processes) -> None:
        self._size = processes.size
        self._flats = []
        for dtype in {parameter.dtype: None for parameter in layer.parameters()}:
            parameters = [parameter for parameter in layer.parameters() if parameter.dtype == dtype]
            flat = torch.cat([_padded(parameter.detach().flatten(), _ALIGNMENT) for parameter in parameters])
            part = _padded(flat, processes.size).chunk(processes.size)[processes.rank].clone()
            self._flats.append((part, [(parameter, parameter.shape) for parameter in parameters]))
        layer.register_forward_pre_hook(self._gather)
        layer.register_forward_hook(self._free)
        self._free()

    def _gather(self, *of_hook: object) -> None:
        for part, parameters in self._flats:
            flat = part.new_empty(part.numel() * self._size)
            with in_touch():
                dist.all_gather(list(flat.chunk(self._size)), part)
            start = 0
            for parameter, shape in parameters:
                parameter.data = flat[start : start + shape.numel()].view(shape)
                start += shape.numel() + -shape.numel() % _ALIGNMENT

    def _free(self, *of_hook: object) -> None:
        for part, parameters in self._flats:
            for parameter, _ in parameters:
                parameter.data = part.new_empty(0)


def _second_student(student: StudentWithObjective) -> StudentWithObjective:
    """A copy that has modules and parameters of its own, but all else in common, memory included.

    The configurations are shared because attention is switched through them, and buffers because they may change.
    """
    modules = list(student.modules())
    shared = [student.teacher, student.method, *(getattr(module, "config", None) for module in modules)]
    known = {id(one): one for one in [*shared, *student.buffers()] if one is not None}
    known |= {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in student.parameters()}
    return copy.deepcopy(student, known)


def _as_shard(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor), "every parameter is a part of a sharded module"
    return parameter


def _gathered(shard: DTensor) -> Tensor:
    with in_touch(), torch.no_grad():
        whole: Tensor = shard.full_tensor()
    return whole


def _padded(flat: Tensor, multiple: int) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % multiple))
