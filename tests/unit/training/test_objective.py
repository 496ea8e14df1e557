"""The objective against the plain formulation: full logits, shifted labels, one autograd graph, float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_cli.models.head import OutputHead, split_model
from pocl_cli.records import TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training import objective
from pocl_cli.training.objective import (
    collate,
    cross_entropy_per_token,
    distillation_loss,
    effective_kd_ratio,
    response_positions,
    tokens_per_chunk,
)

CONF = Path(__file__).parents[3] / "conf" / "kd_method"
NUM_TOKENS, STUDENT_SIZE, TEACHER_SIZE = 11, 6, 8
REAL_TOKENS, STUDENT_WIDTH, TEACHER_WIDTH = 13, 14, 17
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def method(name, **changes):
    return kd_methods.build({**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **changes})


NAMES = kd_methods.names()


class Case:
    """Random hidden states, heads and targets; both heads are wider than the vocabulary, each by its own padding."""

    def __init__(self, num_tokens=NUM_TOKENS, dtype=torch.float64):
        torch.manual_seed(0)
        self.hidden = torch.randn(num_tokens, STUDENT_SIZE, dtype=dtype, requires_grad=True)
        self.head = OutputHead(nn.Linear(STUDENT_SIZE, STUDENT_WIDTH, dtype=dtype), STUDENT_WIDTH)
        self.teacher_hidden = torch.randn(num_tokens, TEACHER_SIZE, dtype=dtype)
        self.teacher_head = OutputHead(nn.Linear(TEACHER_SIZE, TEACHER_WIDTH, dtype=dtype), TEACHER_WIDTH)
        self.teacher_head.requires_grad_(False)
        self.targets = torch.randint(REAL_TOKENS, (num_tokens,))

    def loss(self, **changes):
        arguments = {
            "method": method("fkl"),
            "kd_ratio": 0.3,
            "temperature": 4 / 3,
            "teacher_hidden_NE": self.teacher_hidden,
            "teacher_head": self.teacher_head,
            "num_real_tokens": REAL_TOKENS,
            "normaliser": 20.0,
            "chunk_tokens": 3,
        }
        return distillation_loss(self.hidden, self.head, self.targets, **{**arguments, **changes})

    def plain_loss(self, method, kd_ratio, temperature, normaliser=20.0):
        logits = self.head(self.hidden)[:, :REAL_TOKENS]
        ce = F.cross_entropy(logits, self.targets, reduction="sum")
        if not method.needs_teacher:
            return ce / normaliser
        teacher = self.teacher_head(self.teacher_hidden)[:, :REAL_TOKENS]
        kd = method(F.log_softmax(logits / temperature, -1), F.log_softmax(teacher / temperature, -1)).sum()
        factor = temperature**2 if method.t_squared else 1
        return ((1 - kd_ratio) * ce + kd_ratio * factor * kd) / normaliser

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, *self.head.parameters()))


@pytest.fixture
def case():
    return Case()


# ── rows → batch ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_response_positions_are_one_before_the_response():
    assert list(response_positions(4, 3)) == [3, 4, 5]


def test_response_positions_without_a_prompt_stop():
    with pytest.raises(AssertionError, match="prompt"):
        response_positions(0, 3)


def test_collate_of_rows_of_unequal_length_puts_them_one_after_another_and_shifts_by_one():
    batch = collate([TokenisedRow("a", [5, 6], [7, 8, 9]), TokenisedRow("b", (3,), (4,))])

    assert batch.ids == ("a", "b")
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.selected_N.tolist() == [1, 2, 3, 5]
    assert batch.targets_N.tolist() == [7, 8, 9, 4]
    assert batch.num_response_tokens == 4


def test_batch_side_by_side_is_padded_on_the_right():
    rows = collate([TokenisedRow("a", [5, 6], [7, 8, 9]), TokenisedRow("b", (3,), (4,))]).padded()

    assert rows.input_ids_BL.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert rows.selected_N.tolist() == [1, 2, 3, 5]


def test_collate_where_eos_is_the_padding_token_keeps_eos_as_a_target():
    batch = collate([TokenisedRow("a", [5], [7, 0]), TokenisedRow("b", [5, 6, 6], [0])])

    assert batch.targets_N.tolist() == [7, 0, 0]
    assert batch.padded().selected_N.tolist() == [0, 1, 6]


def test_collate_of_a_row_without_response_selects_nothing_of_it():
    batch = collate([TokenisedRow("a", [5, 6], []), TokenisedRow("b", [5], [7])])

    assert batch.selected_N.tolist() == [2]
    assert batch.targets_N.tolist() == [7]


# ── one loss, one gradient ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [1.0, 4 / 3, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_every_method_equals_the_plain_formulation_with_all_gradients(case, name, temperature):
    chosen = method(name)

    ours = case.loss(method=chosen, temperature=temperature)

    plain = case.plain_loss(chosen, 0.3, temperature)
    torch.testing.assert_close(ours.loss, plain, **EXACT)
    for one, other in zip(case.gradients(ours.loss), case.gradients(plain), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t_squared", [True, False])
def test_loss_with_any_ratio_and_t_squared_equals_the_plain_formulation(case, t_squared, kd_ratio):
    chosen = method("rkl", t_squared=t_squared)

    ours = case.loss(method=chosen, temperature=2.0, kd_ratio=kd_ratio).loss

    plain = case.plain_loss(chosen, kd_ratio, 2.0)
    torch.testing.assert_close(ours, plain, **EXACT)
    for one, other in zip(case.gradients(ours), case.gradients(plain), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("chunk_tokens", [1, 4, NUM_TOKENS, 1000])
def test_loss_in_chunks_of_any_size_is_the_same_with_the_same_gradients(case, chunk_tokens):
    expected = case.loss(chunk_tokens=5).loss

    ours = case.loss(chunk_tokens=chunk_tokens).loss

    torch.testing.assert_close(ours, expected, **EXACT)
    for one, other in zip(case.gradients(ours), case.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_head_during_the_loss_never_sees_more_tokens_than_a_chunk(case):
    sizes = []
    for head in (case.head, case.teacher_head):
        head.projection.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))

    case.loss(chunk_tokens=4)

    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]


def test_reported_sums_are_the_two_terms_before_weights(case):
    output = case.loss(kd_ratio=0.25, temperature=2.0, method=method("fkl"))

    torch.testing.assert_close(output.loss, (0.75 * output.ce_sum + 0.25 * 4 * output.kd_sum) / 20, **EXACT)
    torch.testing.assert_close(output.ce_N.sum(), output.ce_sum)
    torch.testing.assert_close(output.kd_N.sum(), output.kd_sum)
    assert output.num_tokens.item() == NUM_TOKENS
    assert not any(part.requires_grad for part in output[1:])


def test_loss_with_ratio_1_reports_cross_entropy_that_gives_no_gradient(case):
    output = case.loss(kd_ratio=1.0)

    expected = F.cross_entropy(case.head(case.hidden)[:, :REAL_TOKENS], case.targets, reduction="sum")
    torch.testing.assert_close(output.ce_sum, expected, **EXACT)
    torch.testing.assert_close(output.loss, 16 / 9 * output.kd_sum / 20, **EXACT)


def test_loss_with_ratio_1_where_the_gold_token_is_impossible_stays_finite(case):
    with torch.no_grad():
        case.head.projection.bias[case.targets[0]] = -torch.inf

    output = case.loss(kd_ratio=1.0, method=method("tvd"))

    assert output.ce_sum == torch.inf
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in case.gradients(output.loss))


@pytest.mark.parametrize(
    "changes", [{"kd_ratio": 0.0}, {"method": method("sft"), "kd_ratio": 0.9}], ids=["ratio 0", "sft"]
)
def test_loss_without_distillation_needs_no_teacher_and_is_the_mean_cross_entropy(case, changes):
    output = case.loss(**changes, teacher_hidden_NE=None, teacher_head=None, normaliser=float(NUM_TOKENS))

    expected = F.cross_entropy(case.head(case.hidden)[:, :REAL_TOKENS], case.targets)
    torch.testing.assert_close(output.loss, expected, **EXACT)
    assert output.kd_sum == 0
    assert effective_kd_ratio(changes.get("method", method("fkl")), changes["kd_ratio"]) == 0


def test_loss_with_distillation_but_no_teacher_stops(case):
    with pytest.raises(AssertionError, match="needs the teacher's"):
        case.loss(teacher_hidden_NE=None)


def test_loss_of_a_method_that_ignores_the_student_gives_zero_gradients(case):
    output = case.loss(method=method("sfkl", alpha=1.0), kd_ratio=1.0)

    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in case.gradients(output.loss))


def test_padding_rows_of_the_output_layer_get_no_gradient(case):
    _, weight_gradient, bias_gradient = case.gradients(case.loss().loss)

    assert (weight_gradient[REAL_TOKENS:] == 0).all()
    assert (bias_gradient[REAL_TOKENS:] == 0).all()
    assert (weight_gradient[:REAL_TOKENS] != 0).any(dim=1).all()


def test_backward_of_a_scaled_loss_scales_the_gradients(case):
    once, twice = case.gradients(case.loss().loss), case.gradients(-2 * case.loss().loss)

    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(other, -2 * one, **EXACT)


def test_loss_through_a_capped_and_scaled_head_has_the_plain_gradients(case):
    case.head = OutputHead(case.head.projection, STUDENT_WIDTH, multiplier=2.0, soft_cap=1.5)

    ours, plain = case.loss(), case.plain_loss(method("fkl"), 0.3, 4 / 3)

    torch.testing.assert_close(ours.loss, plain, **EXACT)
    for one, other in zip(case.gradients(ours.loss), case.gradients(plain), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_loss_through_a_frozen_head_gives_gradients_to_the_hidden_states_alone(case):
    (expected, *_) = case.gradients(case.loss().loss)
    case.head.requires_grad_(False)

    case.loss().loss.backward()

    torch.testing.assert_close(case.hidden.grad, expected, **EXACT)
    assert case.head.projection.weight.grad is None


def test_loss_under_no_grad_has_the_same_values_and_computes_no_gradient(case):
    trained = case.loss()
    graphs = []
    case.head.projection.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))

    with torch.no_grad():
        evaluated = case.loss()

    assert not any(graphs)
    assert not evaluated.loss.requires_grad
    for one, other in zip(evaluated, trained, strict=True):
        torch.testing.assert_close(one, other.detach(), **EXACT)


@pytest.mark.parametrize("normaliser", [20.0, 0.0])
def test_loss_of_no_token_is_zero_with_zero_gradients_for_every_parameter(normaliser):
    case = Case(num_tokens=0)

    output = case.loss(normaliser=normaliser)
    output.loss.backward()

    assert output.loss == output.ce_sum == output.kd_sum == output.num_tokens == 0
    assert case.hidden.grad.shape == case.hidden.shape
    assert all((parameter.grad == 0).all() for parameter in case.head.parameters())


# ── precision ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_bfloat16(case):
    case.hidden = case.hidden.detach().bfloat16().requires_grad_(True)
    case.teacher_hidden = case.teacher_hidden.bfloat16()
    case.head.bfloat16()
    case.teacher_head.bfloat16()


def test_loss_of_a_bfloat16_model_is_made_in_float32_from_its_logits(case):
    in_bfloat16(case)

    output = case.loss()

    logits = case.head(case.hidden)[:, :REAL_TOKENS].double()
    expected = F.cross_entropy(logits, case.targets, reduction="sum")
    assert output.loss.dtype == output.ce_sum.dtype == torch.float32
    assert output.ce_sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_a_bfloat16_head_add_up_over_chunks_without_losing_bits():
    case = Case(num_tokens=600)
    in_bfloat16(case)
    whole = case.gradients(case.loss(chunk_tokens=600).loss)

    chunked = case.gradients(case.loss(chunk_tokens=1).loss)

    assert [gradient.dtype for gradient in chunked] == [torch.bfloat16] * 3
    for one, other in zip(chunked, whole, strict=True):
        # Added up in bfloat16, the error would be many times the format's own rounding (0.4 %).
        assert (one - other).float().norm() <= 0.004 * other.float().norm()


def test_loss_under_autocast_has_float32_gradients_near_those_without_it_in_any_chunks():
    case = Case(dtype=torch.float32)
    expected = case.gradients(case.loss().loss)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            # Autocast remembers a weight's 16-bit copy; one that was made without a graph must not be used below.
            case.loss()
        outputs = case.loss(chunk_tokens=NUM_TOKENS), case.loss(chunk_tokens=2)

    for output in outputs:
        assert output.loss.dtype == torch.float32
        for one, other in zip(case.gradients(output.loss), expected, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=5e-2, atol=2e-3)


# ── through whole models ──────────────────────────────────────────────────────────────────────────────────────────────

SIZES = {
    "llama": {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt2": {
        "n_embd": 12,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}
EOS = 0
ROWS = [
    TokenisedRow(
        f"r{i}", [1 + (i * 5 + j) % 12 for j in range(prompt)], [*(1 + (i + 3 * j) % 12 for j in range(size)), EOS]
    )
    for i, (prompt, size) in enumerate([(2, 3), (5, 1), (1, 6), (4, 0), (3, 2), (2, 2), (6, 5), (1, 1)])
]
NUM_RESPONSE_TOKENS = float(sum(len(row.response_ids) for row in ROWS))


def make_model(model_type, width, seed, tied=True):
    torch.manual_seed(seed)
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(model_type, vocab_size=width, **SIZES[model_type], **special)
    return AutoModelForCausalLM.from_config(config).double()


def train_on(student, teacher, rows, micro_batch=None, normaliser=NUM_RESPONSE_TOKENS):
    """Accumulates gradients over micro-batches; the total loss."""
    total = 0.0
    for start in range(0, len(rows), micro_batch or len(rows)):
        batch = collate(rows[start : start + (micro_batch or len(rows))])
        with torch.no_grad():
            teacher_hidden = teacher.hidden_states(batch)
        output = distillation_loss(
            student.hidden_states(batch),
            student.head,
            batch.targets_N,
            method=method("jsd"),
            kd_ratio=0.7,
            temperature=4 / 3,
            teacher_hidden_NE=teacher_hidden,
            teacher_head=teacher.head,
            num_real_tokens=REAL_TOKENS,
            normaliser=normaliser,
            chunk_tokens=4,
        )
        output.loss.backward()
        total += output.loss.item()
    return total


def train_plainly(student, teacher, rows, normaliser=NUM_RESPONSE_TOKENS):
    """Row by row without padding: full logits, labels shifted here."""
    total = 0.0
    for row in rows:
        input_ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        labels = input_ids[0, 1:]
        is_response = torch.arange(1, input_ids.shape[1]) >= len(row.prompt_ids)
        student_logits = student(input_ids=input_ids).logits[0, :-1, :REAL_TOKENS]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=input_ids).logits[0, :-1, :REAL_TOKENS]
        ce = F.cross_entropy(student_logits, labels, reduction="none")
        kd = method("jsd")((student_logits * 3 / 4).log_softmax(-1), (teacher_logits * 3 / 4).log_softmax(-1))
        loss = ((0.3 * ce + 0.7 * (4 / 3) ** 2 * kd) * is_response).sum() / normaliser
        loss.backward()
        total += loss.item()
    return total


def gradient_norm(model):
    return torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", SIZES)
def test_training_step_through_a_model_equals_full_logits_in_the_gradient_of_every_parameter(model_type, tied):
    student = make_model(model_type, STUDENT_WIDTH, seed=1, tied=tied)
    teacher = make_model(model_type, TEACHER_WIDTH, seed=2).eval()
    reference = copy.deepcopy(student)

    loss = train_on(split_model(student), split_model(teacher), ROWS)

    assert loss == pytest.approx(train_plainly(reference, teacher, ROWS), rel=1e-10)
    for (name, ours), theirs in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11, msg=name)
    assert gradient_norm(student) > 0


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("model_type", SIZES)
def test_training_step_split_into_micro_batches_has_the_loss_and_gradient_norm_of_the_whole(model_type, micro_batch):
    student = split_model(make_model(model_type, STUDENT_WIDTH, seed=1))
    teacher = split_model(make_model(model_type, TEACHER_WIDTH, seed=2).eval())
    whole = train_on(student, teacher, ROWS), gradient_norm(student)
    student.zero_grad()

    split = train_on(student, teacher, ROWS, micro_batch), gradient_norm(student)

    assert split == pytest.approx(whole, rel=1e-10)


def test_training_step_where_no_row_has_a_response_gives_every_parameter_a_zero_gradient():
    student = split_model(make_model("llama", STUDENT_WIDTH, seed=1))
    teacher = split_model(make_model("llama", TEACHER_WIDTH, seed=2).eval())

    loss = train_on(student, teacher, [TokenisedRow("a", [1, 2], []), TokenisedRow("b", [3], [])])

    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in student.parameters())


def test_gradient_of_prompt_and_last_positions_is_zero():
    batch = collate(ROWS[:3])
    case = Case()
    hidden = torch.randn(len(batch.input_ids_T), STUDENT_SIZE, dtype=torch.float64, requires_grad=True)
    case.hidden, case.targets = hidden[batch.selected_N], batch.targets_N

    case.loss(method=method("sft")).loss.backward()

    others = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, batch.selected_N, False)
    assert (hidden.grad[others] == 0).all()
    assert (hidden.grad[~others] != 0).any(dim=1).all()


# ── scoring and sizes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_cross_entropy_per_token_is_the_log_likelihood_over_the_real_tokens(case, chunk_tokens):
    values = cross_entropy_per_token(
        case.hidden, case.head, case.targets, num_real_tokens=REAL_TOKENS, chunk_tokens=chunk_tokens
    )

    expected = F.cross_entropy(case.head(case.hidden)[:, :REAL_TOKENS], case.targets, reduction="none")
    torch.testing.assert_close(values, expected.detach(), **EXACT)
    assert not values.requires_grad


def test_cross_entropy_of_no_token_is_empty():
    case = Case(num_tokens=0)

    values = cross_entropy_per_token(case.hidden, case.head, case.targets, num_real_tokens=REAL_TOKENS, chunk_tokens=4)

    assert values.shape == (0,)


@pytest.mark.parametrize(
    ("num_logits", "memory_mb", "device", "expected"),
    [
        (50_000, 512, "cpu", 871),  # five tokens a tile: 14 of the 512 MiB
        (50_000, 512, "meta", 157),
        (50_000, 1, "cpu", 1),
        (100, 1, "cpu", 154),  # fewer than a tile
    ],
)
def test_tokens_per_chunk_fills_the_budget_and_is_at_least_one(num_logits, memory_mb, device, expected):
    assert tokens_per_chunk(num_logits, memory_mb, torch.device(device)) == expected


@pytest.mark.parametrize("tile_bytes", [1, 4 * STUDENT_WIDTH * 3, 10**6])
@pytest.mark.parametrize("name", NAMES)
def test_loss_in_tiles_of_any_size_has_the_plain_value_and_gradients(case, name, tile_bytes, monkeypatch):
    monkeypatch.setattr(objective, "TILE_BYTES_ON_CPU", tile_bytes)
    chosen = method(name)

    ours, plain = case.loss(method=chosen, chunk_tokens=7), case.plain_loss(chosen, 0.3, 4 / 3)

    torch.testing.assert_close(ours.loss, plain, **EXACT)
    for one, other in zip(case.gradients(ours.loss), case.gradients(plain), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


class WithSquash(nn.Module):
    """A projection that keeps its output for its backward pass, and has a parameter which it does not use."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.unused = linear, nn.Parameter(torch.ones(2, dtype=linear.weight.dtype))

    def forward(self, hidden):
        return self.linear(hidden).tanh()


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_loss_through_a_projection_that_is_no_linear_layer_has_the_plain_gradients(case, chunk_tokens):
    case.head = OutputHead(WithSquash(case.head.projection), STUDENT_WIDTH)

    ours = case.loss(chunk_tokens=chunk_tokens).loss
    plain = case.plain_loss(method("fkl"), 0.3, 4 / 3) + 0 * case.head.projection.unused.sum()

    for one, other in zip(case.gradients(ours), case.gradients(plain), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_loss_on_hidden_states_that_are_logits_has_the_plain_gradient_and_leaves_them_as_they_are(case):
    case.hidden = torch.randn(NUM_TOKENS, STUDENT_WIDTH, dtype=torch.float64, requires_grad=True)
    case.head, before = OutputHead(None, STUDENT_WIDTH), case.hidden.detach().clone()

    ours, plain = case.loss().loss, case.plain_loss(method("fkl"), 0.3, 4 / 3)

    torch.testing.assert_close(case.gradients(ours)[0], case.gradients(plain)[0], **EXACT)
    assert torch.equal(case.hidden, before)


def test_backward_through_the_loss_works_once(case):
    loss = case.loss().loss
    case.gradients(loss * 1)

    with pytest.raises((AssertionError, RuntimeError)):
        case.gradients(loss * 1)
