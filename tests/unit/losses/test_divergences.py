"""Each shipped divergence against a slow version in Python floats, and against the project's oracle file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pocl_cli.registry import kd_methods

TEMPERATURES = (1.0, 4 / 3, 2.0)
TAID = {"schedule": "linear", "t_end": 1.0, "rate": 5e-4, "momentum": 0.99}
CASES = [
    {"name": "fkl"},
    {"name": "rkl"},
    {"name": "tvd"},
    *({"name": "jsd", "teacher_weight": weight} for weight in (0.1, 0.5, 0.9)),
    *({"name": "sfkl", "alpha": alpha} for alpha in (0.1, 0.6)),
    *({"name": "srkl", "alpha": alpha} for alpha in (0.1, 0.6)),
    *({"name": "symkl", "forward_weight": weight} for weight in (0.0, 0.3, 1.0)),
    *({"name": "akl", "head_mass": mass} for mass in (0.2, 0.5, 0.9)),
    *({"name": "todi", "sharpness": sharpness} for sharpness in (0.0, 1.0, 3.0)),
    *(
        {"name": "abkd", "alpha": alpha, "beta": beta}
        for alpha, beta in ((0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 2.0), (1.0, 1.0), (1e-6, 1.0))
    ),
    *({"name": "taid", **TAID, "t_start": t} for t in (0.0, 0.4, 1.0)),
    {"name": "ranking", "base": {"name": "rkl", "t_squared": True}, "weight": 0.7, "top_k": 4},
    {"name": "ranking", "base": {"name": "fkl", "t_squared": False}, "weight": 2.0, "top_k": 50},
]
SAMPLED = {"sampling_temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8}
GKD = {"name": "gkd", "base": {"name": "tvd", "t_squared": True}, "student_share": 0.5, **SAMPLED}
SKEW = {"name": "srkl", "alpha": 0.1}
FOLLOWED = {"share_start": 0.0, "share_step": 0.1, "tolerance": 0.1, "buffer_size": 9}
DISTILLM = {"name": "distillm", "base": {**SKEW, "t_squared": True}, **FOLLOWED, **SAMPLED}
ANSWERS = {"decoding": {**SAMPLED, "no_repeat_ngram_size": 0, "seed": 1}}
DISTILLM2 = {"name": "distillm2", "student_weight_end": 1.5, **ANSWERS}
CASES += [{**DISTILLM2, "alpha": alpha} for alpha in (0.1, 0.6)]
LIMIT_OF_FORWARD = ({"name": "symkl", "forward_weight": 1.0}, {"name": "abkd", "alpha": 1.0, "beta": 0.0})


def build(case):
    # The t_squared of a ranking is that of its base.
    return kd_methods.build({**({} if "base" in case else {"t_squared": True}), **case})


def softmax(logits, temperature):
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def slow_divergence(case, teacher_logits, student_logits, temperature, held_logits=None):
    """The table of divergences, for one token. `held_logits`: the student's, where they count as a constant."""
    held_logits = student_logits if held_logits is None else held_logits
    p, q = softmax(teacher_logits, temperature), softmax(student_logits, temperature)
    held = softmax(held_logits, temperature)
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
    if case["name"] == "srkl":
        return kl(q, mix(q, p, case["alpha"]))
    if case["name"] == "distillm2":
        return kl(p, mix(p, q, case["alpha"])) + kl(q, mix(q, p, case["alpha"]))
    if case["name"] == "symkl":
        return case["forward_weight"] * kl(p, q) + (1 - case["forward_weight"]) * kl(q, p)
    if case["name"] == "akl":
        weight = head_weight(p, held, case["head_mass"])
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    if case["name"] == "todi":
        weights = [1 / (1 + (c / a) ** case["sharpness"]) for a, c in zip(p, held, strict=True)]
        terms = zip(weights, p, q, strict=True)
        return math.fsum(w * a * math.log(a / b) + (1 - w) * b * math.log(b / a) for w, a, b in terms)
    if case["name"] == "abkd":
        return math.fsum(alpha_beta(case["alpha"], case["beta"], a, b) for a, b in zip(p, q, strict=True))
    if case["name"] == "taid":
        t = case["t_start"]
        logits = [(1 - t) * one + t * other for one, other in zip(held_logits, teacher_logits, strict=True)]
        return kl(softmax(logits, temperature), q)
    assert case["name"] == "ranking"
    base = slow_divergence(case["base"], teacher_logits, student_logits, temperature)
    return base + case["weight"] * rank_distance(p, q, case["top_k"])


