"""Rows in one sequence or side by side: no row sees another, and only architectures that allow for it are packed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from pocl_cli.models.attention import recompute_layers
from pocl_cli.models.batch import make_batch
from pocl_cli.models.head import HeadedModel, split_model

VOCABULARY = 50
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
NO_DROPOUT = {"dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PACKED = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gpt2": {**COMMON, **NO_DROPOUT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {
        **COMMON,
        **NO_DROPOUT,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
}
PADDED = {
    "mistral": {**LLAMA, "sliding_window": 4},  # attention reaches back four tokens only
    "bloom": {**COMMON, "hidden_size": 16, "n_layer": 2, "n_head": 2},  # positions are counted from the mask
    "mamba": {**COMMON, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},  # a state runs through the rows
    "gemma2": {**LLAMA, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4},  # caps attention scores
}


def make(model_type, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def rows_of(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def batch_of(rows):
    return make_batch([str(i) for i in range(len(rows))], rows, [range(1, len(row)) for row in rows], [])


@pytest.mark.parametrize("model_type", PACKED)
def test_hidden_states_in_both_layouts_equal_each_row_by_itself_with_the_gradient_of_every_parameter(model_type):
    model, rows = make(model_type, PACKED[model_type]), rows_of(7, 3, 5, 11)
    headed, batch = split_model(model), batch_of(rows)

    def one_by_one():
        return torch.cat([model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, 1:] for row in rows])

    gradients = []
    for hidden_states in (
        one_by_one,
        lambda: headed.hidden_states(batch),
        lambda: headed.padded_hidden_states(batch.padded()),
    ):
        headed.zero_grad()
        hidden = hidden_states()
        hidden.square().sum().backward()
        gradients.append([hidden.detach(), *(p.grad.clone() for p in headed.parameters() if p.grad is not None)])

    assert headed.packs
    for plain, packed, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(padded, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", PACKED)
def test_row_packed_with_others_does_not_change_with_them_by_a_bit(model_type):
    headed, (row, *others) = split_model(make(model_type, PACKED[model_type])), rows_of(7, 5, 5, 5)

    with torch.no_grad():
        one, other = (headed.hidden_states(batch_of([others[i], row, others[2]]))[4:10] for i in (0, 1))

    assert torch.equal(one, other)


@pytest.mark.parametrize("model_type", PADDED)
def test_architecture_that_would_let_rows_see_each_other_is_padded(model_type):
    headed = split_model(make(model_type, PADDED[model_type]))

    assert not headed.packs


@pytest.mark.parametrize("model_type", PACKED)
@pytest.mark.parametrize("packs", [True, False])
def test_model_that_recomputes_its_layers_has_the_same_gradients_to_the_bit(model_type, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(HeadedModel, "packs", False)
    model, batch = make(model_type, PACKED[model_type]), batch_of(rows_of(7, 3, 5))
    headed = split_model(model)
    model.train()
    runs = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))

    headed.hidden_states(batch).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.base_model.parameters()]
    assert len(runs) == 2
    model.zero_grad()
    recompute_layers(model)
    headed.hidden_states(batch).square().sum().backward()

    assert len(runs) == 2 + 2 * 2, "each layer ran twice"
    for parameter, gradient in zip(model.base_model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_model_after_a_packed_pass_has_its_own_attention_again(tmp_path):
    model = make("llama", LLAMA)
    before = model.config._attn_implementation

    split_model(model).hidden_states(batch_of(rows_of(4, 6)))
    model.save_pretrained(tmp_path)

    assert model.config._attn_implementation == before
    assert "row_by_row" not in (tmp_path / "config.json").read_text()
