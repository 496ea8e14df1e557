"""Stored hidden states: the numbers of the online teacher, the same bytes whoever asks first, computed once."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_cli import faults
from pocl_cli.artifacts import Artifact, ArtifactKey, Store, Work
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError, NonFiniteError
from pocl_cli.models.batch import Batch
from pocl_cli.models.head import split_model
from pocl_cli.models.teacher import OnlineTeacher, Teacher
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.records import TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import train
from pocl_cli.training.measure_teacher import measure_teacher
from pocl_cli.training.objective import collate
from pocl_cli.training.shards import SHARD_ROWS, in_shards
from pocl_cli.training.stored_teacher import StoredTeacher, open_teacher
from pocl_cli.training.teacher_signals import HIDDEN, TeacherSignals

from ...support.aborts import AbortAtOperation, Aborted
from ...support.training import (
    HARDWARE,
    TEACHER,
    RowsById,
    make_job,
    make_model,
    make_student,
    toy_rows,
    toy_tokenizer,
    train_lines,
)

# Three shards; the runs train on the first 12 rows, which lie in all of them.
ROWS = RowsById(toy_rows(2 * SHARD_ROWS + 20))
NUM_SHARDS = 3
VOCABULARY = num_real_tokens(toy_tokenizer())
NUM_RESPONSE_TOKENS = sum(len(row.response_ids) for row in ROWS.rows)
NUM_TOKENS = sum(row.num_tokens for row in ROWS.rows)
# What is stored are gold rows; a method whose student writes rows runs the teacher itself.
METHODS = [
    name
    for name in kd_methods.names()
    if kd_methods.get(name).needs_teacher and not hasattr(kd_methods.get(name), "rows_for_step")
]


def signals_in(folder: Path, rows: RowsById = ROWS, **identity: str) -> TeacherSignals:
    def shard_key(number: int, rows_sha256: str) -> ArtifactKey:
        return ArtifactKey("teacher_signals", f"t-on-rows-shard-{number:04d}", {**identity, "rows": rows_sha256}, 1)

    def commit(work: Work) -> Artifact:
        return work.commit(config={}, inputs={}, command=["pocl", "distill"], seed=None)

    head_key = ArtifactKey("teacher_signals", "t-head", {**identity, "part": "head"}, 1)
    return TeacherSignals(Store(folder / "outputs"), rows, head_key=head_key, shard_key=shard_key, commit=commit)


@dataclass
class Loader:
    """Loads a teacher, and remembers how often; draws random numbers as loading a model may."""

    teacher: OnlineTeacher
    times: int = field(default=0)

    def __call__(self) -> OnlineTeacher:
        self.times += 1
        torch.randn(7)
        return self.teacher


def must_not_load() -> OnlineTeacher:
    raise AssertionError("everything is stored: the model is not needed")


def random_teacher(dtype: torch.dtype = torch.float32, seed: int = 2) -> OnlineTeacher:
    return OnlineTeacher(split_model(make_model(TEACHER, seed, dtype=dtype, dropout=None)))


def stored(folder: Path, load: Callable[[], OnlineTeacher], rows: RowsById = ROWS) -> StoredTeacher:
    teacher = open_teacher(signals_in(folder, rows), load, hardware=HARDWARE)
    assert isinstance(teacher, StoredTeacher)
    return teacher


def batch_of(rows: Sequence[TokenisedRow]) -> Batch:
    return collate(rows)


def shard_folders(folder: Path) -> list[Path]:
    return sorted((folder / "outputs" / "teacher_signals").glob("*-shard-*"))


def content_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of what every visible artifact of the store holds, manifests apart."""
    found = sorted((folder / "outputs" / "teacher_signals").glob("t-*/*"))
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in found if path.name != "manifest.json"}


def fill(folder: Path, load: Callable[[], OnlineTeacher]) -> StoredTeacher:
    """As scoring does: shard after shard."""
    teacher = stored(folder, load)
    for ids in in_shards(ROWS):
        shard = [ROWS.row(row_id) for row_id in ids]
        measure_teacher(teacher, shard, num_real_tokens=VOCABULARY, hardware=HARDWARE)
    return teacher


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("filled")
    fill(folder, random_teacher)
    return content_hashes(folder)


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(
    folder: Path, method: str, source: Callable[[OnlineTeacher], Teacher], dtype: torch.dtype, dropout: float = 0.0
) -> list[float]:
    """Loss and gradient norm of each of the 10 steps of two stages."""
    student = make_student(method, dtype=dtype, dropout=dropout)
    assert isinstance(student.teacher, OnlineTeacher)
    student.teacher = source(student.teacher)
    train(make_job(folder, student=student))
    return [line[key] for line in train_lines(folder) for key in ("loss", "grad_norm")]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["64", "32"])
