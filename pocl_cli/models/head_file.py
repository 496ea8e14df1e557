"""An output head in two files, so that stored hidden states become logits without the model that they came from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pocl_cli.artifacts import durable
from pocl_cli.models.head import OutputHead

WEIGHTS, SETTINGS = "head.safetensors", "head.json"


def is_plain(head: OutputHead) -> bool:
    """Whether the head is one matrix, a bias, a scale and a cap: then two files hold all of it."""
    return type(head.projection) is nn.Linear


def write_head(folder: Path, head: OutputHead) -> None:
    """Writes a plain head. Raises ResourceError."""
    projection = head.projection
    assert isinstance(projection, nn.Linear), "only a plain head can be written"
    tensors = {"weight": projection.weight}
    if projection.bias is not None:
        tensors["bias"] = projection.bias
    durable.write_safetensors(folder / WEIGHTS, tensors)
    settings = {
        "num_logits": head.num_logits,
        "multiplier": head.multiplier,
        "divisor": head.divisor,
        "soft_cap": head.soft_cap,
        "has_bias": projection.bias is not None,
    }
    durable.write_json(folder / SETTINGS, settings)


def read_head(folder: Path, device: torch.device) -> OutputHead:
    """The head that `write_head` wrote, frozen; the files have been verified before."""
    settings = json.loads((folder / SETTINGS).read_bytes())
    # Cloned: a mapped tensor is aligned otherwise than one in memory, and sums may then be rounded otherwise.
    tensors = {name: value.clone().to(device) for name, value in load_file(folder / WEIGHTS).items()}
    out_features, in_features = tensors["weight"].shape
    # Without storage, so that no weights are drawn only to be replaced: the random state is left alone.
    projection = nn.Linear(in_features, out_features, bias=settings["has_bias"], device="meta")
    projection.load_state_dict(tensors, assign=True)
    head = OutputHead(
        projection,
        settings["num_logits"],
        multiplier=settings["multiplier"],
        divisor=settings["divisor"],
        soft_cap=settings["soft_cap"],
    )
    return head.eval().requires_grad_(False)
