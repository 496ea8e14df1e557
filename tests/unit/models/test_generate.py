from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from pocl_cli.errors import ConfigError, NonFiniteError
from pocl_cli.models.generate import Generated, Mixture, generate
from pocl_cli.models.head import split_model
from pocl_cli.models.sampling import row_seed, uniforms
from pocl_cli.models.slots import bytes_per_slot_token
from pocl_cli.schema import DecodingConfig

Tiny = Callable[..., PreTrainedModel]
CONTEXT = 64
NEW_TOKENS = 12


def make_prompts(num_rows: int = 12, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 96, rng.integers(1, longest + 1)).tolist() for _ in range(num_rows)]


def run(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int] | None = None, **options: Any
) -> list[Generated]:
    """One answer to each prompt."""
    seeds = seeds if seeds is not None else [row_seed(10, str(row), "test") for row in range(len(prompts))]
    return [one for (one,) in run_seeds(model, prompts, [[seed] for seed in seeds], **options)]


def run_seeds(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    ngram: int = 0,
    new_tokens: int = NEW_TOKENS,
    budget: int = 10**6,
    **options: Any,
) -> list[list[Generated]]:
    decoding = DecodingConfig(
        sampling_temperature=temperature,
        top_p=options.pop("top_p", 1.0),
        top_k=options.pop("top_k", 0),
        no_repeat_ngram_size=ngram,
        max_new_tokens=new_tokens,
    )
    settings = {"eos_token_ids": (), "pad_token_id": 0, "context_length": CONTEXT, **options}
    headed = split_model(model)
    return generate(headed, prompts, seeds=seeds, decoding=decoding, max_tokens_per_batch=budget, **settings)


def plain_answer(
    model: PreTrainedModel, prompt: Sequence[int], seed: int, ngram: int, ends: Sequence[int]
) -> Generated:
    """Sampling as it stands on paper: the whole sequence anew for each token, no batch, no cache, one long sum."""
    tokens = list(prompt)
    for step in range(min(NEW_TOKENS, CONTEXT - len(prompt))):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        grams = [tokens[at : at + ngram] for at in range(len(tokens) - ngram + 1)] if ngram else []
        for gram in grams:
            if gram[:-1] == tokens[len(tokens) - ngram + 1 :]:
                logits[gram[-1]] = float("-inf")
        cdf = logits.softmax(-1).cumsum(-1)
        token = int((cdf <= uniforms([seed], [step])[0] * cdf[-1]).sum())
        if token in ends:
            return Generated(tuple(tokens[len(prompt) :]), token)
        tokens.append(token)
    return Generated(tuple(tokens[len(prompt) :]), None)


def some_ends(model: PreTrainedModel, **options: Any) -> list[int]:
    """Tokens that some of the model's answers to `make_prompts` hold and others do not: a choice of EOS."""
    answers = run(model, make_prompts(), **options)
    counts = np.bincount([token for one in answers for token in set(one.token_ids)])
    return sorted(np.flatnonzero((counts > 0) & (counts < 5)).tolist())[::4]


def transformers_greedy(model: PreTrainedModel, prompt: Sequence[int], ngram: int, ends: list[int]) -> Generated:
    """What `model.generate` gives for one prompt alone."""
    model.generation_config.no_repeat_ngram_size = ngram
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=ends,
        pad_token_id=0,
    )
    tokens = output[0, len(prompt) :].tolist()
    end = tokens[-1] if tokens[-1] in ends else None
    return Generated(tuple(tokens if end is None else tokens[:-1]), end)


@pytest.mark.parametrize("ngram", [0, 2, 6])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_generate_greedy_equals_transformers_token_for_token(tiny: Tiny, model_type: str, ngram: int) -> None:
    model, prompts = tiny(model_type).double(), make_prompts()
    ends = some_ends(model, ngram=ngram)
    expected = [transformers_greedy(model, prompt, ngram, ends) for prompt in prompts]
    assert any(one.ended for one in expected)
    assert any(not one.ended for one in expected)
    assert run(model, prompts, ngram=ngram, eos_token_ids=ends) == expected
    assert run(model, prompts, ngram=ngram, eos_token_ids=ends, budget=15) == expected


@pytest.mark.parametrize("ngram", [2, 6])
def test_generate_with_the_no_repeat_rule_repeats_no_ngram_of_prompt_and_answer(tiny: Tiny, ngram: int) -> None:
    model = tiny("gpt2").double()
    prompt = [5, 6, 7, *run(model, [[5, 6, 7]], new_tokens=ngram + 2)[0].token_ids]
    repeats = []
    for size in (0, ngram):
        tokens = [*prompt, *run(model, [prompt], ngram=size, new_tokens=20)[0].token_ids]
        grams = [tuple(tokens[at : at + ngram]) for at in range(len(tokens) - ngram + 1)]
        answered = len(prompt) - ngram + 1  # the first gram that ends in the answer
        repeats.append(any(grams[at] in grams[:at] for at in range(answered, len(grams))))
    assert repeats == [True, False]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "mistral", "gpt_neo"])
