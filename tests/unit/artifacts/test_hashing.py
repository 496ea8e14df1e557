from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.artifacts import HashCache, durable, hashing
from pocl_cli.errors import ArtifactError, NonFiniteError, ResourceError

_LARGE = b"x" * (1 << 20)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, (2, 3)), [1, [2, 3]]),
        ({1: "a", 2: "b", 10: "c"}, {"1": "a", "10": "c", "2": "b"}),
    ],
)
def test_short_id_when_values_are_equal_as_json_then_is_equal(one: Any, other: Any) -> None:
    assert hashing.short_id(one) == hashing.short_id(other)


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, "1"), (None, "null"), ([1], 1), ("e\u0301", "é"), (True, 1), ("\ud800", "\udbff")]
)
def test_short_id_when_values_differ_then_differs(one: Any, other: Any) -> None:
    assert hashing.short_id(one) != hashing.short_id(other)


def test_canonical_json_when_read_back_then_has_the_same_canonical_json() -> None:
    value = {"lr": 1e-7, "big": 1e22, "text": "\ud800\u2028é", "nested": {"b": [0.1, -0.0], "a": None}}

    text = hashing.canonical_json(value)

    assert hashing.canonical_json(json.loads(text)) == text
    assert " " not in text


def test_canonical_json_when_a_number_is_not_finite_then_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"train\.lr"):
        hashing.canonical_json({"train": {"lr": float("nan")}})


def test_sha256_file_when_the_file_spans_several_blocks_then_is_the_hash_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom((2 << 20) + 17)
    (tmp_path / "file").write_bytes(content)

    assert hashing.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_file_when_the_file_is_missing_then_names_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no-such-file"):
        hashing.sha256_file(tmp_path / "no-such-file")


def _tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_text("w")
    return folder


def test_sha256_tree_when_copied_elsewhere_with_dot_files_then_is_the_same(tmp_path: Path) -> None:
    one, other = _tree(tmp_path / "one"), _tree(tmp_path / "other")
    (other / ".git").mkdir()
    (other / ".git" / "HEAD").write_text("x")
    (other / ".DS_Store").write_text("x")

    assert hashing.sha256_tree(one) == hashing.sha256_tree(other)


@pytest.mark.parametrize("change", ["content", "name", "new", "moved"])
def test_sha256_tree_when_anything_changes_then_differs(tmp_path: Path, change: str) -> None:
    one, other = _tree(tmp_path / "one"), _tree(tmp_path / "other")
    if change == "content":
        (other / "config.json").write_text("[]")
    elif change == "name":
        (other / "config.json").rename(other / "config.jsonl")
    elif change == "new":
        (other / "extra").write_text("")
    else:
        (other / "sub" / "weights").rename(other / "weights")

    assert hashing.sha256_tree(one) != hashing.sha256_tree(other)


def test_sha256_tree_when_files_lie_behind_links_then_hashes_their_contents(tmp_path: Path) -> None:
    plain = _tree(tmp_path / "plain")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").symlink_to(plain / "config.json")
    (linked / "sub").symlink_to(plain / "sub")

    assert hashing.sha256_tree(linked) == hashing.sha256_tree(plain)


