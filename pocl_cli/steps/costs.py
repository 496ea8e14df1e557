"""What a step takes of the machine's memory and disk, estimated from the configurations of its models alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from pocl_cli.models.load import read_skeleton
from pocl_cli.training.checkpoint import KEPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocl_cli.models.device import Hardware
    from pocl_cli.models.source import ModelSource
    from pocl_cli.schema import LoraConfig

# Bytes per parameter of a student in training, in float32: its weight; where it is trained, its gradient and the two
# moments of AdamW besides.
_WEIGHT_BYTES, _GRADIENT_BYTES, _MOMENT_BYTES = 4, 4, 8


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, those of its embeddings and those that are trained, and its activations' bytes a token."""

    parameters: int
    trained: int
    embedding: int
    activation_bytes: int
    weight_bytes: int

    @property
    def weights(self) -> int:
        """Bytes of the weights as they are loaded."""
        return self.parameters * self.weight_bytes


class Bytes(NamedTuple):
    """An estimate, and what is needed in any case: rows, activations and kept copies come on top of it."""

    estimate: int
    least: int


def sizes_of(source: ModelSource, lora: LoraConfig | None = None) -> Sizes:
    """Counts the parameters of a model without its weights; `lora` of a student. Raises as `models.load.load_model`."""
    model = read_skeleton(source)
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()
    text = config.get_text_config()
    # Kept for the backward pass of a decoder layer: about 16 vectors of the hidden size a token, in float32.
    activations = 16 * 4 * text.hidden_size * text.num_hidden_layers
    dtype = str(config.dtype or "float32") if source.dtype == "auto" else source.dtype
    parameters = sum(p.numel() for p in model.parameters())
    adapters = _adapter_parameters(model, lora) if lora is not None and lora.rank else 0
    return Sizes(
        parameters + adapters,
        adapters or parameters,
        embeddings.weight.numel(),
        activations,
        2 if dtype.endswith("16") else 4,
    )


def _adapter_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    assert lora.rank, "there are adapters"
    head = model.get_output_embeddings()
    return sum(
        lora.rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if lora.target_modules is None or name.rpartition(".")[2] in lora.target_modules
    )


def training_memory(student: Sizes, teacher: Sizes | None, hardware: Hardware, num_parts: int = 1) -> Bytes:
    """Of a training step in one process.

    Args:
        student: the whole one.
        teacher: one that runs beside it.
        hardware: of the process.
        num_parts: into how many parts the models are cut (`hardware.parallel=fsdp`). A process has all weights for the
            time of an evaluation, and all gradients until the last micro-batch of a step; moments are never together.
    """
    weights, moments = student.parameters * _WEIGHT_BYTES, student.trained * _MOMENT_BYTES // num_parts
    gradients = student.trained * _GRADIENT_BYTES
    beside = teacher.weights // num_parts if teacher else 0
    working = student.activation_bytes * hardware.max_tokens_per_micro_batch + hardware.objective_memory_mb * 2**20
    estimate = weights + gradients + moments + beside + working
    return Bytes(estimate, weights + gradients // num_parts + moments + beside)


def training_disk(student: Sizes) -> Bytes:
    """While a student is trained: its checkpoints, and the model."""
    weights, trained = student.parameters * _WEIGHT_BYTES, student.trained * _WEIGHT_BYTES
    # While a checkpoint is saved: one more than are kept, each with two moments, a best state for each, and the model.
    return Bytes(trained * 4 * (KEPT + 1) + weights, trained * 3 + weights)


def measuring_memory(model: Sizes, hardware: Hardware) -> Bytes:
    """Of scoring and of generation: the weights, and the attention cache of a micro-batch."""
    return Bytes(model.weights + model.activation_bytes // 8 * hardware.max_tokens_per_micro_batch, model.weights)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def multiply_adds(model: Sizes, tokens: Any) -> float:
    """Of a forward pass: the backbone for every token, the output layer for response tokens."""
    return float((model.parameters - model.embedding) * tokens.total + model.embedding * tokens.response)
