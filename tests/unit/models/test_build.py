from __future__ import annotations

from typing import Any

import pytest
import torch

from pocl_cli.errors import ConfigError
from pocl_cli.models.build import build_config, build_model
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer

TOKENIZER = build_toy_tokenizer()
SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


def test_build_config_takes_the_vocabulary_and_special_tokens_from_the_tokenizer() -> None:
    config = build_config(SMALL, TOKENIZER)
    assert config.vocab_size == len(TOKENIZER)
    assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert config.bos_token_id is None
    assert config.hidden_size == 32


def test_build_config_with_the_names_that_gpt2_uses_is_understood() -> None:
    config = build_config({"model_type": "gpt2", "n_embd": 32, "num_hidden_layers": 2, "n_head": 4}, TOKENIZER)
    assert (config.hidden_size, config.n_layer) == (32, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "t5"}, "unknown model_type 't5'"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"_attn_implementation": "owner/kernel"}, "unknown key"),
        ({"attn_implementation": "owner/kernel"}, "unknown key"),
        ({"auto_map": "x"}, "unknown key"),
        ({"eos_token_id": 3}, "comes from student.tokenizer"),
        ({"vocab_size": 100}, f"the tokenizer has {len(TOKENIZER)} tokens"),
        ({"hidden_size": "wide"}, "the architecture is refused"),
        ({"num_attention_heads": 5}, "the architecture is refused"),
    ],
)
def test_build_config_with_a_mistake_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**SMALL, **change}, TOKENIZER)
    assert message in str(caught.value)


def test_build_config_with_a_larger_vocabulary_keeps_the_padding_rows() -> None:
    assert build_config({**SMALL, "vocab_size": 512}, TOKENIZER).vocab_size == 512


def test_build_model_depends_on_its_seed_alone() -> None:
    config = build_config(SMALL, TOKENIZER)
    torch.manual_seed(1)
    first = build_model(config, 0).state_dict()
    torch.manual_seed(2)
    same, other = build_model(config, 0).state_dict(), build_model(config, 1).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_build_model_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_model(build_config(SMALL, TOKENIZER), 0)
    assert torch.equal(torch.rand(4), expected)


def test_build_model_is_in_float32_with_a_tied_head_where_the_configuration_ties_it() -> None:
    model = build_model(build_config(SMALL, TOKENIZER), 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
