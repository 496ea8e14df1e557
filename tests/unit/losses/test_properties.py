"""What holds for every registered KD method, with the parameters of its YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.registry import kd_methods

CONF = Path(__file__).parents[3] / "conf" / "kd_method"
NAMES = kd_methods.names()


def shipped(name):
    return kd_methods.build(yaml.safe_load((CONF / f"{name}.yaml").read_text()))


DIVERGENCES = [name for name in NAMES if shipped(name).needs_teacher]
# A part of them counts as a constant; test_divergences.py holds it fixed in the slow version, too.
WITH_HELD_PARTS = ["akl", "taid", "todi"]
seeds = st.integers(0, 2**31)
# Up to logits so far apart that probabilities underflow in float32.
scales = st.sampled_from([1e-3, 1.0, 10.0, 300.0])


def random_logits(seed, scale, dtype=torch.float32, shape=(5, 9)):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def divergence_of_logits(method, student, teacher):
    return method(student.log_softmax(-1), teacher.log_softmax(-1))


def gradient_of_logits(method, student, teacher):
    student = student.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(divergence_of_logits(method, student, teacher).sum(), student)
    return gradient


def test_registry_holds_a_yaml_file_for_every_method_and_no_other():
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_method_of_its_yaml_file_multiplies_by_temperature_squared_unless_it_has_no_teacher(name):
    method = shipped(name)

    assert method.t_squared is method.needs_teacher


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIVERGENCES])
def test_method_without_a_teacher_in_training_asked_for_a_divergence_stops(name):
    with pytest.raises(AssertionError, match="no distillation term"):
        shipped(name)(torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, scale=scales)
def test_divergence_at_equality_is_zero_with_zero_gradient(name, seed, scale):
    logits = random_logits(seed, scale)

    values = divergence_of_logits(shipped(name), logits, logits)
    gradient = gradient_of_logits(shipped(name), logits, logits)

    assert values.abs().max() <= 2e-6
    assert gradient.abs().max() <= 2e-6


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=30)
@given(seed=seeds, student_scale=scales, teacher_scale=scales)
def test_divergence_of_any_two_distributions_is_finite_and_not_negative(name, seed, student_scale, teacher_scale):
    student, teacher = random_logits(seed, student_scale), random_logits(seed + 1, teacher_scale)

    values = divergence_of_logits(shipped(name), student, teacher)

    assert values.shape == (5,)
    assert values.isfinite().all()
    assert values.min() >= -1e-6
    assert gradient_of_logits(shipped(name), student, teacher).isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_different_distributions_is_positive(name):
    values = divergence_of_logits(shipped(name), random_logits(1, 1.0), random_logits(2, 1.0))

    assert values.min() > 1e-3


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in WITH_HELD_PARTS])
def test_gradient_in_float64_equals_central_differences(name):
    student, teacher = random_logits(1, 2.0, torch.float64), random_logits(2, 2.0, torch.float64)

    assert torch.autograd.gradcheck(
        lambda logits: divergence_of_logits(shipped(name), logits, teacher), (student.requires_grad_(True),)
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_with_logits_shifted_and_vocabulary_reordered_is_unchanged(name):
    student, teacher = random_logits(1, 2.0, torch.float64), random_logits(2, 2.0, torch.float64)
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(3))
    before = divergence_of_logits(shipped(name), student, teacher)

    after = divergence_of_logits(shipped(name), student[:, order] + 7, teacher[:, order] - 4)

    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_a_token_does_not_depend_on_the_others(name):
    student, teacher = random_logits(1, 2.0, torch.float64), random_logits(2, 2.0, torch.float64)

    alone = torch.cat([divergence_of_logits(shipped(name), student[i : i + 1], teacher[i : i + 1]) for i in range(5)])

    torch.testing.assert_close(alone, divergence_of_logits(shipped(name), student, teacher), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_with_impossible_columns_ignores_them_and_gives_them_no_gradient(name):
    student, teacher = random_logits(1, 2.0), random_logits(2, 2.0)
    impossible = torch.full((5, 3), -torch.inf)
    padded_student, padded_teacher = torch.cat([student, impossible], 1), torch.cat([teacher, impossible], 1)

    values = divergence_of_logits(shipped(name), padded_student, padded_teacher)
    gradient = gradient_of_logits(shipped(name), padded_student, padded_teacher)

    torch.testing.assert_close(values, divergence_of_logits(shipped(name), student, teacher))
    torch.testing.assert_close(gradient[:, :9], gradient_of_logits(shipped(name), student, teacher))
    assert (gradient[:, 9:] == 0).all()
