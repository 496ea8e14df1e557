"""Depth pruning: a student made of some of a model's decoder layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pocl_cli.errors import ConfigError

_PLAIN = (bool, int, float, str, type(None))
# Not part of what a layer computes: how it is run, or where it came from.
_STATE = {"training", "gradient_checkpointing", "gradient_checkpointing_func", "name_or_path"}


def kept_layers(layers: int | Sequence[int], num_layers: int) -> list[int]:
    """Indices of the layers to keep: `layers` of `num_layers`, evenly spaced from first to last, or those listed.

    One layer alone is the first. Raises ConfigError where an index is out of range or listed twice.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= num_layers:
            raise ConfigError(
                f"student.layers={layers} is out of range",
                why=f"the model has {num_layers} layers",
                fix=f"choose 1 to {num_layers}",
            )
        steps = max(layers - 1, 1)
        return [(2 * place * (num_layers - 1) + steps) // (2 * steps) for place in range(layers)]  # rounded half up
    chosen = list(layers)
    if not chosen or any(not 0 <= index < num_layers for index in chosen) or len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"student.layers={chosen} is not a list of layers",
            why=f"the model has the layers 0 to {num_layers - 1}, each of which can be kept once",
            fix="list the indices to keep, or give their number",
        )
    return sorted(chosen)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Takes all other decoder layers out of `model`, in place, and returns it. Its configuration follows.

    Args:
        model: a decoder-only model of transformers.
        layers: how many to keep, evenly spaced (the first and the last always), or the indices of those to keep.

    Raises:
        ConfigError: `layers` is out of range, or the architecture ties a layer's kind to its place, so that the pruned
            model could not be loaded again as it is.
    """
    num_layers = _text_config(model.config).num_hidden_layers
    kept = kept_layers(layers, num_layers)
    if len(kept) == num_layers:
        return model
    found = _decoder_stack(model)
    if found is None:
        raise ConfigError(
            f"student.layers cannot prune a model of type {model.config.model_type!r}",
            why=f"no list of its {num_layers} decoder layers was found in it",
            fix="set student.layers to null, or choose another architecture",
        )
    parent, name = found
    stack = getattr(parent, name)
    setattr(parent, name, nn.ModuleList([stack[index] for index in kept]))
    for place, layer in enumerate(getattr(parent, name)):
        _renumber(layer, kept[place], place)
    _shorten(_text_config(model.config), kept, num_layers)
    _check_rebuilt(model, kept)
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `model` in order; none where it keeps them in another way than a list."""
    found = _decoder_stack(model)
    return list(getattr(*found)) if found else []


def pruned_config(config: PreTrainedConfig, layers: int | Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` as `keep_layers` would leave it. Raises ConfigError where `layers` is out of range."""
    config = copy.deepcopy(config)
    text = _text_config(config)
    kept = kept_layers(layers, text.num_hidden_layers)
    _shorten(text, kept, text.num_hidden_layers)
    return config


def _text_config(config: PreTrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def _decoder_stack(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module and attribute that hold the decoder layers: the largest list of as many modules as it has layers."""
    num_layers = _text_config(model.config).num_hidden_layers
    found = [
        (sum(parameter.numel() for parameter in child.parameters()), -place, parent, name)
        for place, parent in enumerate(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    return max(found, key=lambda entry: entry[:2])[2:] if found else None


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    """Gives a layer's modules their new place: a key-value cache is addressed by it."""
    for module in layer.modules():
        for name in ("layer_idx", "layer_id", "layer_number", "block_idx"):
            if getattr(module, name, None) == old:
                setattr(module, name, new)


def _shorten(config: Any, kept: Sequence[int], num_layers: int) -> None:
    """Sets the number of layers, and keeps the entries of the kept ones in every list with one entry a layer."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(config, name, type(value)(value[index] for index in kept))
    attention_types = getattr(config, "attention_types", None)
    if attention_types is not None and hasattr(config, "attention_layers"):  # GPT-Neo derives the second from the first
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(kept)


def _check_rebuilt(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Compares the pruned model with one that its configuration alone describes, as a later load would build it."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            rebuilt = type(model)(config)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise _tied_to_place(model, kept, str(error)) from error
    here, there = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name in sorted(here.keys() | there.keys()):
        mine, theirs = here.get(name), there.get(name)
        if mine is None or theirs is None or type(mine) is not type(theirs):
            raise _tied_to_place(model, kept, f"{name} would be {type(theirs).__name__}, not {type(mine).__name__}")
        changed = _plain_attributes(mine).items() ^ _plain_attributes(theirs).items()
        if changed:
            raise _tied_to_place(model, kept, f"{name}.{min(changed, key=str)[0]} would differ")
    shapes = [{name: value.shape for name, value in part.state_dict().items()} for part in (model, rebuilt)]
    if shapes[0] != shapes[1]:
        raise _tied_to_place(model, kept, "its weights would have other shapes")


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _STATE and isinstance(value, _PLAIN)
    }


def _tied_to_place(model: PreTrainedModel, kept: Sequence[int], why: str) -> ConfigError:
    return ConfigError(
        f"student.layers cannot keep the layers {list(kept)} of a model of type {model.config.model_type!r}",
        why=f"its layers differ by their place, and loaded again {why}",
        fix="choose layers that keep the pattern (a list of indices), or another architecture",
    )
