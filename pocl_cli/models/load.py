"""From a source to a model and tokenizer in memory. Never runs code that a file names, never reads a pickle.

A source whose weights are pickled is converted first (`models.pickled`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from pocl_cli import faults
from pocl_cli.errors import ArtifactError, ConfigError, ResourceError
from pocl_cli.models import folder, hub
from pocl_cli.models.build import build_config, build_model
from pocl_cli.models.hub import HubCommit
from pocl_cli.models.prune import keep_layers, pruned_config
from pocl_cli.models.source import ModelSource
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer. `label` names it in slugs and logs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's EOS, and what the model's generation settings add to it."""
        settings = self.model.generation_config
        more = settings.eos_token_id if settings is not None else None
        listed = more if isinstance(more, list) else [more] if isinstance(more, int) else []
        return frozenset([int(self.tokenizer.eos_token_id), *listed])

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def context_length(self) -> int | None:
        """Positions that the model has; None where nothing bounds them."""
        return context_length(self.model.config)


def load_model(
    source: ModelSource, *, device: torch.device, dtype_override: torch.dtype | None, dropout: float | None
) -> LoadedModel:
    """The model and tokenizer of a source, on `device`.

    Args:
        source: what `models.source` resolved.
        device: where the weights go.
        dtype_override: the weights' dtype, float32 for a student that is trained; None takes the source's.
        dropout: probability for every dropout of the model; 0 switches layer drop off too. None keeps the checkpoint's.

    Raises:
        ConfigError: no decoder-only architecture of transformers, or an option that the architecture does not have.
        ArtifactError: the files are damaged, or do not hold all weights.
        ResourceError: the hub does not give a file, or the device has too little memory.
        SecurityError: loading the model would run code.
    """
    faults.reached("load", source.label)
    tokenizer = load_tokenizer(source)
    if source.weights is None:
        assert source.architecture is not None, "a source has weights or an architecture"
        config = build_config(source.architecture, tokenizer)
        set_dropout(config, dropout)
        model = build_model(config, source.init_seed)
        dtype = _dtype(source.dtype, dtype_override)
        if isinstance(dtype, torch.dtype):
            model = nn.Module.to(model, dtype)
    else:
        model = _load_weights(source, _dtype(source.dtype, dtype_override), dropout)
    if source.layers is not None:
        model = keep_layers(model, source.layers)
    try:
        model = nn.Module.to(model, device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the model {source.label} does not fit into the memory of {device}",
            fix="choose a smaller model or dtype=bfloat16, or another device with hardware.device",
        ) from error
    return LoadedModel(model.train(False), tokenizer, source.label)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The source's tokenizer. Without a pad token it pads with EOS: what is padding is told by lengths, never by id.

    Raises:
        ConfigError: it has no EOS token.
        ArtifactError, ResourceError, SecurityError: as `load_model`.
    """
    if source.tokenizer is None:
        return build_toy_tokenizer()
    name, options = _reference(source.tokenizer, weights=False)
    with _explained(source.tokenizer, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no EOS token",
            where=_shown(source.tokenizer),
            why="a response ends with it",
            fix="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration that the loaded model will have, without its weights. Raises as `load_model`."""
    if source.weights is None:
        assert source.architecture is not None, "a source has weights or an architecture"
        return build_config(source.architecture, load_tokenizer(source))
    config = _read_config(source.weights, weights=False)
    return config if source.layers is None else pruned_config(config, source.layers)


