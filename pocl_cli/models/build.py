"""A model made from nothing: an architecture of transformers, a tokenizer's vocabulary, and a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pocl_cli.errors import ConfigError, nearest

_WHERE = "student.architecture"
_FROM_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_config(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration that `architecture` describes, with the tokenizer's special tokens and number of tokens.

    Args:
        architecture: `model_type` and keys of that model's configuration; `vocab_size` may add padding rows.
        tokenizer: gives `vocab_size` where it is not set, and the ids of EOS, BOS and padding.

    Raises:
        ConfigError: unknown model type or key (the nearest one is named), a value that the architecture refuses, or a
            `vocab_size` smaller than the vocabulary.
    """
    values = dict(architecture)
    model_type = values.pop("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        raise _unknown("model_type", str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    for key in values:
        if key in _FROM_TOKENIZER:
            raise ConfigError(f"{_WHERE}.{key} is set", why="it comes from student.tokenizer", fix="remove it")
        if key.startswith("_") or key not in known:
            raise _unknown("key", key, known)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if values.setdefault("vocab_size", num_tokens) < num_tokens:
        raise ConfigError(
            f"{_WHERE}.vocab_size={values['vocab_size']} is too small",
            why=f"the tokenizer has {num_tokens} tokens",
            fix="remove it, or raise it",
        )
    tokens = {key: getattr(tokenizer, key) for key in _FROM_TOKENIZER}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **values, **tokens)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise _refused(error) from error
    return config


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model on the CPU with seeded random weights; the global random state stays as it was.

    Raises:
        ConfigError: the architecture refuses the values.
    """
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise _refused(error) from error
    return model


def _unknown(what: str, name: str, known: Any) -> ConfigError:
    guess = nearest(name, known)
    return ConfigError(
        f"unknown {what} {name!r}",
        where=_WHERE,
        why="it is none of the configuration of this model" if what == "key" else "transformers has no such decoder",
        fix=f"did you mean {guess!r}?" if guess else "look it up in the documentation of transformers",
    )


def _refused(error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = " ".join(lines) or type(error).__name__
    return ConfigError("the architecture is refused", where=_WHERE, why=why, fix="correct its values")
