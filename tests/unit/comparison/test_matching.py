"""Whether arms spend the same, and how it is said where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra import initialize_config_dir

from pocl_cli.comparison.matching import Spent, mean_spent, mismatches, spent_by
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.curriculum.stage_table import StageRow
from pocl_cli.records import Stage

FLAT = Spent(
    steps=(2512,), schedules=(2512,), num_optimizers=1, lr=(0.004, 4e-5), global_batch_size=32, response_tokens=240_000
)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (FLAT, []),
        (replace(FLAT, response_tokens=241_000), []),
        (replace(FLAT, response_tokens=None), []),
        (replace(FLAT, response_tokens=228_000), ["−5.0 % response tokens"]),
        (replace(FLAT, steps=(2500,), schedules=(2500,)), ["2,500 steps instead of 2,512 (−0.5 %)"]),
        (
            replace(FLAT, steps=(256, 504, 752, 1000), schedules=(256, 504, 752, 1000), num_optimizers=4),
            ["4 learning-rate cosines instead of 1", "4 optimizer starts instead of 1"],
        ),
        (replace(FLAT, steps=(1256, 1256)), []),
        (replace(FLAT, lr=(0.001, 0)), ["learning rate 0.001 → 0 instead of 0.004 → 4e-05"]),
        (replace(FLAT, global_batch_size=8), ["8 rows a step instead of 32"]),
        (
            Spent((100, 100), (100, 100), 1, (0.1, 0.0), 8, 1),
            [
                "200 steps instead of 2,512 (−92.0 %)",
                "8 rows a step instead of 32",
                "−100.0 % response tokens",
                "learning rate 0.1 → 0 instead of 0.004 → 4e-05",
                "2 learning-rate cosines instead of 1",
            ],
        ),
    ],
)
def test_mismatches_when_an_arm_spends_otherwise_then_each_difference_is_named(arm: Spent, expected: list[str]) -> None:
    assert mismatches(arm, FLAT) == expected


def test_mismatches_when_schedules_have_other_lengths_then_they_are_named() -> None:
    staged = replace(FLAT, steps=(256, 504, 752, 1000), schedules=(256, 504, 752, 1000))
    assert mismatches(replace(FLAT, schedules=(628, 628, 628, 628)), staged) == [
        "cosines of 628 + 628 + 628 + 628 steps instead of 256 + 504 + 752 + 1,000"
    ]


@pytest.mark.parametrize(
    ("restart_lr", "restart_optimizer", "schedules", "num_optimizers"),
    [(True, True, (4, 8), 2), (False, True, (12,), 2), (True, False, (4, 8), 1), (False, False, (12,), 1)],
)
def test_spent_when_stages_restart_or_not_then_schedules_and_optimizers_are_counted(
    restart_lr: bool, restart_optimizer: bool, schedules: tuple[int, ...], num_optimizers: int
) -> None:
    restarts = {"restart_lr": restart_lr, "restart_optimizer": restart_optimizer}
    stages = [Stage(index, ("a",), 1, 1.0, 1.0, **restarts) for index in range(3)]
    table = [
        StageRow(stage=i, num_rows=1, epochs=1, steps=n, temperature=1.0, kd_ratio=1.0, lr=0.1)
        for i, n in enumerate((4, 8, 0))
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        train = compose_run("distill", ["experiment=demo"]).config.train
    found = spent_by(train, stages, table)
    assert (found.steps, found.schedules, found.num_optimizers) == ((4, 8), schedules, num_optimizers)
    assert (found.lr, found.global_batch_size) == ((train.lr, train.lr_end), train.global_batch_size)


def test_mean_spent_when_seeds_differ_in_tokens_then_is_their_mean() -> None:
    runs = [replace(FLAT, response_tokens=tokens) for tokens in (10, 20, 40)]
    assert mean_spent(runs) == replace(FLAT, response_tokens=23)