@pytest.mark.parametrize("method", METHODS)
def test_run_when_the_teacher_is_stored_before_or_meanwhile_then_its_numbers_are_those_of_the_online_one(
    tmp_path: Path, method: str, dtype: torch.dtype, error: float
) -> None:
    online = numbers(tmp_path / "online", method, lambda teacher: teacher, dtype)

    lazily = numbers(tmp_path / "lazily", method, lambda teacher: stored(tmp_path, Loader(teacher)), dtype)
    before = numbers(tmp_path / "before", method, lambda teacher: stored(tmp_path, must_not_load), dtype)

    assert lazily == pytest.approx(online, rel=error, abs=error)
    assert before == lazily
    assert len(online) == 2 * 10


def test_run_when_the_teacher_is_stored_meanwhile_then_the_students_dropout_does_not_notice(tmp_path: Path) -> None:
    # With the head there, the model is loaded in the middle of the first step, and not before.
    stored(tmp_path, lambda: make_student(dtype=torch.float64).teacher)  # type: ignore[arg-type, return-value]

    lazily = numbers(tmp_path / "one", "fkl", lambda one: stored(tmp_path, Loader(one)), torch.float64, dropout=0.3)
    before = numbers(tmp_path / "two", "fkl", lambda one: stored(tmp_path, must_not_load), torch.float64, dropout=0.3)

    assert lazily == before


def test_hidden_states_when_rows_come_in_any_order_then_are_the_online_teachers_row_by_row(tmp_path: Path) -> None:
    online = random_teacher(torch.float64)
    teacher = stored(tmp_path, Loader(online))
    rows = [ROWS.rows[i] for i in (150, 3, 270, 4, 3)]

    hidden = teacher.hidden_states(batch_of(rows))

    expected = torch.cat([online.hidden_states(batch_of([row])) for row in rows])
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(teacher.head(hidden), online.head(hidden))
    assert teacher.num_logits == online.num_logits


def test_store_when_the_teacher_has_16_bits_then_so_have_the_hidden_states(tmp_path: Path) -> None:
    online = random_teacher(torch.bfloat16)

    hidden = stored(tmp_path, lambda: online).hidden_states(batch_of(ROWS.rows[:2]))

    again = stored(tmp_path, must_not_load)
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(again.hidden_states(batch_of(ROWS.rows[:2])), hidden)
    assert torch.equal(again.head(hidden), online.head(hidden))


# ── the same bytes, once ──────────────────────────────────────────────────────────────────────────────────────────────


def test_store_when_a_run_of_other_rows_makes_it_then_has_the_bytes_that_scoring_gives(
    tmp_path: Path, filled: dict[str, str]
) -> None:
    teacher = stored(tmp_path, random_teacher)
    for row in reversed(ROWS.rows):
        teacher.hidden_states(batch_of([row, ROWS.rows[7]]))

    assert content_hashes(tmp_path) == filled
    assert len(filled) == 2 * NUM_SHARDS + 2


def test_teacher_when_a_row_has_no_response_then_has_no_states_of_it_and_does_not_run(tmp_path: Path) -> None:
    stored(tmp_path, random_teacher)
    teacher = stored(tmp_path, must_not_load)

    hidden_NE = teacher.hidden_states(batch_of([TokenisedRow("no record", [3], [])]))

    assert hidden_NE.shape == (0, TEACHER["hidden_size"])
    assert teacher.asked.total == 0


def test_teacher_when_asked_again_then_runs_once_for_each_shard_that_is_needed(tmp_path: Path) -> None:
    load = Loader(random_teacher())
    first = in_shards(ROWS)[0]
    teacher = stored(tmp_path, load)
    for _ in range(3):
        teacher.hidden_states(batch_of([ROWS.row(row_id) for row_id in first[:4]]))
    assert len(shard_folders(tmp_path)) == 1
    asked = sum(len(ROWS.row(row_id).response_ids) for row_id in first[:4])
    computed = sum(len(ROWS.row(row_id).response_ids) for row_id in first)
    assert (teacher.asked.response, teacher.computed.response) == (3 * asked, computed)

    fill(tmp_path, load)
    again = fill(tmp_path, must_not_load)

    assert load.times == 2
    assert again.computed == (0, 0)
    assert again.asked == (NUM_RESPONSE_TOKENS, NUM_TOKENS)
    every, of_responses = f"{NUM_TOKENS:,}", f"{NUM_RESPONSE_TOKENS:,}"
    assert again.savings() == f"{every} of {every} ({of_responses} of {of_responses} response tokens)"
    assert teacher.savings().startswith("0 of ")


def test_teacher_when_the_last_shard_is_there_then_lets_the_model_go(tmp_path: Path) -> None:
    online = random_teacher()
    model = weakref.ref(online)
    teacher = stored(tmp_path, lambda: online)  # noqa: F821 - it is deleted below
    for ids in in_shards(ROWS):
        assert model() is not None
        teacher.hidden_states(batch_of([ROWS.row(ids[0])]))
    teacher._load = must_not_load  # the loader's own reference

    del online

    assert model() is None


