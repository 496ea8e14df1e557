"""Backbone + head of real, tiny architectures against the whole model's logits."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_cli.models.batch import make_batch
from pocl_cli.models.head import OutputHead, split_model

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "word_embed_proj_dim": 8,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "do_layer_norm_before": False,
}
SPLIT = {
    "llama": COMMON,
    "gpt2": GPT2,
    "opt": OPT,
    "gemma2": {**COMMON, "final_logit_softcapping": 2.0},
    "cohere": {**COMMON, "logit_scale": 0.25},
    "granite": {**COMMON, "logits_scaling": 4.0},
    "falcon_h1": {
        **COMMON,
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
    },
}
# Its output layer has a transformation before the embedding matrix, so the head alone cannot give its logits.
WHOLE = {"bert": {**COMMON, "is_decoder": True}}


def make(model_type, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**{**SPLIT, **WHOLE}[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Logits of some size, so that a cap bends them.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def three_rows():
    """Rows of 9, 6 and 4 tokens, of which the first two are not selected."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in (9, 6, 4)]
    return make_batch("abc", rows, [range(2, len(row)) for row in rows], [])


def plain_logits(model, batch):
    """The selected logits of every row by itself."""
    rows = batch.input_ids_T.split(batch.lengths)
    return torch.cat([model(input_ids=row[None]).logits[0, 2:] for row in rows])


@pytest.mark.parametrize("model_type", SPLIT)
def test_head_of_backbone_states_equals_the_models_logits(model_type):
    model = make(model_type)
    batch = three_rows()

    headed = split_model(model)

    assert headed.head.projection is model.get_output_embeddings()
    assert headed.num_logits == VOCAB
    with torch.no_grad():
        hidden = headed.hidden_states(batch)
        padded = headed.padded_hidden_states(batch.padded())
        logits = plain_logits(model, batch)
    assert hidden.shape == (4 + 7 + 2, headed.hidden_size)
    torch.testing.assert_close(headed.head(hidden), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(headed.head(padded), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "attribute", "value"),
    [
        ("gemma2", "soft_cap", 2.0),
        ("cohere", "multiplier", 0.25),
        ("granite", "divisor", 4.0),
        ("opt", "multiplier", 1.0),
    ],
)
def test_head_of_an_architecture_with_its_own_last_step_takes_it_over(model_type, attribute, value):
    assert getattr(split_model(make(model_type)).head, attribute) == value


def test_head_where_the_configuration_names_a_cap_that_the_model_ignores_has_none():
    model = make("llama")
    model.config.final_logit_softcapping = 3.0

    assert split_model(model).head.soft_cap is None


def test_head_with_a_cap_that_hardly_bends_the_probe_is_still_found():
    assert split_model(make("gemma2", final_logit_softcapping=10_000.0)).head.soft_cap == 10_000.0


def test_hidden_size_of_a_projected_opt_is_the_projections():
    headed = split_model(make("opt"))

    assert headed.hidden_size == OPT["word_embed_proj_dim"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_split_of_a_model_in_another_dtype_needs_no_fallback(dtype):
    headed = split_model(make("llama").to(dtype))

    assert headed.head.projection is not None


def test_split_of_a_model_that_no_head_reproduces_falls_back_to_its_logits_with_a_warning(caplog):
    model = make("bert")
    batch = three_rows()

    with caplog.at_level(logging.WARNING, logger="pocl"):
        headed = split_model(model)

    assert "BertLMHeadModel" in caplog.text
    assert headed.hidden_size == headed.num_logits == VOCAB
    assert list(headed.head.parameters()) == []
    hidden = headed.hidden_states(batch)
    torch.testing.assert_close(headed.head(hidden), plain_logits(model, batch), rtol=1e-5, atol=1e-5)
    hidden.sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_split_of_a_model_that_a_head_reproduces_warns_of_nothing(caplog):
    split_model(make("llama"))

    assert not caplog.records


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradients_through_a_tied_head_equal_those_of_the_whole_model(model_type):
    model = make(model_type, tie_word_embeddings=True)
    reference = copy.deepcopy(model)
    headed = split_model(model)
    batch = three_rows()

    headed.head(headed.hidden_states(batch)).square().sum().backward()
    plain_logits(reference, batch).square().sum().backward()

    assert headed.head.projection.weight is model.get_input_embeddings().weight
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_split_of_a_model_in_training_mode_ignores_dropout_and_leaves_every_mode_as_it_was():
    model = make("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]

    headed = split_model(model)

    assert headed.head.projection is not None
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_of_a_split_model_are_the_models_own():
    model = make("llama", tie_word_embeddings=False)

    ours = {id(parameter) for parameter in split_model(model).parameters()}

    assert ours == {id(parameter) for parameter in model.parameters()}


def test_output_head_with_everything_set_scales_then_caps():
    projection = nn.Linear(4, 6)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    logits = OutputHead(projection, 6, multiplier=3.0, divisor=2.0, soft_cap=0.5)(hidden)

    torch.testing.assert_close(logits, 0.5 * torch.tanh(1.5 * projection(hidden) / 0.5))
