from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl_cli import faults
from pocl_cli.artifacts import check_free_disk, durable
from pocl_cli.artifacts.encoding import json_text
from pocl_cli.errors import ArtifactError, NonFiniteError, ResourceError

_TEXT = st.text(st.sampled_from('ab\ud800\u2028\u2029\x85\x7f\0\n\\"é😀'), max_size=6)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(_JSON)
def test_json_text_of_any_value_when_read_back_then_is_the_value_on_one_encodable_line(value: Any) -> None:
    text = json_text(value)

    assert json.loads(text) == value
    assert len(text.splitlines()) == 1
    text.encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_write_json_when_a_number_is_not_finite_then_names_its_key_and_keeps_the_old_file(
    tmp_path: Path, number: float
) -> None:
    path = tmp_path / "metrics.json"
    durable.write_json(path, {"a": 1})

    with pytest.raises(NonFiniteError, match=r"datasets\.1\.rouge_l.*metrics\.json"):
        durable.write_json(path, {"datasets": [{}, {"rouge_l": number}]})

    assert json.loads(path.read_text()) == {"a": 1}


def test_write_jsonl_when_a_row_fails_then_the_old_file_stays_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    durable.write_jsonl(path, [{"b": 1, "a": 2}])

    with pytest.raises(NonFiniteError):
        durable.write_jsonl(path, [{"a": 1}, {"a": float("nan")}])

    assert path.read_text() == '{"a": 2, "b": 1}\n'
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_write_text_when_it_holds_a_lone_surrogate_then_escapes_it(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "a.txt", "x\ud800é")

    assert (tmp_path / "a.txt").read_bytes() == b"x\\ud800" + "é".encode()


def test_write_bytes_when_it_replaces_a_file_then_flushes_the_new_one_before_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "a.json", []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        order.append(
            "flush the folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "flush the file"
        )
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)

    durable.write_bytes(path, b"new")

    assert order == ["flush the file", "rename", "flush the folder"]


def test_write_bytes_when_the_target_is_a_link_then_replaces_the_link_and_spares_its_target(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(outside)

    durable.write_bytes(link, b"new")

    assert outside.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"


def test_append_jsonl_when_the_last_line_is_torn_then_removes_it_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    durable.append_jsonl(path, [{"step": 1}])
    with open(path, "ab") as handle:
        handle.write(b'{"step": 2, "lo' + b"x" * 200_000)

    durable.append_jsonl(path, [{"step": 2}])

    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_append_jsonl_when_the_flush_fails_then_takes_back_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    durable.append_jsonl(path, [{"step": 1}])
    monkeypatch.setattr(faults, "hook", _fails_at("fsync", errno.ENOSPC))

    with pytest.raises(ResourceError, match="append to"):
        durable.append_jsonl(path, [{"step": 2}])

    assert path.read_text() == '{"step": 1}\n'


def test_append_jsonl_when_the_file_is_a_link_then_refuses_and_spares_its_target(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(outside)

    with pytest.raises(ResourceError, match="symbolic link"):
        durable.append_jsonl(tmp_path / "metrics.jsonl", [{}])

    assert outside.read_text() == "precious"


def test_truncate_when_the_file_is_longer_then_cuts_it_and_when_shorter_then_says_what_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    durable.truncate(path, 0)
    durable.append_jsonl(path, [{"step": 1}, {"step": 2}])

    durable.truncate(path, 12)
    assert path.read_text() == '{"step": 1}\n'

    with pytest.raises(ArtifactError, match="12 bytes, and 24"):
        durable.truncate(path, 24)


def test_write_parquet_when_written_twice_then_gives_the_same_bytes_and_the_table(tmp_path: Path) -> None:
    table = pyarrow.table({"id": ["a", "b"], "rank": [1, 2]})

    durable.write_parquet(tmp_path / "a.parquet", table)
    durable.write_parquet(tmp_path / "b.parquet", table)

    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").equals(table)


def test_write_safetensors_when_the_library_reads_it_then_every_dtype_and_shape_is_whole(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64]
    tensors = {f"t{i}": (torch.arange(3) % 2).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "matrix": torch.arange(6.0).reshape(2, 3).T}
    tensors |= {"needs_grad": torch.ones(2, requires_grad=True), "naïve 'name'": torch.ones(1)}
    path = tmp_path / "model.safetensors"

    durable.write_safetensors(path, tensors, {"step": "7"})

    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())
    with safetensors.safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "step": "7"}


def test_write_safetensors_when_the_order_of_names_differs_then_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = torch.arange(4.0), torch.ones(3, dtype=torch.uint8)

    durable.write_safetensors(tmp_path / "a", {"x": one, "y": two, "z": one}, {"a": "1", "b": "2", "c": "3"})
    durable.write_safetensors(tmp_path / "b", {"z": one, "y": two, "x": one}, {"c": "3", "b": "2", "a": "1"})

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_safetensors_when_narrow_tensors_come_first_by_name_then_wide_ones_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    durable.write_safetensors(path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.arange(1)})

    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    offsets = {name: start + header[name]["data_offsets"][0] for name in "abc"}
    assert (offsets["c"] % 8, offsets["b"] % 4) == (0, 0)
    assert offsets["c"] < offsets["b"] < offsets["a"]