def test_store_when_two_processes_fill_it_at_once_then_each_shard_is_computed_once(
    tmp_path: Path, filled: dict[str, str]
) -> None:
    def work(number: int) -> None:
        teacher = fill(tmp_path, random_teacher)
        (tmp_path / f"computed-{number}").write_text(str(teacher.computed.response))

    children = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            with suppress(BaseException):
                work(number)
                code = 0
            os._exit(code)
        children.append(pid)

    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert sum(int((tmp_path / f"computed-{number}").read_text()) for number in range(3)) == NUM_RESPONSE_TOKENS
    assert content_hashes(tmp_path) == filled
    assert list((tmp_path / "outputs" / ".work").iterdir()) == []


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_store_when_a_row_has_other_tokens_then_only_its_shard_is_another(tmp_path: Path) -> None:
    fill(tmp_path, random_teacher)
    changed = [*ROWS.rows]
    old = changed[5]
    changed[5] = TokenisedRow(old.id, old.prompt_ids, [*old.response_ids[:-1], old.response_ids[-1] + 1])

    again = signals_in(tmp_path, RowsById(changed))

    assert again.num_missing == 1
    assert signals_in(tmp_path).num_missing == 0
    assert signals_in(tmp_path, teacher="another").num_missing == NUM_SHARDS


# ── damage, interruption, fallback ────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_shard_when_it_is_damaged_then_is_refused_by_name_and_the_others_are_read(tmp_path: Path) -> None:
    fill(tmp_path, random_teacher)
    damaged = shard_folders(tmp_path)[1] / HIDDEN
    flip(damaged)
    teacher = stored(tmp_path, must_not_load)
    first, second, third = in_shards(ROWS)

    teacher.hidden_states(batch_of([ROWS.row(first[0]), ROWS.row(third[0])]))
    with pytest.raises(ArtifactError, match="shard-0001") as caught:
        teacher.hidden_states(batch_of([ROWS.row(second[0])]))

    assert caught.value.exit_code == 4
    assert str(damaged) in str(caught.value)
    assert f"rm -r {damaged.parent}" in str(caught.value)


@pytest.mark.parametrize("pattern", ["t-head-*/head.safetensors", "*-shard-0002-*/rows.parquet"])
def test_store_when_a_file_of_it_has_another_length_then_is_refused_before_anything_is_computed(
    tmp_path: Path, pattern: str
) -> None:
    fill(tmp_path, random_teacher)
    (path,) = (tmp_path / "outputs" / "teacher_signals").glob(pattern)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ArtifactError, match=path.name):
        stored(tmp_path, must_not_load)


def test_store_when_aborted_at_any_file_operation_then_a_rerun_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled: dict[str, str]
) -> None:
    online = random_teacher()
    rows = [ROWS.row(ids[-1]) for ids in in_shards(ROWS)]
    for n in itertools.count(1, 5):
        folder, abort = tmp_path / str(n), AbortAtOperation(n)
        with monkeypatch.context() as patched, suppress(Aborted):
            patched.setattr(faults, "hook", abort)
            stored(folder, lambda: online).hidden_states(batch_of(rows))
        visible = content_hashes(folder)
        assert visible.items() <= filled.items(), f"something half is visible after operation {n}"
        stored(folder, lambda: online).hidden_states(batch_of(rows))
        assert content_hashes(folder) == filled, f"aborted at operation {n}"
        if not abort.fired:
            break
    assert n > 60, "the hook is called before every write, flush, rename and removal"


def test_store_when_the_teacher_gives_no_finite_states_then_stores_nothing_of_them(tmp_path: Path) -> None:
    model = make_model(TEACHER, 2, dropout=None)
    online = OnlineTeacher(split_model(model))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match="hidden states are not finite"):
        stored(tmp_path, lambda: online).hidden_states(batch_of(ROWS.rows[:1]))

    assert shard_folders(tmp_path) == []
    assert list((tmp_path / "outputs" / ".work").iterdir()) == []


def test_teacher_when_its_head_is_not_plain_then_runs_online_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # BERT transforms the hidden state before its output matrix.
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, num_attention_heads=2, is_decoder=True, **sizes)
    online = OnlineTeacher(split_model(AutoModelForCausalLM.from_config(config)))

    with caplog.at_level(logging.WARNING, logger="pocl"):
        teacher = open_teacher(signals_in(tmp_path), lambda: online, hardware=HARDWARE)

    assert teacher is online
    assert "cannot be stored" in caplog.text
    assert not (tmp_path / "outputs").exists()
    assert teacher.hidden_states(batch_of(ROWS.rows[:1])).shape[-1] == VOCABULARY