def test_generate_sampled_tokens_equal_those_of_a_plain_loop(tiny: Tiny, model_type: str) -> None:
    model, prompts = tiny(model_type).double(), [[3] * 60, *make_prompts(9)]
    ends = some_ends(model, temperature=1.0, ngram=2)
    seeds = [row_seed(10, str(row), "test") for row in range(len(prompts))]
    expected = [plain_answer(model, prompt, seed, 2, ends) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert {one.ended for one in expected} == {False, True}
    assert run(model, prompts, temperature=1.0, ngram=2, eos_token_ids=ends, budget=12, seeds=seeds) == expected


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "mistral", "falcon_h1"])
def test_generate_sampled_tokens_do_not_depend_on_batching_or_order(tiny: Tiny, model_type: str) -> None:
    model, prompts = tiny(model_type).double(), make_prompts()
    seeds = [row_seed(10, str(row), "test") for row in range(len(prompts))]
    options: dict[str, Any] = {"temperature": 1.0, "ngram": 2, "top_p": 0.95, "top_k": 40}
    options["eos_token_ids"] = some_ends(model, **options)
    alone = run(model, prompts, budget=1, seeds=seeds, **options)
    assert len({len(one.token_ids) for one in alone}) > 3
    for budget in (8, 60, 10**6):  # with the small ones, rows enter while others are under way
        assert run(model, prompts, budget=budget, seeds=seeds, **options) == alone
    backwards = run(model, prompts[::-1], budget=15, seeds=seeds[::-1], **options)
    assert backwards[::-1] == alone


@pytest.mark.parametrize("budget", [1, 12, 10**6])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_generate_with_several_seeds_a_prompt_gives_what_each_seed_gives_alone(
    tiny: Tiny, model_type: str, budget: int
) -> None:
    model, prompts = tiny(model_type).double(), make_prompts(6)
    seeds = [[row_seed(seed, str(row), "test") for seed in range(row % 4)] for row in range(6)]
    ends = some_ends(model, temperature=1.0)
    options: dict[str, Any] = {"temperature": 1.0, "ngram": 2, "eos_token_ids": ends}
    together = run_seeds(model, prompts, seeds, budget=budget, **options)
    assert [len(answers) for answers in together] == [0, 1, 2, 3, 0, 1]
    alone = [
        [run(model, [prompt], seeds=[seed], **options)[0] for seed in its_seeds]
        for prompt, its_seeds in zip(prompts, seeds, strict=True)
    ]
    assert together == alone


def plain_mixed_answer(
    models: Sequence[PreTrainedModel], prompt: Sequence[int], seed: int, share: float, temperature: float, end: int
) -> Generated:
    """Draws from both models' probabilities together, without a cache."""
    tokens = list(prompt)
    for step in range(min(NEW_TOKENS, CONTEXT - len(prompt))):
        with torch.no_grad():
            logits = [model(torch.tensor([tokens]), use_cache=False).logits[0, -1, :90] for model in models]
        first, second = (one.div(temperature).softmax(-1) for one in logits)
        cdf = ((1 - share) * first + share * second).cumsum(-1)
        token = int((cdf <= uniforms([seed], [step])[0] * cdf[-1]).sum())
        if token == end:
            return Generated(tuple(tokens[len(prompt) :]), token)
        tokens.append(token)
    return Generated(tuple(tokens[len(prompt) :]), None)


