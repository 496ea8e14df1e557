from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocl_cli.errors import ConfigError
from pocl_cli.models.prune import keep_layers, kept_layers, pruned_config

Tiny = Callable[..., PreTrainedModel]
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 79, 32, 38]])


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        (1, 5, [0]),
        (2, 5, [0, 4]),
        (3, 5, [0, 2, 4]),
        (4, 12, [0, 4, 7, 11]),
        (6, 30, [0, 6, 12, 17, 23, 29]),
        (5, 5, [0, 1, 2, 3, 4]),
        ([3, 0], 5, [0, 3]),
    ],
)
def test_kept_layers_are_evenly_spaced_from_first_to_last(
    layers: int | list[int], num_layers: int, expected: list[int]
) -> None:
    assert kept_layers(layers, num_layers) == expected


def test_kept_layers_of_every_number_hold_both_ends_and_gaps_that_differ_by_one_at_most() -> None:
    for num_layers in range(2, 40):
        for layers in range(2, num_layers + 1):
            kept = kept_layers(layers, num_layers)
            gaps = {after - before for before, after in pairwise(kept)}
            assert (kept[0], kept[-1], len(kept)) == (0, num_layers - 1, layers)
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("layers", [0, 6, [], [5], [-1], [1, 1]])
def test_kept_layers_out_of_range_are_refused(layers: int | list[int]) -> None:
    with pytest.raises(ConfigError, match=r"student\.layers"):
        kept_layers(layers, 5)


@pytest.mark.parametrize("layers", [2, [1, 2]])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen2", "qwen3", "smollm3", "gpt_neo", "falcon_h1"])
def test_keep_layers_then_saved_and_loaded_gives_the_same_logits(
    tiny: Tiny, tmp_path: Path, model_type: str, layers: int | list[int]
) -> None:
    model = tiny(model_type)
    before = logits_of(model)
    pruned = keep_layers(model, layers)
    assert pruned.config.num_hidden_layers == 2
    assert not torch.allclose(logits_of(pruned), before, atol=1e-3)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits_of(pruned))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen2", "qwen3", "smollm3"])
def test_keep_layers_decodes_with_a_cache_as_without(tiny: Tiny, model_type: str) -> None:
    model = keep_layers(tiny(model_type).double(), [1, 3])
    answers = [
        model.generate(TOKENS, do_sample=False, max_new_tokens=10, use_cache=use_cache, eos_token_id=None).tolist()
        for use_cache in (True, False)
    ]
    assert answers[0] == answers[1]


def test_keep_layers_keeps_the_weights_of_the_layers_that_stay(tiny: Tiny) -> None:
    whole = {name: value.clone() for name, value in tiny("gpt2").state_dict().items()}
    pruned = keep_layers(tiny("gpt2"), [1, 3]).state_dict()
    for new, old in ((0, 1), (1, 3)):
        name = f"transformer.h.{new}.mlp.c_fc.weight"
        assert torch.equal(pruned[name], whole[name.replace(f".{new}.", f".{old}.")])
    assert not any(".h.2." in name for name in pruned)


def test_keep_layers_takes_the_kinds_of_the_kept_layers_along(tiny: Tiny) -> None:
    model = keep_layers(tiny("qwen3"), [0, 2, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_keep_layers_of_all_layers_changes_nothing(tiny: Tiny) -> None:
    model = tiny("llama")
    before = logits_of(model)
    assert torch.equal(logits_of(keep_layers(model, 4)), before)


@pytest.mark.parametrize(("model_type", "layers"), [("deepseek_v3", [1, 2]), ("recurrent_gemma", [0, 2])])
def test_keep_layers_where_a_layers_kind_hangs_on_its_place_is_refused(
    tiny: Tiny, model_type: str, layers: list[int]
) -> None:
    with pytest.raises(ConfigError, match="differ by their place"):
        keep_layers(tiny(model_type), layers)


def test_keep_layers_of_deepseek_with_its_dense_layer_first_is_allowed(tiny: Tiny) -> None:
    assert keep_layers(tiny("deepseek_v3"), 2).config.num_hidden_layers == 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_pruned_config_is_the_pruned_models(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type)
    config = pruned_config(model.config, 3)
    assert model.config.num_hidden_layers == 4
    assert config.to_dict() == keep_layers(model, 3).config.to_dict()
