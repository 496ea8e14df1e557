"""Whether arms spend the same, and how it is said where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocl_cli.comparison.matching import Spent, mean_spent, mismatches

FLAT = Spent(steps=(2512,), lr=(0.004, 4e-5), global_batch_size=32, response_tokens=240_000)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (FLAT, []),
        (replace(FLAT, response_tokens=241_000), []),
        (replace(FLAT, response_tokens=None), []),
        (replace(FLAT, response_tokens=228_000), ["228,000 response tokens instead of 240,000 (-5.0 %)"]),
        (replace(FLAT, steps=(2500,)), ["2,500 steps instead of 2,512 (-0.5 %)"]),
        (replace(FLAT, steps=(256, 504, 752, 1000)), ["4 cosines instead of one cosine"]),
        (replace(FLAT, lr=(0.001, 0)), ["learning rate 0.001 → 0 instead of 0.004 → 4e-05"]),
        (replace(FLAT, global_batch_size=8), ["8 rows a step instead of 32"]),
        (
            Spent((100, 100), (0.1, 0.0), 8, 1),
            [
                "200 steps instead of 2,512 (-92.0 %)",
                "8 rows a step instead of 32",
                "1 response tokens instead of 240,000 (-100.0 %)",
                "learning rate 0.1 → 0 instead of 0.004 → 4e-05",
                "2 cosines instead of one cosine",
            ],
        ),
    ],
)
def test_mismatches_when_an_arm_spends_otherwise_then_each_difference_is_named(arm: Spent, expected: list[str]) -> None:
    assert mismatches(arm, FLAT) == expected


def test_mismatches_when_stages_have_other_lengths_then_they_are_named() -> None:
    staged = replace(FLAT, steps=(256, 504, 752, 1000))
    assert mismatches(replace(FLAT, steps=(628, 628, 628, 628)), staged) == [
        "stages of 628 + 628 + 628 + 628 steps instead of 256 + 504 + 752 + 1,000"
    ]


def test_mean_spent_when_seeds_differ_in_tokens_then_is_their_mean() -> None:
    runs = [replace(FLAT, response_tokens=tokens) for tokens in (10, 20, 40)]
    assert mean_spent(runs) == replace(FLAT, response_tokens=23)