def head_weight(p, q, mass):
    """The share of Σ|p − q| that lies in the smallest set of likeliest entries with probability `mass`."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    size = next((n for n in range(1, len(p)) if math.fsum(p[i] for i in order[:n]) >= mass), len(p))
    return math.fsum(abs(p[i] - q[i]) for i in order[:size]) / math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def alpha_beta(alpha, beta, a, b):
    """One term of the α-β divergence, its limits written out; near a limit in exact fractions of a long decimal."""
    if beta == 0:
        return (alpha * a**alpha * math.log(a / b) - a**alpha + b**alpha) / alpha**2
    if alpha == 0:
        return alpha_beta(beta, 0, b, a)
    with localcontext(prec=50):
        alpha, beta, a, b = (Decimal(x) for x in (alpha, beta, a, b))
        both = alpha + beta
        return float((alpha * a**both + beta * b**both - both * a**alpha * b**beta) / (alpha * beta * both))


def rank_distance(p, q, top_k):
    """6 Σ (r − s)² / (n (n² − 1)) over the union of both sides' likeliest entries, with ranks of pairwise sigmoids."""
    union = {i for side in (p, q) for i in sorted(range(len(p)), key=lambda i: -side[i])[:top_k]}
    n = len(union)

    def rank(side, i):
        return 1 + math.fsum(side[j] / (side[i] + side[j]) for j in union if j != i)

    return 6 * math.fsum((rank(p, i) - rank(q, i)) ** 2 for i in union) / (n * (n**2 - 1))


def slow_gradient(case, teacher_logits, student_logits, temperature, step=1e-5):
    gradient = []
    for i in range(len(student_logits)):
        up, down = list(student_logits), list(student_logits)
        up[i] += step
        down[i] -= step
        difference = slow_divergence(case, teacher_logits, up, temperature, student_logits)
        difference -= slow_divergence(case, teacher_logits, down, temperature, student_logits)
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
        ({"name": "symkl", "forward_weight": 1.0}, {"name": "fkl"}),
        ({"name": "symkl", "forward_weight": 0.0}, {"name": "rkl"}),
        ({"name": "abkd", "alpha": 1.0, "beta": 0.0}, {"name": "fkl"}),
        ({"name": "abkd", "alpha": 0.0, "beta": 1.0}, {"name": "rkl"}),
        ({"name": "taid", **TAID, "t_start": 1.0}, {"name": "fkl"}),
        ({"name": "taid", **TAID, "t_start": 0.0}, None),
        ({"name": "todi", "sharpness": 0.0}, {"name": "symkl", "forward_weight": 0.5}),
        ({"name": "ranking", "base": {"name": "tvd", "t_squared": True}, "weight": 0.0, "top_k": 3}, {"name": "tvd"}),
        (GKD, {"name": "tvd"}),
        (DISTILLM, SKEW),
    ],
    ids=str,
)
def test_divergence_at_the_end_of_its_range_is_finite_and_its_limit_in_value_and_gradient(case, same_as):
    teacher, student = logits(1), logits(2)

    values = build(case)(student.log_softmax(-1), teacher.log_softmax(-1))

    if same_as is None:
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)
        return
    _, gradient = divergence_and_gradient(build(case), teacher, student, 1.0)
    expected, expected_gradient = divergence_and_gradient(build(same_as), teacher, student, 1.0)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "factor", "limit", "rtol"),
    [
        ({"name": "sfkl", "alpha": 1e-6}, 1, {"name": "fkl"}, 1e-4),
        ({"name": "srkl", "alpha": 1e-6}, 1, {"name": "rkl"}, 1e-4),
        # Slowly: the difference is of the order of β·log β.
        ({"name": "jsd", "teacher_weight": 1e-3}, 1e3, {"name": "fkl"}, 0.05),
        ({"name": "jsd", "teacher_weight": 1 - 1e-3}, 1e3, {"name": "rkl"}, 0.05),
        ({"name": "jsd", "teacher_weight": 1e-6}, 1e6, {"name": "fkl"}, 1e-4),
        ({"name": "jsd", "teacher_weight": 1 - 1e-6}, 1e6, {"name": "rkl"}, 1e-4),
        ({"name": "abkd", "alpha": 1.0, "beta": 1e-6}, 1, {"name": "fkl"}, 1e-4),
        ({"name": "abkd", "alpha": 1e-6, "beta": 1.0}, 1, {"name": "rkl"}, 1e-4),
        ({"name": "taid", **TAID, "t_start": 1 - 1e-6}, 1, {"name": "fkl"}, 1e-4),
        ({"name": "akl", "head_mass": 1 - 1e-12}, 1, {"name": "fkl"}, 1e-4),
        ({"name": "symkl", "forward_weight": 1 - 1e-6}, 1, {"name": "fkl"}, 1e-4),
    ],
    ids=str,
)
def test_divergence_near_the_end_of_its_range_approaches_its_limit(case, factor, limit, rtol):
    teacher, student = (logits(1) / 3).log_softmax(-1), (logits(2) / 3).log_softmax(-1)

    values = factor * build(case)(student, teacher)

    torch.testing.assert_close(values, build(limit)(student, teacher), rtol=rtol, atol=0)