def test_sha256_tree_when_links_form_a_loop_then_ends(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    before = hashing.sha256_tree(tree)
    (tree / "sub" / "up").symlink_to(tree)

    assert hashing.sha256_tree(tree) == before


def test_sha256_tree_when_a_link_is_broken_then_names_it(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    (tree / "model.safetensors").symlink_to("../blobs/gone")

    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        hashing.sha256_tree(tree)


def _settled(path: Path, content: bytes = _LARGE) -> Path:
    path.write_bytes(content)
    past = time.time_ns() - 10_000_000_000
    os.utime(path, ns=(past, past))
    return path


def test_hash_cache_when_a_large_file_is_unchanged_then_takes_its_hash_from_the_cache(tmp_path: Path) -> None:
    path = _settled(tmp_path / "weights")
    truth = HashCache(tmp_path).sha256_file(path)
    _forge(tmp_path, "f" * 64)

    assert truth == hashlib.sha256(_LARGE).hexdigest()
    assert HashCache(tmp_path).sha256_file(path) == "f" * 64


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_hash_cache_when_the_file_changes_then_hashes_it_again(tmp_path: Path, change: str) -> None:
    path = _settled(tmp_path / "weights")
    before = path.stat()
    HashCache(tmp_path).sha256_file(path)
    content = b"y" * len(_LARGE)
    if change == "inode":
        _settled(tmp_path / "new", content).rename(path)
    else:
        path.write_bytes(content + b"y" if change == "size" else content)
    if change != "mtime":
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    assert HashCache(tmp_path).sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hash_cache_when_the_file_was_just_written_then_does_not_remember_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(_LARGE)

    HashCache(tmp_path).sha256_file(path)

    assert not HashCache(tmp_path).path.exists()


def test_hash_cache_when_the_file_is_small_then_writes_nothing(tmp_path: Path) -> None:
    path = _settled(tmp_path / "config.json", b"{}")

    assert HashCache(tmp_path).sha256_file(path) == hashlib.sha256(b"{}").hexdigest()
    assert not HashCache(tmp_path).path.exists()


def test_hash_cache_when_told_not_to_write_then_leaves_the_disk_alone(tmp_path: Path) -> None:
    path = _settled(tmp_path / "weights")

    digest = HashCache(tmp_path, writes=False).sha256_file(path)

    assert digest == hashlib.sha256(_LARGE).hexdigest()
    assert not HashCache(tmp_path).path.exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 99, "files": {}}', b'{"version": 1, "files": []}', b"[" * 100_000],
)
def test_hash_cache_when_its_file_is_damaged_then_hashes_and_rewrites_it(tmp_path: Path, damage: bytes) -> None:
    path = _settled(tmp_path / "weights")
    cache = HashCache(tmp_path)
    durable.write_bytes(cache.path, damage)

    assert cache.sha256_file(path) == hashlib.sha256(_LARGE).hexdigest()
    assert list(json.loads(cache.path.read_text())["files"]) == [str(path)]


@pytest.mark.parametrize("entry", [None, [], [1, 2, 3], ["a", "b", "c", "f" * 64], [1, 2, 3, "short"]])
def test_hash_cache_when_an_entry_is_damaged_then_ignores_it(tmp_path: Path, entry: Any) -> None:
    path = _settled(tmp_path / "weights")
    cache = HashCache(tmp_path)
    durable.write_json(cache.path, {"version": 1, "files": {str(path): entry}})

    assert cache.sha256_file(path) == hashlib.sha256(_LARGE).hexdigest()


def test_hash_cache_when_it_cannot_be_written_then_warns_and_gives_the_hash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pocl"), "propagate", True)
    path = _settled(tmp_path / "weights")
    (tmp_path / "outputs").write_text("a file")

    digest = HashCache(tmp_path / "outputs").sha256_file(path)

    assert digest == hashlib.sha256(_LARGE).hexdigest()
    assert "hashed again next time" in caplog.text


def test_hash_cache_of_a_tree_when_filled_then_gives_the_plain_hash(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    _settled(tree / "model.safetensors")
    cache = HashCache(tmp_path)

    assert cache.sha256_tree(tree) == hashing.sha256_tree(tree)
    assert cache.sha256_tree(tree) == hashing.sha256_tree(tree)
    assert list(json.loads(cache.path.read_text())["files"]) == [str(tree / "model.safetensors")]


def test_hash_cache_when_a_known_file_is_gone_then_forgets_it(tmp_path: Path) -> None:
    cache = HashCache(tmp_path)
    cache.sha256_file(_settled(tmp_path / "one"))
    (tmp_path / "one").unlink()

    cache.sha256_file(_settled(tmp_path / "two"))

    assert list(json.loads(cache.path.read_text())["files"]) == [str(tmp_path / "two")]


def _forge(outputs: Path, digest: str) -> None:
    cache = HashCache(outputs)
    content = json.loads(cache.path.read_text())
    content["files"] = {path: [*entry[:3], digest] for path, entry in content["files"].items()}
    durable.write_json(cache.path, content)
