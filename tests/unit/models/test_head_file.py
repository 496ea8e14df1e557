"""An output head from its files gives the logits of the head that was written, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.models.head import OutputHead
from pocl_cli.models.head_file import SETTINGS, WEIGHTS, is_plain, read_head, write_head

CPU = torch.device("cpu")


def make_head(*, bias: bool = False, dtype: torch.dtype = torch.float32, **changes: float) -> OutputHead:
    torch.manual_seed(0)
    return OutputHead(nn.Linear(6, 11, bias=bias, dtype=dtype), 11, **changes)  # type: ignore[arg-type] # soft_cap too


@pytest.mark.parametrize(
    "head",
    [
        make_head(),
        make_head(bias=True),
        make_head(multiplier=0.3),
        make_head(divisor=7.0, soft_cap=1.5),
        make_head(dtype=torch.bfloat16),
        make_head(dtype=torch.float64, bias=True),
    ],
    ids=["plain", "bias", "multiplier", "divisor and cap", "bfloat16", "float64"],
)
def test_head_when_written_and_read_then_gives_the_same_bits(tmp_path: Path, head: OutputHead) -> None:
    assert head.projection is not None
    hidden = torch.randn(5, 6).to(next(head.parameters()).dtype)
    write_head(tmp_path, head)

    again = read_head(tmp_path, CPU)

    assert torch.equal(again(hidden), head(hidden))
    assert again.num_logits == 11
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_head_when_written_twice_then_its_files_are_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_head(tmp_path / name, make_head(bias=True))

    for name in (WEIGHTS, SETTINGS):
        assert sha256_file(tmp_path / "one" / name) == sha256_file(tmp_path / "two" / name)


def test_head_when_read_then_draws_no_random_numbers(tmp_path: Path) -> None:
    write_head(tmp_path, make_head(bias=True))
    before = torch.get_rng_state()

    read_head(tmp_path, CPU)

    assert torch.equal(torch.get_rng_state(), before)


class Doubled(nn.Linear):
    """Computes something else than a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_head_when_it_is_not_one_linear_layer_then_is_not_plain() -> None:
    assert is_plain(make_head(soft_cap=2.0))
    assert not is_plain(OutputHead(None, 11))
    assert not is_plain(OutputHead(Doubled(6, 11), 11))
    assert not is_plain(OutputHead(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 11)), 11))
