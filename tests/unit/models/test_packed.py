from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pocl_cli.models.packed import packed_linears

Tiny = Callable[..., PreTrainedModel]
IDS = torch.arange(3, 63).view(4, 15)


def logits(model: PreTrainedModel, num_rows: int = 4) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:num_rows], use_cache=False).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_packed_linears_of_a_float32_model_then_give_its_logits_up_to_rounding(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    plain = logits(model)
    with packed_linears(model):
        changed = [module for module in model.modules() if "forward" in vars(module)]
        packed, alone = logits(model), logits(model, 1)
    assert len(changed) > 4
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    torch.testing.assert_close(alone, plain[:1], rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_packed_linears_when_left_by_an_error_then_the_model_computes_with_its_weights_again(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(KeyboardInterrupt), packed_linears(model):
        raise KeyboardInterrupt
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not logits(model).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_linears_of_another_precision_then_change_nothing(tiny: Tiny, dtype: torch.dtype) -> None:
    model = tiny("gpt2").to(dtype)
    plain = logits(model)
    with packed_linears(model):
        assert torch.equal(logits(model), plain)
