"""The order of rows and the grouping into micro-batches, as properties."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.stage_table import steps_per_epoch
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.training.sampler import GROUP_OVERHEAD_TOKENS, Sampler, micro_batches


def make_sampler(num_rows: int, batch: int, *, seed: int = 10, stage: int = 0, drop_last: bool = False) -> Sampler:
    ids = tuple(f"row-{i}" for i in range(num_rows))
    return Sampler(Stage(stage, ids, 2, 1.0, 1.0), seed=seed, global_batch_size=batch, drop_last=drop_last)


def epoch_order(sampler: Sampler, epoch: int) -> list[str]:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return [record_id for step in steps for record_id in sampler.global_batch(step)]


sizes = st.integers(1, 60)
batches = st.integers(1, 70)
seeds = st.integers(0, 2**40)


@given(num_rows=sizes, batch=batches, seed=seeds, epoch=st.integers(0, 5))
def test_epoch_when_partial_batches_are_kept_then_holds_every_row_once(num_rows, batch, seed, epoch):
    sampler = make_sampler(num_rows, batch, seed=seed)

    assert sorted(epoch_order(sampler, epoch)) == sorted(sampler.stage.record_ids)


@given(num_rows=sizes, one=batches, other=batches, seed=seeds)
def test_order_when_the_batch_size_changes_then_stays(num_rows, one, other, seed):
    orders = [epoch_order(make_sampler(num_rows, batch, seed=seed), 1) for batch in (one, other)]

    assert orders[0] == orders[1]


@given(num_rows=sizes, batch=batches, seed=seeds, epoch=st.integers(0, 3))
def test_epoch_when_partial_batches_are_dropped_then_is_the_whole_batches_of_the_same_order(
    num_rows, batch, seed, epoch
):
    batch = min(batch, num_rows)
    every = epoch_order(make_sampler(num_rows, batch, seed=seed), epoch)
    sampler = make_sampler(num_rows, batch, seed=seed, drop_last=True)

    sizes_of_steps = [len(sampler.global_batch(step)) for step in range(sampler.steps_per_epoch)]

    assert sizes_of_steps == [batch] * (num_rows // batch)
    assert epoch_order(sampler, epoch) == every[: num_rows // batch * batch]


@given(num_rows=sizes, batch=batches, drop_last=st.booleans())
def test_steps_per_epoch_when_asked_then_are_those_of_the_stage_table(num_rows, batch, drop_last):
    sampler = make_sampler(num_rows, batch, drop_last=drop_last)

    assert sampler.steps_per_epoch == steps_per_epoch(num_rows, batch, drop_last)


@given(step=st.integers(0, 30))
def test_global_batch_when_asked_out_of_order_then_is_the_same(step):
    walked = make_sampler(10, 4)
    for earlier in range(step):
        walked.global_batch(earlier)

    assert make_sampler(10, 4).global_batch(step) == walked.global_batch(step)
    assert walked.epoch(step) == step // 3


@pytest.mark.parametrize("changed", [{"seed": 11}, {"stage": 1}, {"epoch": 1}])
def test_order_when_seed_stage_or_epoch_changes_then_changes(changed):
    def order(*, epoch: int = 0, **values: int) -> list[str]:
        return epoch_order(make_sampler(50, 8, **values), epoch)

    assert order(**changed) != order()
    assert order() != list(make_sampler(50, 8).stage.record_ids)


@given(times=st.lists(st.integers(0, 9), min_size=1, max_size=20), epochs=st.integers(1, 4), seed=seeds)
def test_epochs_when_rows_have_their_own_number_of_times_then_are_even_and_add_up(times, epochs, seed):
    times = [*times, epochs * (len(times) + 10) - sum(times), *[0] * 9]
    assume(times[-10] >= 0)
    ids = tuple(f"row-{i}" for i in range(len(times)))
    stage = Stage(0, ids, epochs, 1.0, 1.0, times=tuple(times))
    sampler = Sampler(stage, seed=seed, global_batch_size=7, drop_last=False)

    orders = [Counter(epoch_order(sampler, epoch)) for epoch in range(epochs)]

    assert {order.total() for order in orders} == {len(ids)}
    assert sum(orders, Counter()) == Counter({i: n for i, n in zip(ids, times, strict=True) if n})
    assert Counter(epoch_order(sampler, epochs)) == orders[0]


def test_epochs_when_all_rows_have_the_same_number_of_times_then_each_is_once_in_each():
    ids = tuple(f"row-{i}" for i in range(9))
    sampler = Sampler(Stage(0, ids, 3, 1.0, 1.0, times=(3,) * 9), seed=1, global_batch_size=4, drop_last=False)

    assert [sorted(epoch_order(sampler, epoch)) for epoch in range(3)] == [sorted(ids)] * 3


def test_order_when_made_on_any_machine_then_is_this_one():
    assert " ".join(epoch_order(make_sampler(8, 3), 0)) == ("row-2 row-1 row-3 row-4 row-6 row-5 row-7 row-0")


# ── micro-batches ─────────────────────────────────────────────────────────────────────────────────────────────────

lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=30)


def make_rows(pairs: list[tuple[int, int]]) -> list[TokenisedRow]:
    return [TokenisedRow(f"{i:02d}", [5] * prompt, [6] * response) for i, (prompt, response) in enumerate(pairs)]


@given(pairs=lengths, budget=st.integers(1, 200))
def test_micro_batches_when_made_then_hold_every_row_once_within_the_budget(pairs, budget):
    rows = make_rows(pairs)

    groups = micro_batches(rows, budget)

    assert sorted(row.id for group in groups for row in group) == [row.id for row in rows]
    for group in groups:
        padded = len(group) * max(row.num_tokens for row in group)
        assert padded <= budget or len(group) == 1


def work(groups: list[list[TokenisedRow]]) -> int:
    return sum(len(group) * max(row.num_tokens for row in group) + GROUP_OVERHEAD_TOKENS for group in groups)


@settings(max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 400)), min_size=1, max_size=8),
    budget=st.integers(1, 3000),
)
def test_micro_batches_when_made_then_no_other_borders_make_less_work(pairs, budget):
    ordered = sorted(make_rows(pairs), key=lambda row: row.num_tokens)
    others = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(ordered)]
        groups = [ordered[start:end] for start, end in itertools.pairwise(borders)]
        if all(len(group) == 1 or len(group) * group[-1].num_tokens <= budget for group in groups):
            others.append(work(groups))

    assert work(micro_batches(ordered, budget)) == min(others)


@settings(max_examples=30)
@given(pairs=lengths, budget=st.integers(1, 200), data=st.data())
def test_micro_batches_when_the_rows_come_in_another_order_then_stay_the_same(pairs, budget, data):
    rows = make_rows(pairs)

    assert micro_batches(data.draw(st.permutations(rows)), budget) == micro_batches(rows, budget)


def test_micro_batches_when_a_row_is_longer_than_the_budget_then_it_goes_alone():
    rows = make_rows([(2, 1), (9, 9), (2, 2)])

    assert [[row.id for row in group] for group in micro_batches(rows, 8)] == [["00", "02"], ["01"]]


def test_micro_batches_when_there_are_no_rows_then_there_are_none():
    assert micro_batches([], 8) == []
