"""From logits to the next token: the no-repeat rule, temperature, top-k, top-p, and one draw per row.

Shapes: R rows, V vocabulary, B blocks of T tokens. A row's draws come from a stream of its own, so its tokens do not
depend on the rows that it is decoded with (beyond the rounding of the logits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pocl_cli.errors import ConfigError, NonFiniteError
from pocl_cli.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocl_cli.schema import DecodingConfig

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64
_BLOCK = 128  # tokens; about the square root of the usual vocabularies, where both levels are short


def row_seed(seed: int, record_id: str, purpose: str) -> int:
    """The seed of one row's stream of draws. Streams of different rows, seeds and purposes are unrelated."""
    return derive_seed("sampling", purpose, seed, record_id)


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float64]:
    """Number `steps[r]` of the stream `seeds[r]` (below 2^64) for each row r, uniform in [0, 1), 52 bits. Shape [R].

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16), addressed by
    its counter: no generator has to follow its row through the batch.
    """
    with np.errstate(over="ignore"):
        z = np.array(seeds, dtype=np.uint64) + (np.array(steps, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words: NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) >> np.uint64(
        12
    )  # 52 bits, so that u · total rounds to less than total
    return np.asarray(words.astype(np.float64) * 2.0**-52)


class NoRepeatNgrams:
    """The tokens that would complete an n-gram which one row already holds, kept up to date token by token.

    A map from each (n-1)-gram to the tokens that followed it: a step costs one look-up and one insertion, whatever the
    length. `tokens` start with the prompt, without padding.
    """

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        assert size >= 1, f"n-gram size {size}"
        self._size = size
        self._followers: dict[tuple[int, ...], list[int]] = {}
        head = size - 1
        self._last = tuple(tokens[max(0, len(tokens) - head) :]) if head else ()
        for start in range(len(tokens) - head):
            end = start + head
            self._followers.setdefault(tuple(tokens[start:end]), []).append(tokens[end])

    def banned(self) -> Sequence[int]:
        """The tokens that may not come next."""
        return self._followers.get(self._last, ())

    def append(self, token: int) -> None:
        """Records `token` as the row's next one."""
        self._followers.setdefault(self._last, []).append(token)
        if self._size > 1:
            self._last = (*self._last, token)[1 - self._size :]


def ban_(logits_RV: Tensor, banned: Sequence[Sequence[int]]) -> None:
    """Sets each row's banned tokens to -inf, in place."""
    rows = [row for row, tokens in enumerate(banned) for _ in tokens]
    if not rows:
        return
    columns = [token for tokens in banned for token in tokens]
    index = (torch.tensor(rows, device=logits_RV.device), torch.tensor(columns, device=logits_RV.device))
    logits_RV.index_put_(index, logits_RV.new_tensor(float("-inf")))


def keep_top_k(logits_RV: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row at -inf; ties with the k-th stay. `k` 0 keeps all."""
    if k == 0 or k >= logits_RV.shape[-1]:
        return logits_RV
    smallest_R1 = logits_RV.topk(k, dim=-1).values[:, -1:]
    return logits_RV.masked_fill(logits_RV < smallest_R1, float("-inf"))


def keep_top_p(logits_RV: Tensor, p: float) -> Tensor:
    """All tokens at -inf but the smallest set of most likely ones whose probabilities reach `p`. At least one stays.

    Nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    if p >= 1.0:
        return logits_RV
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    probs_RV = sorted_RV.softmax(dim=-1, dtype=torch.float64)
    dropped_RV = probs_RV.cumsum(dim=-1) - probs_RV >= p  # the tokens ahead of it suffice
    return logits_RV.masked_fill(dropped_RV.scatter(-1, order_RV, dropped_RV), float("-inf"))


def mix(logits_RV: Tensor, other_RV: Tensor, share: float, temperature: float) -> Tensor:
    """Logits by which tokens are drawn from (1 − share)·softmax(logits/T) + share·softmax(other/T) at temperature T."""
    assert 0 < share < 1, f"a share of {share} mixes nothing"
    assert temperature > 0, "greedy choices cannot be mixed"
    dtype = torch.promote_types(torch.float32, logits_RV.dtype)
    logprobs_RV, others_RV = ((one / temperature).log_softmax(dim=-1, dtype=dtype) for one in (logits_RV, other_RV))
    return temperature * torch.logaddexp(logprobs_RV + math.log1p(-share), others_RV + math.log(share))


def choose(logits_RV: Tensor, decoding: DecodingConfig, uniforms_R: NDArray[np.float64]) -> list[int]:
    """The next token of each row: the largest logit at `sampling_temperature` 0, else a draw by inverse CDF.

    Order: temperature, top-k, top-p. `uniforms_R` holds one number in [0, 1) a row and is not read for greedy decoding.

    Raises:
        NonFiniteError: a row has a NaN or infinite logit.
        ConfigError: the no-repeat rule left a row without a token.
    """
    if logits_RV.device.type == "mps":
        logits_RV = logits_RV.cpu()  # MPS has no float64
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    if decoding.sampling_temperature == 0:
        best_R, tokens_R = logits_RV.max(dim=-1)
        best, tokens = torch.stack([best_R.double(), tokens_R.double()]).tolist()  # one transfer from the device
        if not all(map(math.isfinite, best)):
            _refuse_non_finite(best_R)
        return [int(token) for token in tokens]
    if decoding.sampling_temperature != 1:
        logits_RV = logits_RV / decoding.sampling_temperature
    logits_RV = keep_top_p(keep_top_k(logits_RV, decoding.top_k), decoding.top_p)
    probs_RV = logits_RV.softmax(dim=-1)
    tokens = [int(token) for token in _inverse_cdf(probs_RV, uniforms_R).tolist()]
    if max(tokens) >= probs_RV.shape[-1]:  # NaN: no sum exceeds the target
        _refuse_non_finite(logits_RV.amax(dim=-1))
    return tokens


def _inverse_cdf(probs_RV: Tensor, uniforms_R: NDArray[np.float64]) -> Tensor:
    """The first token of each row whose cumulated probability exceeds its number; V or more where there are NaNs.

    First the block of `_BLOCK` tokens, then the token inside: sums in float64 over the whole vocabulary would cost as
    much as a good part of the model. Only the sums inside a block are in the precision of the probabilities.
    """
    num_tokens = probs_RV.shape[-1]
    num_whole = num_tokens // _BLOCK
    sums_RB = probs_RV[:, : num_whole * _BLOCK].unflatten(-1, (num_whole, _BLOCK)).sum(dim=-1)
    rest_R1 = probs_RV[:, num_whole * _BLOCK :].sum(dim=-1, keepdim=True)
    cdf_RB = torch.cat([sums_RB, rest_R1], dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target_R1 = torch.from_numpy(uniforms_R).to(cdf_RB.device).unsqueeze(-1) * cdf_RB[:, -1:]
    block_R1 = torch.searchsorted(cdf_RB, target_R1, right=True)
    before_R1 = torch.nn.functional.pad(cdf_RB, (1, 0)).gather(-1, block_R1.clamp(max=num_whole))
    tokens_RT = block_R1 * _BLOCK + torch.arange(_BLOCK, device=probs_RV.device)
    inside_RT = probs_RV.gather(-1, tokens_RT.clamp(max=num_tokens - 1)).double() * (tokens_RT < num_tokens)
    cdf_RT = inside_RT.cumsum(dim=-1)
    place_R1 = torch.searchsorted(cdf_RT, target_R1 - before_R1, right=True)
    # The block's sum may be larger than the exact one by a rounding: then it is the last token that is possible.
    last_R1 = torch.searchsorted(cdf_RT, cdf_RT[:, -1:].contiguous())
    return (block_R1 * _BLOCK + torch.minimum(place_R1, last_R1)).squeeze(-1)


def _refuse_non_finite(best_R: Tensor) -> None:
    """Raises for a row whose largest logit is NaN, +inf, or -inf (everything banned)."""
    if bool(torch.isfinite(best_R).all()):
        return
    if bool(torch.isneginf(best_R).any()):
        raise ConfigError(
            "no token is left to generate",
            why="every token of the vocabulary would repeat an n-gram",
            fix="raise no_repeat_ngram_size, or set it to 0",
        )
    raise NonFiniteError(
        "logits that are not finite in generation",
        why="the model's weights or its precision give NaN or infinity",
        fix="check the model's weights; a float16 model may need teacher.dtype or student.dtype float32 or bfloat16",
    )
