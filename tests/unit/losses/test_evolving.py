"""Methods that change in the course of a run: TAID's schedules, and what the others make of the interface."""

from __future__ import annotations

import math

import pytest
import torch

from pocl_cli.losses.evolving import Evolving, after_step, for_step
from pocl_cli.registry import kd_methods

FALLING = [3.0, 2.0, 1.6, 1.7, 1.0, 1.0, 0.4, 0.9]
FALLS = [2.0**-step for step in range(9)]


def taid(**changes):
    values = {"schedule": "adaptive", "t_start": 0.2, "t_end": 1.0, "rate": 0.3, "momentum": 0.6, "t_squared": True}
    return kd_methods.build({"name": "taid", **values, **changes})


def ts_of_run(method, losses):
    """t of every step, where step n of the run has the loss `losses[n]`."""
    state, ts = {}, []
    for done, loss in enumerate(losses):
        ts.append(float(for_step(method, done / len(losses), state).t))
        state = after_step(method, (done + 1) / len(losses), state, torch.tensor(loss, dtype=torch.float64))
    return ts


def slow_adaptive(losses, *, t_start, t_end, rate, momentum):
    """Algorithm 1 of the paper in Python floats."""
    t, average, ts = t_start, 0.0, []
    for done, loss in enumerate(losses):
        if done > 0:
            average = momentum * average + (1 - momentum) * (losses[done - 1] - loss) / losses[done - 1]
            rise = rate / (1 + math.exp(-average)) * (1 - t)
            linear = t_start + (t_end - t_start) * (done + 1) / len(losses)
            ts.append(t)
            t = min(t_end, max(linear, t + rise))
        else:
            ts.append(t)
    return ts


def test_taid_linear_rises_with_the_progress_from_start_to_end():
    method = taid(schedule="linear")

    assert ts_of_run(method, [1.0] * 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert for_step(method, 1.0, {}).t == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("t_end", [0.7, 1.0])
def test_taid_adaptive_is_that_of_the_paper_never_below_linear_and_never_above_its_end(rate, t_end):
    ts = ts_of_run(taid(rate=rate, t_end=t_end), FALLING)

    expected = slow_adaptive(FALLING, t_start=0.2, t_end=t_end, rate=rate, momentum=0.6)
    assert ts == pytest.approx(expected, rel=1e-12)
    assert ts == sorted(ts)
    assert max(ts) <= t_end


def test_taid_adaptive_rises_faster_where_the_loss_falls_than_where_it_rises():
    falling, rising = (ts_of_run(taid(rate=0.9, momentum=0.0), losses) for losses in (FALLS, FALLS[::-1]))
    assert falling[3] > rising[3] > 0.2


def test_taid_adaptive_on_a_loss_of_zero_stays_finite():
    assert all(math.isfinite(t) for t in ts_of_run(taid(), [0.0] * 4))


def test_taid_of_a_step_is_forward_kl_to_the_interpolation_at_its_t():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, generator=generator).log_softmax(-1) for _ in range(2))
    method = taid(schedule="linear")

    half_way = for_step(method, 0.5, {})

    assert torch.equal(half_way(student, teacher), taid(t_start=0.6)(student, teacher))
    assert not torch.equal(half_way(student, teacher), method(student, teacher))
    assert (half_way.needs_teacher, half_way.t_squared) == (True, True)


def test_after_step_leaves_the_state_it_was_given_unchanged():
    before = after_step(taid(), 0.1, {}, torch.tensor(2.0))
    copy = {name: value.clone() for name, value in before.items()}

    after_step(taid(), 0.2, before, torch.tensor(1.0))

    assert before == copy


def test_ranking_of_a_method_that_changes_changes_with_it():
    plain = taid()
    base = {"name": "taid", "schedule": "adaptive", "t_start": 0.2, "t_end": 1.0}
    base |= {"rate": 0.3, "momentum": 0.6, "t_squared": True}
    method = kd_methods.build({"name": "ranking", "base": base, "weight": 1.0, "top_k": 3})
    state = after_step(method, 0.1, {}, torch.tensor(2.0))
    state = after_step(method, 0.2, state, torch.tensor(1.0))

    assert for_step(method, 0.2, state).base == for_step(plain, 0.2, state)


@pytest.mark.parametrize("name", ["fkl", "jsd"])
def test_method_that_does_not_change_is_the_same_in_every_step_and_keeps_no_state(name):
    method = kd_methods.build({"name": name, "t_squared": True, **({"teacher_weight": 0.5} if name == "jsd" else {})})

    assert not isinstance(method, Evolving)
    assert for_step(method, 0.3, {}) is method
    assert after_step(method, 0.4, {}, torch.tensor(1.0)) == {}