def test_abkd_at_a_half_and_at_one_is_the_squared_hellinger_and_the_squared_euclidean_distance():
    p, q = logits(1).softmax(-1), logits(2).softmax(-1)

    halves = build({"name": "abkd", "alpha": 0.5, "beta": 0.5})(q.log(), p.log())
    ones = build({"name": "abkd", "alpha": 1.0, "beta": 1.0})(q.log(), p.log())

    torch.testing.assert_close(halves, 2 * (p.sqrt() - q.sqrt()).square().sum(-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(ones, (p - q).square().sum(-1) / 2, rtol=1e-10, atol=0)


def test_todi_of_the_paper_has_the_value_of_both_kl_together_and_another_gradient():
    teacher, student = logits(1), logits(2)
    both = {"name": "symkl", "forward_weight": 0.5}

    values, gradient = divergence_and_gradient(build({"name": "todi", "sharpness": 1.0}), teacher, student, 1.0)

    expected, other_gradient = divergence_and_gradient(build(both), teacher, student, 1.0)
    torch.testing.assert_close(values, 2 * expected, rtol=1e-10, atol=0)
    assert (gradient - 2 * other_gradient).abs().max() > 0.01


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.9])
def test_akl_lies_between_forward_and_reverse_kl(head_mass):
    teacher, student = logits(1).log_softmax(-1), logits(2).log_softmax(-1)

    values = build({"name": "akl", "head_mass": head_mass})(student, teacher)

    ends = torch.stack([build({"name": name})(student, teacher) for name in ("fkl", "rkl")])
    assert (values > ends.min(0).values).all()
    assert (values < ends.max(0).values).all()


def ranking_alone(student, teacher, top_k=3):
    """The ranking loss without its base, of probabilities that differ by many nats, so that soft ranks are ranks."""
    case = {"name": "ranking", "base": {"name": "tvd", "t_squared": True}, "top_k": top_k}
    student, teacher = (torch.tensor([side], dtype=torch.float64).log_softmax(-1) for side in (student, teacher))
    both, without = (build({**case, "weight": weight})(student, teacher).item() for weight in (1.0, 0.0))
    return both - without


def test_ranking_of_the_same_order_is_zero_and_of_the_reverse_two():
    assert ranking_alone([300, 200, 100], [900, 500, 100]) == pytest.approx(0, abs=1e-9)
    assert ranking_alone([100, 200, 300], [900, 500, 100]) == pytest.approx(2, abs=1e-9)


def test_ranking_counts_the_union_of_both_likeliest_sets_and_nothing_else():
    # Ranked are columns 0, 1 (the teacher's) and 1, 2 (the student's): 1 2 3 against 3 2 1. Column 3 counts on no side.
    teacher, student = [900, 700, 500, 100], [500, 700, 900, 100]

    assert ranking_alone(student, teacher, top_k=2) == pytest.approx(2, abs=1e-9)
    assert ranking_alone([500, 700, 900, 400], teacher, top_k=2) == pytest.approx(2, abs=1e-9)


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

    if case["name"] in ("fkl", "akl", "todi") or case.get("base", {}).get("name") == "fkl":
        assert value == math.inf
    elif case in LIMIT_OF_FORWARD or case.get("forward_weight") or case.get("beta") == 0:
        assert value > 1e9
    elif case["name"] == "taid":
        assert value >= 0
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
        {"name": "symkl", "forward_weight": 1.1, "t_squared": True},
        {**DISTILLM2, "alpha": 1.0, "t_squared": True},
        {**DISTILLM2, "alpha": 0.1, "student_weight_end": 0.5, "t_squared": True},
        {"name": "akl", "head_mass": 0.0, "t_squared": True},
        {"name": "akl", "head_mass": 1.0, "t_squared": True},
        {"name": "todi", "sharpness": -1.0, "t_squared": True},
        {"name": "abkd", "alpha": 0.0, "beta": 0.0, "t_squared": True},
        {"name": "abkd", "alpha": -0.2, "beta": 0.7, "t_squared": True},
        {"name": "taid", **TAID, "t_start": 0.9, "t_end": 0.5, "t_squared": True},
        {"name": "taid", **TAID, "t_start": 0.4, "schedule": "cubic", "t_squared": True},
        {"name": "ranking", "base": {"name": "sft"}, "weight": 1.0, "top_k": 5},
        {"name": "ranking", "base": {"name": "jsd", "t_squared": True}, "weight": 1.0, "top_k": 5},
        {"name": "ranking", "base": {"name": "fkl", "t_squared": True}, "weight": 1.0, "top_k": 1},
        {"name": "ranking", "base": GKD, "weight": 1.0, "top_k": 5},
        {**GKD, "base": GKD},
        {**GKD, "base": {"name": "sft"}},
        {**GKD, "student_share": 1.1},
        {**GKD, "top_p": 0.0},
        {**GKD, "t_squared": True},
        {**DISTILLM, "share_start": 1.1},
        {**DISTILLM, "buffer_size": 0},
        {**DISTILLM, "base": DISTILLM},
    ],
    ids=str,
)
def test_building_a_method_from_wrong_values_is_refused(values):
    with pytest.raises(ValidationError):
        kd_methods.build(values)


def test_importing_every_method_does_not_import_torch():
    code = "import sys; from pocl_cli.registry import kd_methods; kd_methods.names(); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