def read_skeleton(source: ModelSource) -> PreTrainedModel:
    """The loaded model's parts without memory for their weights (on the device `meta`). Raises as `load_model`."""
    config = read_config(source)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        if source.weights is None:
            return build_model(config, source.init_seed)
        with _explained(source.weights, folder.CONFIG):
            model: PreTrainedModel = auto.from_config(config)
    return model


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of positions of a model; None where nothing bounds them (ALiBi, recurrent models)."""
    text = config.get_text_config(decoder=True)
    bounds = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((bound for bound in bounds if isinstance(bound, int)), None)


def check_context(config: PreTrainedConfig, max_tokens: int) -> None:
    """Raises ConfigError where the model has fewer positions than `max_tokens`, prompt and response together."""
    bound = context_length(config)
    if bound is not None and bound < max_tokens:
        raise ConfigError(
            f"{max_tokens} tokens do not fit into the model's context",
            where=config.name_or_path or config.model_type,
            why=f"it has {bound} positions",
            fix=f"lower dataset.max_tokens, or max_prompt_tokens plus max_new_tokens, to {bound} or less",
        )


def set_dropout(config: PreTrainedConfig, probability: float | None) -> None:
    """Sets every dropout probability of a configuration; 0 switches layer drop off too. None changes nothing.

    Raises ConfigError where the architecture has no dropout and a positive one is asked for.
    """
    if probability is None:
        return
    text = config.get_text_config(decoder=True)
    numbers = [name for name, value in vars(text).items() if "drop" in name and isinstance(value, int | float)]
    layer_drops = {name for name in numbers if "layerdrop" in name}
    dropouts = [name for name in numbers if name not in layer_drops]
    if probability > 0 and not dropouts:
        raise ConfigError(
            f"student.dropout={probability} has no effect",
            why=f"a model of type {config.model_type!r} has no dropout",
            fix="set student.dropout to null or 0",
        )
    for name in [*dropouts, *(layer_drops if probability == 0 else ())]:
        setattr(text, name, probability)


def _load_weights(source: ModelSource, dtype: torch.dtype | str, dropout: float | None) -> PreTrainedModel:
    assert source.weights is not None, "a model made from nothing has no weights to load"
    assert not source.pickled, "pickled weights are converted first"
    config = _read_config(source.weights, weights=True)
    set_dropout(config, dropout)
    name, options = _reference(source.weights, weights=True)
    silence: Any = transformers_logging.disable_progress_bar
    silence()
    auto: Any = AutoModelForCausalLM
    with _explained(source.weights, "the weights"):
        model, report = auto.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            # Where peft is installed, adapters are looked for with options of their own, at the hub by default.
            adapter_kwargs={"local_files_only": True},
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ArtifactError(
            f"{len(missing)} weights of the model are missing",
            where=_shown(source.weights),
            why=f"{missing[0]} among them; they would be random",
            fix="copy or download the model again",
        )
    loaded: PreTrainedModel = model
    return loaded


def _read_config(at: Path | HubCommit, *, weights: bool) -> PreTrainedConfig:
    name, options = _reference(at, weights=weights)
    with _explained(at, folder.CONFIG):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **options)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or _is_encoder(config):
        raise ConfigError(
            f"a model of type {config.model_type!r} is no decoder-only language model",
            where=_shown(at),
            why="distillation here needs a model that predicts the next token",
            fix="choose a causal language model (gpt2, opt, llama, qwen2, …)",
        )
    return config


def _is_encoder(config: PreTrainedConfig) -> bool:
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    return bidirectional or config.is_encoder_decoder


def _reference(at: Path | HubCommit, *, weights: bool) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given, once the files are here and checked. It must not reach for the network."""
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if isinstance(at, HubCommit):
        hub.fetch(at, weights=weights)
        return at.repo_id, {**safe, "revision": at.commit, "cache_dir": constants.HF_HUB_CACHE}
    return str(at), safe


def _dtype(configured: str, override: torch.dtype | None) -> torch.dtype | str:
    if override is not None:
        return override
    chosen: torch.dtype | str = configured if configured == "auto" else getattr(torch, configured)
    return chosen


@contextmanager
def _explained(at: Path | HubCommit, part: str) -> Iterator[None]:
    """Turns what transformers raises for files that it cannot use into an ArtifactError."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ArtifactError(
            f"cannot load {part}",
            where=_shown(at),
            why=" ".join(lines[:2]) or type(error).__name__,
            fix="copy or download the model again, or choose another one",
        ) from error


def _shown(at: Path | HubCommit) -> str:
    return f"{at.repo_id}@{at.commit[:12]}" if isinstance(at, HubCommit) else str(at)
