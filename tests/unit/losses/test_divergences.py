"""Each shipped divergence against a slow version in Python floats, and against the project's oracle file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pocl_cli.registry import kd_methods

TEMPERATURES = (1.0, 4 / 3, 2.0)
CASES = [
    {"name": "fkl"},
    {"name": "rkl"},
    {"name": "tvd"},
    *({"name": "jsd", "teacher_weight": weight} for weight in (0.1, 0.5, 0.9)),
    *({"name": "sfkl", "alpha": alpha} for alpha in (0.1, 0.6)),
    *({"name": "srkl", "alpha": alpha} for alpha in (0.1, 0.6)),
]


def build(case):
    return kd_methods.build({"t_squared": True, **case})


def softmax(logits, temperature):
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def slow_divergence(case, teacher_logits, student_logits, temperature):
    """The table of divergences, for one token."""
    p, q = softmax(teacher_logits, temperature), softmax(student_logits, temperature)
    if case["name"] == "fkl":
        return kl(p, q)
    if case["name"] == "rkl":
        return kl(q, p)
    if case["name"] == "tvd":
        return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if case["name"] == "jsd":
        beta = case["teacher_weight"]
        mixture = mix(p, q, beta)
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if case["name"] == "sfkl":
        return kl(p, mix(p, q, case["alpha"]))
    assert case["name"] == "srkl"
    return kl(q, mix(q, p, case["alpha"]))


def slow_gradient(case, teacher_logits, student_logits, temperature, step=1e-5):
    gradient = []
    for i in range(len(student_logits)):
        up, down = list(student_logits), list(student_logits)
        up[i] += step
        down[i] -= step
        difference = slow_divergence(case, teacher_logits, up, temperature)
        difference -= slow_divergence(case, teacher_logits, down, temperature)
        gradient.append(difference / (2 * step))
    return gradient


def divergence_and_gradient(method, teacher_logits, student_logits, temperature):
    student = student_logits.clone().requires_grad_(True)
    divergence = method((student / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1))
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    return divergence.detach(), gradient


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, 11, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_divergence_in_float64_equals_the_slow_version_in_value_and_gradient(case, temperature):
    teacher, student = logits(1), logits(2)

    values, gradient = divergence_and_gradient(build(case), teacher, student, temperature)

    for row in range(len(teacher)):
        arguments = case, teacher[row].tolist(), student[row].tolist(), temperature
        assert values[row].item() == pytest.approx(slow_divergence(*arguments), rel=1e-10, abs=1e-12)
        assert gradient[row].tolist() == pytest.approx(slow_gradient(*arguments), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_divergence_in_float32_is_close_to_float64(case):
    teacher, student = logits(1), logits(2)
    exact = divergence_and_gradient(build(case), teacher, student, 1.0)

    rounded = divergence_and_gradient(build(case), teacher.float(), student.float(), 1.0)

    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def oracle_cases():
    folder = Path(os.environ.get("POCL_SHARED", Path(__file__).parents[4] / "shared"))
    path = folder / "data" / "oracle" / "divergences.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.shared
def test_divergences_on_the_oracle_logits_equal_the_oracle_file():
    oracle = oracle_cases()
    if oracle is None:
        pytest.skip("no data/oracle/divergences.json beside the project (POCL_SHARED)")
    teacher = torch.tensor(oracle["teacher_logits"], dtype=torch.float64)
    student = torch.tensor(oracle["student_logits"], dtype=torch.float64)
    assert len(oracle["cases"]) == 21

    for case in oracle["cases"]:
        parameters = {key: case[key] for key in ("teacher_weight", "alpha") if key in case}
        method = build({"name": case["kd_method"], **parameters})
        values, gradient = divergence_and_gradient(method, teacher, student, case["temperature"])

        assert values.tolist() == pytest.approx(case["per_token_nats"], rel=1e-9), case["kd_method"]
        expected = torch.tensor(case["gradient_of_mean_wrt_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(gradient / len(teacher), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "same_as"),
    [
        ({"name": "sfkl", "alpha": 0.0}, {"name": "fkl"}),
        ({"name": "srkl", "alpha": 0.0}, {"name": "rkl"}),
        ({"name": "sfkl", "alpha": 1.0}, None),
        ({"name": "srkl", "alpha": 1.0}, None),
        ({"name": "jsd", "teacher_weight": 0.0}, None),
        ({"name": "jsd", "teacher_weight": 1.0}, None),
    ],
    ids=str,
)
def test_divergence_at_the_end_of_its_range_is_finite_and_its_limit(case, same_as):
    teacher, student = logits(1).log_softmax(-1), logits(2).log_softmax(-1)

    values = build(case)(student, teacher)

    expected = build(same_as)(student, teacher) if same_as else torch.zeros(len(student), dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_jsd_without_weight_on_a_teacher_whose_term_is_infinite_is_zero():
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()

    assert build({"name": "jsd", "teacher_weight": 0.0})(student, teacher).item() == 0


def test_jsd_with_swapped_weight_and_sides_is_the_same():
    teacher, student = logits(1).log_softmax(-1), logits(2).log_softmax(-1)

    one = build({"name": "jsd", "teacher_weight": 0.2})(student, teacher)
    other = build({"name": "jsd", "teacher_weight": 0.8})(teacher, student)

    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_divergence_where_the_student_rules_out_a_likely_token_is_its_true_value(case):
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    student = torch.tensor([[1.0, 0.0, 0.0]]).log()

    value = build(case)(student, teacher).item()

    if case["name"] == "fkl":
        assert value == math.inf
    else:
        assert math.isfinite(value)
        assert value > 0


@pytest.mark.parametrize(
    "values",
    [
        {"name": "sfkl", "alpha": 1.5, "t_squared": True},
        {"name": "srkl", "alpha": -0.1, "t_squared": True},
        {"name": "jsd", "teacher_weight": 2, "t_squared": True},
        {"name": "jsd", "t_squared": True},
        {"name": "fkl", "t_squared": True, "alpha": 0.1},
        {"name": "sft", "t_squared": True},
    ],
    ids=str,
)
def test_building_a_method_from_wrong_values_is_refused(values):
    with pytest.raises(ValidationError):
        kd_methods.build(values)


def test_importing_every_method_does_not_import_torch():
    code = "import sys; from pocl_cli.registry import kd_methods; kd_methods.names(); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
