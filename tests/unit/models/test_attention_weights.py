"""The variance of attention weights: that of the model's own weights, whatever rows are beside a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pocl_cli.errors import ConfigError
from pocl_cli.models.attention_weights import attention_variances
from pocl_cli.models.batch import Batch, make_batch

Tiny = Callable[..., PreTrainedModel]
ROWS = [[5, 9, 3, 7, 30, 21, 8, 11, 4], [6, 2, 40], [17, 3, 3, 8, 55]]
FIRST_RESPONSE_TOKEN = (4, 1, 2)


def batch_of(*numbers: int) -> Batch:
    """Some of the rows; the hidden states before the response tokens are selected."""
    rows = [ROWS[number] for number in numbers]
    starts = [FIRST_RESPONSE_TOKEN[number] for number in numbers]
    selected = [range(start - 1, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
    targets = [token for start, row in zip(starts, rows, strict=True) for token in row[start:]]
    return make_batch([str(number) for number in numbers], rows, selected, targets)


def expected(model: PreTrainedModel, number: int) -> list[float]:
    """Of one row, by the weights that transformers hands out."""
    with torch.no_grad():
        outputs: Any = model(torch.tensor([ROWS[number]]), output_attentions=True, use_cache=False)
    weights_HLL = torch.cat([layer[0] for layer in outputs.attentions])
    return [
        weights_HLL[:, place, : place + 1].double().var(dim=-1, correction=0).mean().item()
        for place in range(FIRST_RESPONSE_TOKEN[number] - 1, len(ROWS[number]) - 1)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mistral", "gpt_neo", "qwen3"])
def test_variance_when_rows_are_read_together_then_is_that_of_each_rows_own_weights(
    tiny: Tiny, architecture: str
) -> None:
    model = tiny(architecture).double()
    usual = model.config._attn_implementation

    found = attention_variances(model, batch_of(0, 1, 2))

    assert model.config._attn_implementation == usual
    model.set_attn_implementation("eager")
    wanted = [value for number in range(3) for value in expected(model, number)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)  # weights are float32
    assert min(wanted[:4]) > 1e-4


def test_variance_when_all_tokens_are_attended_to_alike_then_is_zero(tiny: Tiny) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    assert attention_variances(model, batch_of(0, 2)).tolist() == pytest.approx([0.0] * 8, abs=1e-7)


def test_variance_when_each_token_attends_to_itself_alone_then_is_that_of_one_among_all(tiny: Tiny) -> None:
    model = tiny("mistral", sliding_window=1)
    found = attention_variances(model, batch_of(0)).tolist()
    assert found == pytest.approx([(1 - 1 / n) / n for n in (4, 5, 6, 7, 8)], abs=1e-7)


def test_variance_when_layers_have_no_attention_then_is_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ConfigError, match=r"no attention weights.*choose another difficulty"):
        attention_variances(AutoModelForCausalLM.from_config(config), batch_of(0))