def test_rename_when_the_target_exists_then_replaces_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()

    with pytest.raises(FileExistsError):
        durable.rename(source, target)

    assert source.is_dir()


def test_rename_when_the_system_has_no_such_call_then_still_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl_cli.artifacts.disk._renameat2", lambda: None)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    durable.rename(source, target)
    source.mkdir()

    with pytest.raises(FileExistsError):
        durable.rename(source, target)

    assert source.is_dir()
    assert target.is_dir()


def test_remove_tree_when_it_holds_a_link_then_spares_what_the_link_points_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "link").symlink_to(outside)
    (tree / "a" / "b" / "file").write_text("x")

    durable.remove_tree(tree)

    assert not tree.exists()
    assert (outside / "precious").read_text() == "x"


def test_remove_tree_when_somebody_else_removes_it_too_then_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    for name in ("a", "b", "c"):
        (tree / name).mkdir(parents=True)
        (tree / name / "file").write_text("x")

    def removes_a_file(event: str, what: str) -> None:
        (tree / "b" / "file").unlink(missing_ok=True)

    monkeypatch.setattr(faults, "hook", removes_a_file)

    durable.remove_tree(tree)

    assert not tree.exists()


def test_remove_temporaries_when_a_writer_was_killed_then_removes_its_file_and_no_other(tmp_path: Path) -> None:
    killed = os.fork()
    if killed == 0:
        faults.hook = lambda event, what: os._exit(9) if event == "rename" else None
        durable.write_text(tmp_path / "sub" / "a.json", "{}")
        os._exit(0)
    os.waitpid(killed, 0)
    (tmp_path / ".keep.tmp").write_text("x")
    assert len(os.listdir(tmp_path / "sub")) == 1

    durable.remove_temporaries(tmp_path, recursive=True, older_than_seconds=3600)
    assert len(os.listdir(tmp_path / "sub")) == 1

    durable.remove_temporaries(tmp_path, recursive=True, older_than_seconds=0)
    assert os.listdir(tmp_path / "sub") == []
    assert (tmp_path / ".keep.tmp").exists()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "permission"), (errno.EROFS, "read-only"), (errno.EIO, "disk")],
)
@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_write_bytes_when_the_disk_refuses_then_names_path_and_remedy_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str, operation: str
) -> None:
    path = tmp_path / "a.json"
    durable.write_bytes(path, b"old")
    monkeypatch.setattr(faults, "hook", _fails_at(operation, code))

    with pytest.raises(ResourceError) as caught:
        durable.write_bytes(path, b"new")

    assert caught.value.exit_code == 5
    assert str(path) in str(caught.value)
    assert remedy in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_bytes_when_a_part_of_the_path_is_a_file_then_names_it(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("x")

    with pytest.raises(ResourceError, match=r"outputs.*move it away"):
        durable.write_bytes(tmp_path / "outputs" / "scores" / "a", b"")


@pytest.mark.parametrize("kind", ["bytes", "jsonl", "parquet", "safetensors"])
def test_writers_when_the_disk_is_full_then_name_the_file_and_keep_the_old_one(small_disk: Path, kind: str) -> None:
    path = small_disk / "file"
    durable.write_bytes(path, b"old")
    noise = os.urandom(2 << 20)
    writers = {
        "bytes": lambda: durable.write_bytes(path, noise),
        "jsonl": lambda: durable.write_jsonl(path, ({"text": noise[:9999].hex()} for _ in range(100))),
        "parquet": lambda: durable.write_parquet(path, pyarrow.table({"noise": [noise]})),
        "safetensors": lambda: durable.write_safetensors(path, {"noise": torch.rand(1 << 19)}),
    }

    with pytest.raises(ResourceError, match=r"cannot write .*/file — No space left on device — free some space"):
        writers[kind]()

    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["file"]


def test_append_jsonl_when_the_disk_is_full_then_keeps_the_whole_lines(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    durable.append_jsonl(path, [{"step": 1}])

    with pytest.raises(ResourceError, match="No space left"):
        durable.append_jsonl(path, [{"text": "x" * (2 << 20)}])

    assert path.read_text() == '{"step": 1}\n'


def test_write_bytes_when_the_file_system_is_read_only_then_says_so(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    with pytest.raises(ResourceError, match="mounted read-only"):
        durable.write_bytes(small_disk / "file", b"")


def test_check_free_disk_when_too_little_is_free_then_says_how_much_is_needed(small_disk: Path) -> None:
    check_free_disk(small_disk / "not" / "yet", 1 << 19, "checkpoints")

    with pytest.raises(ResourceError, match=r"checkpoints.*about 2\.0 GiB are needed and 1\.0 MiB are free"):
        check_free_disk(small_disk / "not" / "yet", 2 << 30, "checkpoints")


def _fails_at(operation: str, code: int) -> Any:
    def hook(event: str, what: str) -> None:
        if event == operation:
            raise OSError(code, os.strerror(code), what)

    return hook
