"""Low-rank adapters (LoRA, arXiv 2106.09685) in a student, by the package peft: an extra.

The adapters live inside the model, whose other weights are frozen: backbone and output head are used as before.
"""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl_cli.artifacts import durable
from pocl_cli.errors import ConfigError
from pocl_cli.schema import LoraConfig

# peft's names of the files of an adapter.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def require_peft() -> None:
    """Raises ConfigError where the package is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "student.lora needs the package peft",
            why="it is not installed",
            fix="pip install 'pocl-cli[peft]', or set student.lora.rank=null",
        ) from error


class Adapters:
    """The adapters of a model, which alone are trained from now on. At first they change nothing.

    Args:
        model: gets adapters in place.
        config: `student.lora`, with a rank.
        seed: of the adapters' first weights.

    Raises:
        ConfigError: peft is missing, or the named layers are not in the model, or they are no linear layers inside it.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
        require_peft()
        import peft

        assert config.rank, "adapters have a rank"
        self._ends = (model.get_input_embeddings(), model.get_output_embeddings())
        named = config.target_modules
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear" if named is None else list(named),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers for things by names of earlier releases.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            try:
                self._adapted: Any = peft.get_peft_model(model, settings)
            except ValueError as error:
                raise _unfit(named, str(error).splitlines()[0]) from error
        if (model.get_input_embeddings(), model.get_output_embeddings()) != self._ends:
            raise _unfit(named, "embeddings and the output head stay as they are")

    def write(self, folder: Path) -> None:
        """Writes the adapters into `folder`, where peft's `from_pretrained` finds them."""
        from peft import get_peft_model_state_dict

        durable.remove_tree(folder)
        durable.make_folder(folder)
        tensors = get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
        durable.write_safetensors(folder / WEIGHTS, {name: value.detach() for name, value in tensors.items()})
        settings = {**self._adapted.peft_config["default"].to_dict(), "inference_mode": True}
        # Sets have another order in every process.
        plain = json.loads(json.dumps(settings, default=_plain))
        durable.write_json(folder / CONFIG, plain)

    def merge(self) -> None:
        """Adds the adapters' products to the weights; the model is an ordinary one again."""
        self._adapted.merge_and_unload()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else sorted(value)


def _unfit(named: tuple[str, ...] | None, why: str) -> ConfigError:
    shown = "null" if named is None else f"[{','.join(named)}]"
    return ConfigError(
        f"student.lora.target_modules={shown} does not fit the model",
        why=why,
        fix="name linear layers of its decoder layers (q_proj, v_proj, …), or null for all of them",
    )
