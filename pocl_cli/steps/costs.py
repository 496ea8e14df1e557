"""What a step takes of the machine's memory and disk, estimated from the configurations of its models alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pocl_cli.models.load import read_skeleton
from pocl_cli.training.checkpoint import KEPT

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.source import ModelSource

# Bytes per parameter of a student in training: weights, gradients and AdamW's two moments in float32.
TRAINING_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, those of its embeddings apart, and what its activations take a token in bytes."""

    parameters: int
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


def sizes_of(source: ModelSource) -> Sizes:
    """Counts the parameters of a model without its weights. Raises as `models.load.load_model`."""
    model = read_skeleton(source)
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()
    text = config.get_text_config()
    # Kept for the backward pass of a decoder layer: about 16 vectors of the hidden size a token, in float32.
    activations = 16 * 4 * text.hidden_size * text.num_hidden_layers
    dtype = str(config.dtype or "float32") if source.dtype == "auto" else source.dtype
    return Sizes(
        sum(p.numel() for p in model.parameters()),
        embeddings.weight.numel(),
        activations,
        2 if dtype.endswith("16") else 4,
    )


def training_memory(student: Sizes, teacher: Sizes | None, hardware: Hardware) -> Bytes:
    """Of a training step; `teacher` is one that runs beside the student."""
    least = student.parameters * TRAINING_BYTES + (teacher.weights if teacher else 0)
    working = student.activation_bytes * hardware.max_tokens_per_micro_batch + hardware.objective_memory_mb * 2**20
    return Bytes(least + working, least)


def training_disk(student: Sizes) -> Bytes:
    """While a student is trained: its checkpoints, and the model."""
    weights = student.parameters * 4
    # While a checkpoint is saved: one more than are kept, each with two moments, a best state for each, and the model.
    return Bytes(weights * (4 * (KEPT + 1) + 1), weights * 4)


def measuring_memory(model: Sizes, hardware: Hardware) -> Bytes:
    """Of scoring and of generation: the weights, and the attention cache of a micro-batch."""
    return Bytes(model.weights + model.activation_bytes // 8 * hardware.max_tokens_per_micro_batch, model.weights)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def multiply_adds(model: Sizes, tokens: Any) -> float:
    """Of a forward pass: the backbone for every token, the output layer for response tokens."""
    return float((model.parameters - model.embedding) * tokens.total + model.embedding * tokens.response)
