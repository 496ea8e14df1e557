"""MiniLLM: its gradient against slow versions, and in expectation against the gradient of what it minimises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocl_cli.losses.on_policy import Part, SampledTokens
from pocl_cli.models.head import OutputHead
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import train
from pocl_cli.training.objective import ObjectiveOutput, distillation_loss

from ...support.training import make_job, make_student, train_lines

VALUES = {
    "teacher_mix": 0.0,
    "length_normalised": False,
    "max_weight": 1e6,
    "sampling_temperature": 1.0,
    "max_new_tokens": 8,
}


def minillm(**changes: Any) -> Any:
    return kd_methods.build({"name": "minillm", **VALUES, "t_squared": False, **changes})


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(
    student: Tensor, teacher: Tensor, targets: list[int], lengths: list[int] | None, **changes: Any
) -> ObjectiveOutput:
    """The objective where hidden states are logits `[N, V]`."""
    head = OutputHead(None, student.shape[-1])
    arguments: dict[str, Any] = {"method": minillm(), "kd_ratio": 1.0, "temperature": 1.0, "normaliser": 1.0}
    return distillation_loss(
        student,
        head,
        torch.tensor(targets),
        num_real_tokens=student.shape[-1],
        chunk_tokens=2,
        teacher_hidden_NE=teacher,
        teacher_head=head,
        answer_lengths=lengths,
        **{**arguments, **changes},
    )


# ── in expectation ────────────────────────────────────────────────────────────────────────────────────────────────────


class Tree:
    """A language model over three tokens, of which 0 ends a text, for up to two tokens: logits by prefix."""

    def __init__(self, seed: int) -> None:
        self.logits = random(4, 3, seed=seed).mul(1.5).requires_grad_(True)  # of (), (0,) which has ended, (1,), (2,)

    def rows(self, answer: tuple[int, ...]) -> Tensor:
        """The logits `[N, 3]` that each token of an answer is drawn by."""
        return torch.stack([self.logits[1 + answer[0] if place else 0] for place in range(len(answer))])

    def logprob(self, answer: tuple[int, ...], temperature: float = 1.0) -> Tensor:
        logprobs = (self.rows(answer) / temperature).log_softmax(-1)
        return torch.stack([logprobs[place, token] for place, token in enumerate(answer)]).sum()


ANSWERS = [(0,), *((first, second) for first in (1, 2) for second in range(3))]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_minillm_over_all_answers_is_in_expectation_the_reverse_kl_between_answers_and_its_gradient(
    temperature: float,
) -> None:
    student, teacher = Tree(1), Tree(2)
    pairs = [(student.logprob(one, temperature), teacher.logprob(one, temperature).detach()) for one in ANSWERS]
    assert sum(q.exp() for q, _ in pairs).item() == pytest.approx(1)  # type: ignore[union-attr]
    exact: Any = sum(q.exp() * (q - p) for q, p in pairs)
    (expected,) = torch.autograd.grad(exact, student.logits)

    value = 0.0
    for answer in ANSWERS:
        probability = student.logprob(answer, temperature).exp().item()
        output = loss_of(
            student.rows(answer),
            teacher.rows(answer).detach(),
            list(answer),
            [len(answer)],
            normaliser=1 / probability,
            temperature=temperature,
            method=minillm(sampling_temperature=temperature),
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        value += output.loss.item()

    assert value == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(student.logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_single_steps_alone_over_all_answers_are_not_that_gradient() -> None:
    student, teacher = Tree(1), Tree(2)
    exact: Any = sum(student.logprob(one).exp() * (student.logprob(one) - teacher.logprob(one)) for one in ANSWERS)
    (expected,) = torch.autograd.grad(exact, student.logits)

    for answer in ANSWERS:
        weight = student.logprob(answer).exp().item()
        rows = teacher.rows(answer).detach()
        loss_of(student.rows(answer), rows, list(answer), None, normaliser=1 / weight).loss.backward()  # type: ignore[no-untyped-call]

    assert student.logits.grad is not None
    assert (student.logits.grad - expected).abs().max() > 0.01


# ── token by token ────────────────────────────────────────────────────────────────────────────────────────────────────

LENGTHS = [3, 1, 4, 2]
TARGETS = [4, 0, 2, 3, 1, 1, 4, 0, 2, 3]


def slow_weights(
    student: Tensor, teacher: Tensor, temperature: float, drawn_at: float, normalised: bool, most: float, mix: float
) -> Iterator[float]:
    """w·R of each token, in Python floats."""

    def logprob(logits: Tensor, place: int, divisor: float) -> float:
        values = [value / divisor for value in logits[place].tolist()]
        return values[TARGETS[place]] - math.log(math.fsum(map(math.exp, values)))

    start = 0
    for length in LENGTHS:
        for place in range(start, start + length):
            after = range(place + 1, start + length)
            ratios = [logprob(student, one, temperature) - logprob(teacher, one, temperature) for one in after]
            returned = math.fsum(ratios) / (len(ratios) if normalised and ratios else 1)
            drawn = [math.exp(logprob(one, place, drawn_at)) for one in (student, teacher)]
            weight = math.exp(logprob(student, place, temperature)) / ((1 - mix) * drawn[0] + mix * drawn[1])
            yield min(weight, most) * returned
        start += length


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("temperature", "drawn_at", "most"), [(1.0, 1.0, 1.0), (2.0, 1.0, 1e6), (2.0, 0.7, 1.2)])
@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_minillm_equals_the_slow_version_in_value_and_gradient(
    normalised: bool, temperature: float, drawn_at: float, most: float, t_squared: bool, mix: float
) -> None:
    student, teacher = random(10, 5, seed=3).mul(2), random(10, 5, seed=4).mul(2)
    drawing = {"sampling_temperature": drawn_at, "teacher_mix": mix}
    method = minillm(length_normalised=normalised, max_weight=most, t_squared=t_squared, **drawing)
    ours = student.clone().requires_grad_(True)
    output = loss_of(ours, teacher, TARGETS, LENGTHS, method=method, temperature=temperature, normaliser=7.0)
    output.loss.backward()  # type: ignore[no-untyped-call]

    slow = student.clone().requires_grad_(True)
    q, p = (slow / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum()
    weights = list(slow_weights(student, teacher, temperature, drawn_at, normalised, most, mix))
    policy = sum(weight * q[place, TARGETS[place]] for place, weight in enumerate(weights))
    factor = (temperature**2 if t_squared else 1) / 7
    (factor * (divergence + policy)).backward()

    assert output.loss.item() == pytest.approx(factor * divergence.item(), rel=1e-12)
    assert output.kd_sum.item() == pytest.approx(divergence.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-10, atol=1e-13)


def test_minillm_on_rows_that_the_student_has_not_written_is_reverse_kl() -> None:
    gradients = []
    for method in (minillm(), kd_methods.build({"name": "rkl", "t_squared": False})):
        student = random(10, 5, seed=3).requires_grad_(True)
        loss_of(student, random(10, 5, seed=4), TARGETS, None, method=method).loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(student.grad)

    assert torch.equal(gradients[0], gradients[1])


def test_minillm_when_the_student_is_the_teacher_has_no_gradient() -> None:
    student = random(10, 5, seed=3).requires_grad_(True)

    loss_of(student, student.detach().clone(), TARGETS, LENGTHS).loss.backward()  # type: ignore[no-untyped-call]

    assert student.grad is not None
    assert student.grad.abs().max() < 1e-14


def test_policy_weights_of_no_token_are_none() -> None:
    nothing = torch.empty(0)

    assert minillm().policy_weights(SampledTokens(nothing, nothing, nothing, [])).shape == (0,)
    assert minillm().policy_weights(SampledTokens(nothing, nothing, nothing, [0])).shape == (0,)


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_minillm_of_a_step_is_answers_by_kd_ratio_and_gold_rows_by_the_rest() -> None:
    assert minillm().rows_for_step(1, 2, 0.5, {}, 0.7) == (Part("generated", 1.0, 0.7), Part("gold", 0.0, 1 - 0.7))


def test_minillm_when_trained_then_ratio_and_temperature_of_every_stage_reach_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, student=make_student("minillm", dtype=torch.float64))
    train(job)

    lines = train_lines(tmp_path)
    assert {(line["kd_ratio"], line["temperature"]) for line in lines} == {(0.7, 1.0), (1.0, 2.0)}
    for line in lines:
        kd = line["kd"] * line["temperature"] ** 2
        assert line["loss"] == pytest.approx((1 - line["kd_ratio"]) * line["ce"] + line["kd_ratio"] * kd)
        assert line["generated_rows"] in (2, 4)
    # Not the gradient of the single steps alone.
    plain = make_job(tmp_path / "plain", student=make_student("gkd", dtype=torch.float64), max_steps=1)
    base = kd_methods.build({"name": "rkl", "t_squared": True})
    plain.student.method = replace(plain.student.method, base=base, student_share=1.0)  # type: ignore[type-var]
    stages = [replace(stage, kd_ratio=1.0) for stage in job.stages]
    alone = make_job(tmp_path / "alone", student=make_student("minillm", dtype=torch.float64), max_steps=1)
    alone = replace(alone, rollout=plain.rollout)
    train(replace(plain, stages=stages))
    train(replace(alone, stages=stages))
    (one,), (other,) = train_lines(tmp_path / "plain"), train_lines(tmp_path / "alone")
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
    assert one["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-3)
