"""Tiny real models and tokenizers, made in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "qwen2": _WIDE,
    "qwen3": {**_WIDE, "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "mistral": {**_WIDE, "sliding_window": 6},
    "smollm3": {**_WIDE, "no_rope_layer_interval": 2},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
        "max_position_embeddings": 64,
    },
    "falcon_h1": {**_WIDE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "deepseek_v3": {
        **_WIDE,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    "recurrent_gemma": {**_WIDE, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
}


def build_tiny(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model with weights large enough to make its answers vary, in evaluation mode."""
    values = {**_COMMON, **ARCHITECTURES[model_type], **overrides}
    config = AutoConfig.for_model(model_type, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    return build_tiny


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A Llama with the toy tokenizer, as `save_pretrained` writes them."""
    from pocl_cli.models.toy_tokenizer import build_toy_tokenizer

    folder = tmp_path / "tiny-llama"
    tokenizer = build_toy_tokenizer()
    build_tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