@pytest.mark.parametrize(("share", "temperature"), [(0.2, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize("budget", [12, 10**6])
def test_generate_from_two_models_equals_a_plain_loop_over_both(
    tiny: Tiny, share: float, temperature: float, budget: int
) -> None:
    models, prompts = [tiny("gpt2").double(), tiny("llama").double()], make_prompts()
    seeds = [row_seed(10, str(row), "test") for row in range(len(prompts))]
    free = run(models[0], prompts, seeds=seeds, temperature=temperature, vocabulary_size=90)
    end = free[0].token_ids[1]
    arguments = zip(prompts, seeds, strict=True)
    expected = [plain_mixed_answer(models, *one, share, temperature, end) for one in arguments]

    options: dict[str, Any] = {"temperature": temperature, "eos_token_ids": [end], "vocabulary_size": 90}
    mixture = Mixture(split_model(models[1]), share)
    mixed = run(models[0], prompts, seeds=seeds, budget=budget, mixture=mixture, **options)

    assert mixed == expected
    assert mixed != run(models[0], prompts, seeds=seeds, budget=budget, **options)
    assert not any("forward" in vars(module) for model in models for module in model.modules())


@pytest.mark.parametrize("kinds", [("llama", "mistral"), ("mistral", "llama")])
def test_generate_from_two_models_of_which_one_cannot_be_decoded_in_slots_is_refused(
    tiny: Tiny, kinds: tuple[str, str]
) -> None:
    first, second = (tiny(kind) for kind in kinds)

    with pytest.raises(ConfigError, match=r"'mistral'.*teacher_mix=0"):
        run(first, make_prompts(2), temperature=1.0, mixture=Mixture(split_model(second), 0.2))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen2", "smollm3", "deepseek_v3"])
def test_model_whose_columns_mean_nothing_then_is_decoded_in_slots(tiny: Tiny, model_type: str) -> None:
    assert bytes_per_slot_token(split_model(tiny(model_type)))


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gpt_neo", "falcon_h1", "recurrent_gemma"])
def test_model_with_windows_or_recurrent_states_then_is_not_decoded_in_slots(tiny: Tiny, model_type: str) -> None:
    assert bytes_per_slot_token(split_model(tiny(model_type))) is None


def test_generate_when_it_ends_or_fails_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    model = tiny("gpt2")
    split_model(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    run(model, make_prompts(3))
    model.transformer.wte.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError):
        run(model, make_prompts(3))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_generate_with_another_seed_gives_other_tokens(tiny: Tiny) -> None:
    model, prompts = tiny("llama"), make_prompts(4)
    first, same, other = (run(model, prompts, temperature=1.0, seeds=[seed] * 4) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_generate_sampled_first_tokens_have_the_frequencies_of_the_softmax(tiny: Tiny) -> None:
    model, prompt = tiny("llama", vocab_size=8).double(), [3, 4, 5]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy() * 6000
    answers = run(model, [prompt] * 6000, temperature=1.0, new_tokens=1)
    counts = np.bincount([one.token_ids[0] for one in answers], minlength=8)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_generate_answers_leave_eos_out_and_tell_whether_they_ended(tiny: Tiny) -> None:
    model, prompts = tiny("llama").double(), make_prompts()
    free = run(model, prompts)
    assert all(len(one.token_ids) == NEW_TOKENS and not one.ended for one in free)
    ends = {free[0].token_ids[4], free[1].token_ids[0]}
    for whole, one in zip(free, run(model, prompts, eos_token_ids=ends), strict=True):
        places = [at for at, token in enumerate(whole.token_ids) if token in ends]
        assert one.ended == bool(places)
        assert one.token_ids == whole.token_ids[: places[0] if places else None]


def test_generate_when_padding_is_a_token_of_the_text_gives_the_same(tiny: Tiny) -> None:
    model, prompts = tiny("gpt2").double(), make_prompts()
    common = run(model, prompts, ngram=2)[0].token_ids[0]
    assert run(model, prompts, ngram=2, pad_token_id=common) == run(model, prompts, ngram=2)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_generate_at_the_edge_of_the_context_stops_there(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type).double()
    prompts = [[3] * 63, *([4 + row] * 5 for row in range(9))]  # the long one ends first and lingers
    answers = run(model, prompts)
    assert [len(one.token_ids) for one in answers] == [1, *[NEW_TOKENS] * 9]
    assert answers == run(model, prompts, budget=1)


def test_generate_with_a_prompt_that_fills_the_context_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="64 tokens leaves no room"):
        run(tiny("llama"), [[3] * 64])


def test_generate_with_padding_rows_in_the_embedding_never_gives_them(tiny: Tiny) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[80:] *= 50
    prompts = make_prompts()
    free, cut = (run(model, prompts, temperature=1.0, vocabulary_size=size) for size in (None, 80))
    assert max(token for one in free for token in one.token_ids) >= 80
    assert max(token for one in cut for token in one.token_ids) < 80


def test_generate_with_a_model_in_training_mode_uses_no_dropout_and_gives_the_mode_back(tiny: Tiny) -> None:
    model, prompts = tiny("gpt2", resid_pdrop=0.5), make_prompts(4)
    expected = run(model, prompts)
    model.train()
    assert run(model, prompts) == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_generate_reports_the_number_of_finished_rows(tiny: Tiny) -> None:
    reported: list[int] = []
    run(tiny("llama"), make_prompts(), budget=130, on_finished=reported.append)
    assert reported == sorted(set(reported))
    assert reported[-1] == 12


def test_generate_when_rows_end_lets_waiting_ones_enter_at_once(tiny: Tiny) -> None:
    model, prompts = tiny("llama"), [*([3] * 60 for _ in range(3)), *([4] * 5 for _ in range(5))]
    sizes: list[tuple[int, ...]] = []

    def note(module: object, args: object, inputs: dict[str, Any]) -> None:
        sizes.append(tuple(inputs["input_ids"].shape))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    run(model, prompts, budget=CONTEXT // 4)
    # Four slots, 16 tokens in a pass. The context ends the long rows after 4 tokens, the first of them from the prompt.
    assert [size for size in sizes if size[1] > 1][-6:] == [*[(1, 60)] * 3, (1, 5), (3, 5), (1, 5)]
    assert [rows for rows, columns in sizes if columns == 1][-22:] == [4] * 14 + [1] * 8


def test_generate_without_prompts_gives_nothing(tiny: Tiny) -> None:
    assert run(tiny("llama"), []) == []


def test_generate_with_weights_that_are_not_finite_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError):
        run(model, make_prompts(2))


def test_generate_with_a_state_kept_inside_the_model_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="recurrent_gemma"):
        run(tiny("recurrent_gemma"), make_prompts(2))
