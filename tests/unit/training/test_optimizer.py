"""AdamW's groups and first step, and the learning rate over a stage."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pocl_cli.curriculum.learning_rate import cosine
from pocl_cli.training.optimizer import make_optimizer


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def test_optimizer_when_made_then_decays_matrices_only():
    network = make_network()

    optimizer = make_optimizer(network, lr=1e-3, weight_decay=0.1)

    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.1,
        "1.weight": 0.1,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }


def test_optimizer_when_parameters_are_frozen_then_leaves_them_out():
    network = make_network()
    network[1].requires_grad_(False)
    network[2].requires_grad_(False)

    optimizer = make_optimizer(network, lr=1e-3, weight_decay=0.1)

    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [[torch.Size([5, 4])]]


def test_optimizer_when_it_steps_twice_then_is_adamw_by_hand():
    network = nn.Linear(3, 2).double()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = make_optimizer(network, lr=0.01, weight_decay=0.1)
    gradients = [{name: torch.randn_like(p) for name, p in network.named_parameters()} for _ in range(2)]

    for gradient in gradients:
        for name, p in network.named_parameters():
            p.grad = gradient[name].clone()
        optimizer.step()

    for name, p in network.named_parameters():
        expected, first, second = before[name], torch.zeros_like(p), torch.zeros_like(p)
        for count, gradient in enumerate(gradients, start=1):
            first = 0.9 * first + 0.1 * gradient[name]
            second = 0.999 * second + 0.001 * gradient[name] ** 2
            expected = expected * (1 - 0.01 * (0.1 if name == "weight" else 0.0))
            corrected = first / (1 - 0.9**count), second / (1 - 0.999**count)
            expected = expected - 0.01 * corrected[0] / (corrected[1].sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)


def test_learning_rate_when_the_stage_starts_is_halfway_and_would_end_then_is_start_middle_and_end():
    rates = [cosine(step, 10, start=1e-4, end=1e-7) for step in (0, 5, 10)]

    assert rates == pytest.approx([1e-4, (1e-4 + 1e-7) / 2, 1e-7], rel=1e-12)


@given(num_steps=st.integers(1, 400), start=st.floats(1e-6, 1), ratio=st.floats(0, 0.99))
def test_learning_rate_when_steps_go_by_then_falls_from_start_and_stays_above_the_end(num_steps, start, ratio):
    end = start * ratio

    rates = [cosine(step, num_steps, start=start, end=end) for step in range(num_steps)]

    assert rates[0] == pytest.approx(start, rel=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] > end
