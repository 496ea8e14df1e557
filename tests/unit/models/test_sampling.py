from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import NoRepeatNGramLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from pocl_cli.errors import ConfigError, NonFiniteError
from pocl_cli.models.sampling import NoRepeatNgrams, ban_, choose, keep_top_k, keep_top_p, row_seed, uniforms
from pocl_cli.schema import DecodingConfig

LOGITS = [2.0, -1.0, 0.5, 1.5, float("-inf"), 0.0, -3.0, 1.0]


def decoding(**values: float) -> DecodingConfig:
    defaults = {"sampling_temperature": 1.0, "top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 0, "max_new_tokens": 8}
    return DecodingConfig(**{**defaults, **values})


def draw(num_rows: int, step: int = 0, **values: float) -> np.ndarray:
    """How often each token of LOGITS is chosen by as many independent rows."""
    draws = uniforms([row_seed(7, str(row), "test") for row in range(num_rows)], [step] * num_rows)
    logits = torch.tensor([LOGITS], dtype=torch.float64).expand(num_rows, -1)
    return np.bincount(choose(logits, decoding(**values), draws), minlength=len(LOGITS))


def test_uniforms_for_seed_zero_are_splitmix64s_published_words() -> None:
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniforms([0, 0, 0], [0, 1, 2]).tolist() == [(word >> 12) * 2.0**-52 for word in words]


def test_uniforms_of_a_row_when_other_rows_join_stay_the_same() -> None:
    seeds, steps = [2**64 - 1, 5, 123456789], [0, 3, 9]
    alone = [uniforms([seed], [step])[0] for seed, step in zip(seeds, steps, strict=True)]
    assert uniforms(seeds, steps).tolist() == alone


def test_uniforms_over_rows_and_over_steps_are_uniform() -> None:
    over_rows = uniforms([row_seed(1, str(row), "x") for row in range(20000)], [0] * 20000)
    over_steps = uniforms([row_seed(1, "a", "x")] * 20000, range(20000))
    for sample in (over_rows, over_steps):
        assert sample.min() >= 0
        assert sample.max() < 1
        assert stats.kstest(sample, "uniform").pvalue > 1e-3


def test_row_seed_when_any_part_changes_is_another() -> None:
    seeds = {row_seed(10, "a", "test"), row_seed(20, "a", "test"), row_seed(10, "b", "test"), row_seed(10, "a", "dev")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose_over_many_rows_has_the_frequencies_of_the_tempered_softmax(temperature: float) -> None:
    counts = draw(20000, sampling_temperature=temperature)
    expected = (torch.tensor(LOGITS, dtype=torch.float64) / temperature).softmax(-1).numpy() * 20000
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_choose_with_top_k_and_top_p_renormalises_what_stays() -> None:
    counts = draw(20000, top_k=3, top_p=0.8)
    kept = torch.tensor([2.0, 1.5], dtype=torch.float64).softmax(-1).numpy() * 20000
    assert counts[[1, 2, 4, 5, 6, 7]].sum() == 0
    assert stats.chisquare(counts[[0, 3]], kept).pvalue > 1e-3


def test_choose_at_temperature_zero_takes_the_largest_logit_whatever_the_draw() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    assert choose(logits, decoding(sampling_temperature=0.0), np.array([0.0, 0.999])) == [0, 7]


@pytest.mark.parametrize("draw_at", [0.0, 1 - 2.0**-52])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_choose_at_the_ends_of_the_interval_takes_a_possible_token(draw_at: float, dtype: torch.dtype) -> None:
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 1.0, impossible, 0.3, impossible]], dtype=dtype)
    assert choose(logits, decoding(), np.array([draw_at])) == ([1] if draw_at == 0 else [3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_with_logits_that_are_not_finite_is_refused(bad: float, temperature: float) -> None:
    with pytest.raises(NonFiniteError):
        choose(torch.tensor([[0.0, bad]]), decoding(sampling_temperature=temperature), np.array([0.5]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_with_every_token_banned_is_refused(temperature: float) -> None:
    banned = torch.zeros(2, 3)
    ban_(banned, [[], [0, 1, 2]])
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"):
        choose(banned, decoding(sampling_temperature=temperature), np.array([0.5, 0.5]))


def test_ban_of_some_tokens_then_only_they_become_impossible() -> None:
    logits = torch.zeros(2, 4)
    ban_(logits, [[1, 3], []])
    assert logits.isneginf().tolist() == [[False, True, False, True], [False] * 4]


@pytest.mark.parametrize("num_tokens", [5, 127, 128, 129, 1000])
def test_choose_from_any_vocabulary_then_takes_the_first_token_whose_cumulated_probability_exceeds_the_draw(
    num_tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(300, num_tokens, generator=generator, dtype=torch.float64) * 3
    logits[:, ::3] = float("-inf")
    draws = uniforms(range(300), [0] * 300)
    plain = (logits.softmax(-1).cumsum(-1) <= torch.from_numpy(draws)[:, None]).sum(-1).tolist()
    assert choose(logits, decoding(), draws) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choose_at_the_end_of_a_block_whose_sum_was_rounded_takes_a_possible_token(dtype: torch.dtype) -> None:
    # Draws close to the borders of the blocks of 128; every second token is impossible.
    logits = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 1::2] = float("-inf")
    borders = logits.float().softmax(-1).unflatten(-1, (8, 128)).sum(-1).double().cumsum(-1)[0]
    draws = np.concatenate([borders.numpy()[:-1] + shift for shift in np.linspace(-1e-7, 1e-7, 41)])
    chosen = choose(logits.expand(len(draws), -1), decoding(), draws)
    assert all(token % 2 == 0 for token in chosen)
    assert len(set(chosen)) > 8


@pytest.mark.parametrize("k", [1, 2, 5, 8, 50])
def test_keep_top_k_equals_transformers_ties_included(k: int) -> None:
    logits = torch.randint(-3, 4, (64, 9), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 0.999])
def test_keep_top_p_equals_transformers(p: float) -> None:
    logits = torch.randn(256, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), split=st.integers(0, 39), size=st.integers(1, 6))
def test_no_repeat_ngrams_token_by_token_bans_what_transformers_bans(tokens: list[int], split: int, size: int) -> None:
    prompt, rest = tokens[: split + 1], tokens[split + 1 :]
    rule = NoRepeatNgrams(size, prompt)
    for token in rest:
        rule.append(token)
    expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor([tokens]), torch.zeros(1, 4))[0].isneginf()
    assert set(rule.banned()) == set(expected.nonzero().flatten().tolist())
