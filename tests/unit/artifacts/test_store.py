from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pocl_cli.artifacts import Artifact, ArtifactKey, Store, difference, durable
from pocl_cli.errors import ArtifactError, PoclError, ResourceError, SecurityError

from .conftest import Make


def _key(seed: int = 1, slug: str = "tiny") -> ArtifactKey:
    return ArtifactKey("students", slug, {"train": {"seed": seed, "lr": 0.001}}, version=1)


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_artifact_key_when_kind_identity_or_version_changes_then_has_another_id_and_the_slug_does_not_matter() -> None:
    key = ArtifactKey("students", "a", {"x": 1}, 1)
    others = [
        ArtifactKey("scores", "a", {"x": 1}, 1),
        ArtifactKey("students", "a", {"x": 2}, 1),
        ArtifactKey("students", "a", {"x": 1}, 2),
    ]

    assert len({key.id, *(other.id for other in others)}) == 4
    assert ArtifactKey("students", "b", {"x": 1}, 1).id == key.id
    assert len(key.id) == 12


def test_artifact_key_when_the_slug_would_lead_outside_or_holds_a_secret_then_is_made_harmless() -> None:
    key = ArtifactKey("students", "../../etc/\0\n hf_abcdefghijklmnop", {}, 1)

    assert key.folder_name == f"etc-{key.id}"


# ── commit and find ───────────────────────────────────────────────────────────────────────────────────────────────


def test_commit_when_done_then_the_artifact_is_found_and_holds_the_shipped_files_only(
    outputs: Path, make: Make
) -> None:
    artifact = make(outputs)

    assert Store(outputs).find(_key()) == artifact
    assert Store(outputs).find(("students", artifact.id)) == artifact
    assert artifact.path == outputs / "students" / _key().folder_name
    assert sorted(os.listdir(artifact.path)) == ["manifest.json", "metrics.jsonl", "model"]
    assert os.listdir(outputs / ".work") == []
    assert os.readlink(outputs / "students" / "latest") == artifact.path.name


def test_find_when_nothing_was_made_then_gives_none_and_touches_nothing(outputs: Path) -> None:
    assert Store(outputs).find(_key()) is None
    assert not outputs.exists()


def test_find_when_the_slug_differs_then_finds_it_by_its_id(outputs: Path, make: Make) -> None:
    artifact = make(outputs, slug="before")

    assert Store(outputs).find(_key(slug="after")) == artifact


def test_find_all_when_some_were_made_then_gives_these_by_id(outputs: Path, make: Make) -> None:
    assert Store(outputs).find_all([_key(1)]) == {}
    first, second = make(outputs, 1, slug="before"), make(outputs, 2)
    make(outputs, 3)

    found = Store(outputs).find_all([_key(4), _key(2), _key(1)])

    assert found == {first.id: first, second.id: second}
    assert Store(outputs).find_all([]) == {}


def test_find_all_when_one_is_damaged_then_names_it(outputs: Path, make: Make) -> None:
    make(outputs, 1)
    damaged = make(outputs, 2).path / "metrics.jsonl"
    damaged.write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"metrics\.jsonl"):
        Store(outputs).find_all([_key(1), _key(2)])


def test_commit_when_another_artifact_follows_then_latest_points_to_it(outputs: Path, make: Make) -> None:
    first, second = make(outputs, seed=1), make(outputs, seed=2)

    assert os.readlink(outputs / "students" / "latest") == second.path.name
    assert Store(outputs).resolve("latest") == second
    assert Store(outputs).resolve(str(outputs / "students" / "latest")).id == second.id
    assert Store(outputs).find(_key(1)) == first


def test_commit_when_the_work_holds_a_link_then_is_refused(outputs: Path) -> None:
    with Store(outputs).open_work(_key()) as work:
        (work.path / "model").symlink_to("/etc")
        with pytest.raises(SecurityError, match="link or a special file"):
            work.commit(config={}, inputs={}, command=[], seed=None)

    assert Store(outputs).find(_key()) is None


def test_commit_when_the_file_system_has_no_hard_links_then_copies(
    outputs: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    artifact = make(outputs)

    Store(outputs).verify(artifact)
    assert len(artifact.manifest.files) == 3


def test_commit_when_a_racing_writer_finished_first_then_gives_its_artifact(outputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Store(other).open_work(_key()) as work:
        durable.write_text(work.path / "made_by", "the other one")
        theirs = work.commit(config={}, inputs={}, command=[], seed=None)

    with Store(outputs).open_work(_key()) as work:
        durable.write_text(work.path / "made_by", "me")
        (outputs / "students").rmdir()
        theirs.path.parent.rename(outputs / "students")
        artifact = work.commit(config={}, inputs={}, command=[], seed=None)

    assert (artifact.path / "made_by").read_text() == "the other one"
    assert os.listdir(outputs / ".work") == []


def test_commit_when_the_name_is_taken_by_another_content_then_keeps_the_work(outputs: Path) -> None:
    with Store(outputs).open_work(_key()) as work:
        durable.write_text(work.path / "file", "x")
        durable.write_text(outputs / "students" / _key().folder_name / "strange", "x")
        with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
            work.commit(config={}, inputs={}, command=[], seed=None)

    assert (work.path / "file").read_text() == "x"
    assert (outputs / "students" / _key().folder_name / "strange").exists()


def test_commit_when_the_disk_fills_up_then_nothing_is_visible_and_the_work_stays(small_disk: Path) -> None:
    store = Store(small_disk / "outputs")
    with store.open_work(_key()) as work:
        for i in range(100):
            durable.write_text(work.path / f"{i:03}", "x")
        filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(filler, b"x" * 4096)
        with pytest.raises(ResourceError, match="No space left"):
            work.commit(config={"big": "x" * 100_000}, inputs={}, command=[], seed=None)
        os.close(filler)
        (small_disk / "filler").unlink()
        assert store.find(_key()) is None

    with store.open_work(_key()) as work:
        artifact = work.commit(config={}, inputs={}, command=[], seed=None)
    assert len(artifact.manifest.files) == 100


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _assert_damaged(artifact: Artifact, outputs: Path, named: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Store(outputs).find(_key())
    assert caught.value.exit_code == 4
    assert named in str(caught.value)
    assert f"rm -r {shlex.quote(str(artifact.path))}" in str(caught.value)


_FILES = ["metrics.jsonl", "model/config.json", "model/model.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kept", ["0", "1", "size // 2", "size - 1"])
def test_find_when_a_file_is_truncated_then_names_it_and_the_command_that_mends(
    outputs: Path, make: Make, name: str, kept: str
) -> None:
    artifact = make(outputs)
    path = artifact.path / name
    os.truncate(path, eval(kept, {"size": path.stat().st_size}))

    _assert_damaged(artifact, outputs, name)


@pytest.mark.parametrize("name", _FILES)
def test_find_when_a_file_is_missing_then_names_it(outputs: Path, make: Make, name: str) -> None:
    artifact = make(outputs)
    (artifact.path / name).unlink()

    _assert_damaged(artifact, outputs, name)


@pytest.mark.parametrize("name", _FILES[:-1])
def test_verify_when_a_bit_is_flipped_then_names_the_file(outputs: Path, make: Make, name: str) -> None:
    artifact = make(outputs)
    Store(outputs).verify(artifact)
    path = artifact.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    with pytest.raises(ArtifactError, match=rf"{name} has another content.*rm -r"):
        Store(outputs).verify(artifact)


@pytest.mark.parametrize("name", ["extra", "model/extra.bin", ".hidden"])
def test_find_when_a_file_is_not_listed_then_says_how_to_remove_that_file(outputs: Path, make: Make, name: str) -> None:
    artifact = make(outputs)
    (artifact.path / name).write_text("x")

    with pytest.raises(ArtifactError, match="does not list") as caught:
        Store(outputs).find(_key())
    assert caught.value.fix is not None
    subprocess.run(caught.value.fix, shell=True, check=True)

    assert Store(outputs).find(_key()) == artifact


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"schema_version": 1}',
        '{"schema_version": "1"}',
        '{"schema_version": NaN}',
    ],
)
def test_find_when_the_manifest_is_something_else_then_says_so(outputs: Path, make: Make, content: str) -> None:
    artifact = make(outputs)
    (artifact.path / "manifest.json").write_text(content)

    _assert_damaged(artifact, outputs, "manifest.json")


def _edit(artifact: Artifact, key: str, value: object) -> None:
    path = artifact.path / "manifest.json"
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def test_find_when_the_manifest_is_from_a_newer_version_then_says_which(outputs: Path, make: Make) -> None:
    _edit(make(outputs), "schema_version", 2)

    with pytest.raises(ArtifactError, match=r"newer pocl .*schema_version is 2, this pocl knows up to 1"):
        Store(outputs).find(_key())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "0123456789ab"),
        ("identity", {"train": {"seed": 2}}),
        ("version", 2),
        ("kind", "scores"),
        ("kind", "../../etc"),
        ("status", "partial"),
        ("files", {}),
        ("unknown", 1),
        ("slug", "another"),
    ],
)
def test_find_when_the_manifest_was_edited_then_refuses_the_artifact(
    outputs: Path, make: Make, key: str, value: object
) -> None:
    _edit(make(outputs), key, value)

    with pytest.raises(ArtifactError):
        Store(outputs).find(_key())


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "model/../../x", "a\0b", "a\nb", "", ".."])
def test_find_when_the_manifest_lists_a_file_outside_then_is_refused_for_security(
    outputs: Path, make: Make, name: str
) -> None:
    artifact = make(outputs)
    entry = {"size": 1, "sha256": "f" * 64}
    _edit(artifact, "files", {name: entry})

    with pytest.raises(SecurityError, match="must lead to a place inside"):
        Store(outputs).find(_key())


def test_find_when_a_link_has_the_artifacts_name_then_never_follows_it(outputs: Path, make: Make) -> None:
    artifact = make(outputs)
    artifact.path.rename(outputs / "moved")
    artifact.path.symlink_to(outputs / "moved")

    with pytest.raises(SecurityError, match="symbolic link"):
        Store(outputs).find(_key())
    with pytest.raises(SecurityError, match="symbolic link"), Store(outputs).open_work(_key()):
        pass


@pytest.mark.parametrize("name", ["model/config.json", "model", "manifest.json"])
def test_find_when_a_link_was_planted_inside_then_is_refused(outputs: Path, make: Make, name: str) -> None:
    artifact = make(outputs)
    (artifact.path / name).rename(outputs / "moved")
    (artifact.path / name).symlink_to(outputs / "moved")

    with pytest.raises(PoclError) as caught:
        Store(outputs).find(_key())
    assert caught.value.exit_code in (4, 9)


def test_find_when_a_file_has_the_artifacts_name_then_says_so(outputs: Path) -> None:
    durable.write_text(outputs / "students" / _key().folder_name, "x")

    with pytest.raises(ArtifactError, match="is not a folder"):
        Store(outputs).find(_key())


def test_find_when_the_artifact_lies_among_another_kind_then_says_where_it_belongs(outputs: Path, make: Make) -> None:
    artifact = make(outputs)
    (outputs / "students").rename(outputs / "scores")

    with pytest.raises(ArtifactError, match=r"move it to .*students"):
        Store(outputs).find(("scores", artifact.id))


# ── the outputs folder ────────────────────────────────────────────────────────────────────────────────────────────


def test_open_work_when_outputs_is_a_file_then_names_it(outputs: Path) -> None:
    outputs.write_text("x")

    with pytest.raises(ResourceError, match="outputs is a file"), Store(outputs).open_work(_key()):
        pass
    with pytest.raises(ResourceError, match="outputs is a file"):
        Store(outputs).find(_key())


def test_open_work_when_outputs_is_a_link_to_a_folder_then_works(outputs: Path, make: Make, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    outputs.symlink_to(tmp_path / "disk")

    artifact = make(outputs)

    assert Store(outputs).find(_key()) == artifact
    assert (tmp_path / "disk" / "students" / artifact.path.name / "manifest.json").exists()


def test_open_work_when_outputs_is_a_broken_link_then_names_what_is_missing(outputs: Path, tmp_path: Path) -> None:
    outputs.symlink_to(tmp_path / "gone")

    with pytest.raises(ResourceError, match=r"broken link — .*gone does not exist"), Store(outputs).open_work(_key()):
        pass
    with pytest.raises(ResourceError, match="broken link"):
        Store(outputs).find(_key())


@pytest.mark.parametrize("name", ["students", ".work", f".work/{_key().id}"])
def test_open_work_when_a_link_has_the_place_of_a_folder_then_is_refused(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside").mkdir()
    (outputs / name).parent.mkdir(parents=True)
    (outputs / name).symlink_to(tmp_path / "outside")

    with pytest.raises(SecurityError, match="symbolic link"), Store(outputs).open_work(_key()):
        pass
    assert os.listdir(tmp_path / "outside") == []


def test_open_work_when_the_file_system_is_read_only_then_says_so(small_disk: Path, make: Make) -> None:
    artifact = make(small_disk / "outputs")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = Store(small_disk / "outputs")

    assert store.find(_key()) == artifact
    with pytest.raises(ResourceError, match="read-only"), store.open_work(_key(2)):
        pass


@pytest.mark.parametrize("location", ["https://user:pass@host/data.jsonl", "hf_abcdefghijklmnopqrst"])
def test_open_work_when_the_identity_holds_a_secret_then_refuses_without_showing_it(
    outputs: Path, location: str
) -> None:
    key = ArtifactKey("scores", "x", {"dataset": {"path": location}}, 1)

    with pytest.raises(SecurityError) as caught, Store(outputs).open_work(key):
        pass
    assert "pass" not in str(caught.value).replace("passwords", "")
    assert "hf_" not in str(caught.value)


# ── references ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_resolve_when_given_path_name_id_or_prefix_then_finds_the_artifact(
    outputs: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(outputs)
    make(outputs, seed=2)
    store = Store(outputs)
    monkeypatch.chdir(outputs.parent)

    references = [str(artifact.path), f"outputs/students/{artifact.path.name}", f"{artifact.path}/"]
    references += [artifact.path.name, artifact.id, artifact.id[:8], artifact.id[:4]]
    assert {store.resolve(reference, ["students"]).id for reference in references} == {artifact.id}
    monkeypatch.chdir(outputs / "students")
    assert store.resolve(artifact.path.name).id == artifact.id


def test_resolve_when_the_prefix_fits_several_then_lists_them(outputs: Path, make: Make) -> None:
    by_start: dict[str, list[Artifact]] = {}
    for seed in range(2000):
        by_start.setdefault(_key(seed).id[:4], []).append(seed)
    one, other = next(seeds for seeds in by_start.values() if len(seeds) > 1)[:2]
    first, second = make(outputs, seed=one), make(outputs, seed=other)

    with pytest.raises(ArtifactError, match="ambiguous") as caught:
        Store(outputs).resolve(first.id[:4])
    assert first.path.name in str(caught.value)
    assert second.path.name in str(caught.value)


@pytest.mark.parametrize("reference", ["abc", "", "..", "nothing/there", "a\0b", "a\nb", "*", "tiny"])
def test_resolve_when_nothing_fits_then_lists_what_there_is_on_one_line(
    outputs: Path, make: Make, reference: str
) -> None:
    artifact = make(outputs)

    with pytest.raises(ArtifactError) as caught:
        Store(outputs).resolve(reference, ["students"])
    assert artifact.path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolve_when_there_is_nothing_at_all_then_says_so(outputs: Path) -> None:
    with pytest.raises(ArtifactError, match="make one first"):
        Store(outputs).resolve("latest", ["students"])
    with pytest.raises(ArtifactError, match="make one first"):
        Store(outputs).resolve("0123456789ab", ["students"])


def test_resolve_when_the_artifact_is_of_another_kind_then_says_which_is_needed(outputs: Path, make: Make) -> None:
    artifact = make(outputs)

    with pytest.raises(ArtifactError, match=r"one of the students.*one of the scores or partitions is needed"):
        Store(outputs).resolve(str(artifact.path), ["scores", "partitions"])


def test_resolve_when_the_path_is_a_users_own_folder_then_never_advises_to_delete_it(
    outputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "manifest.json").write_text("{}")

    with pytest.raises(ArtifactError, match="is not an artifact") as caught:
        Store(outputs).resolve(str(tmp_path / "my-model"))
    assert "rm " not in str(caught.value)


def test_resolve_when_the_newest_was_deleted_then_latest_is_the_one_before(outputs: Path, make: Make) -> None:
    first, second = make(outputs, seed=1), make(outputs, seed=2)
    durable.remove_tree(second.path)

    assert Store(outputs).resolve("latest") == first


# ── interrupted neighbours ────────────────────────────────────────────────────────────────────────────────────────


def test_interrupted_when_work_was_left_then_names_it_by_kind_and_slug(outputs: Path, make: Make) -> None:
    store = Store(outputs)
    with store.open_work(_key(1)) as one, store.open_work(_key(2, slug="other")) as other:
        durable.write_text(one.path / "rows", "x")
        durable.write_text(other.path / "rows", "x")
    make(outputs, seed=3)
    (outputs / ".work" / "0123456789ab").mkdir()

    assert {entry.id for entry in store.interrupted("students")} == {_key(1).id, _key(2).id}
    assert store.interrupted("students", "tiny") == [(_key(1).id, {"train": {"seed": 1, "lr": 0.001}})]
    assert store.interrupted("scores") == []


def test_open_work_when_it_fails_before_anything_is_written_then_leaves_nothing_behind(outputs: Path) -> None:
    with pytest.raises(ZeroDivisionError), Store(outputs).open_work(_key()):
        raise ZeroDivisionError

    assert os.listdir(outputs / ".work") == []


def test_open_work_when_interrupted_then_keeps_when_it_began_and_hides_secrets_of_its_summary(outputs: Path) -> None:
    store = Store(outputs)
    with store.open_work(_key(), summary={"hub": {"token": "very-secret"}, "max_tokens": 512}) as first:
        durable.write_text(first.path / "rows", "x")
    with store.open_work(_key()) as second:
        durable.write_text(second.path / "file", "x")
        shown = (first.path / "work.json").read_text()
        artifact = second.commit(config={}, inputs={}, command=[], seed=None)

    assert not first.resumed
    assert second.resumed
    assert second.started_at == first.started_at == artifact.manifest.started_at < artifact.manifest.created_at
    assert "very-secret" not in shown


def test_difference_when_identities_differ_then_names_each_key_with_both_values() -> None:
    old = {"train": {"lr": 0.001, "seed": 1}, "teacher": {"path": "a"}, "stages": [1, 2], "same": {"x": {}}}
    new = {"train": {"lr": 0.002, "seed": 1}, "stages": [1, 2, 3], "same": {"x": {}}, "limit": None}

    assert difference(old, new) == [
        "limit: (absent) → null",
        "stages: [1,2] → [1,2,3]",
        'teacher.path: "a" → (absent)',
        "train.lr: 0.001 → 0.002",
    ]


def test_difference_when_long_values_differ_at_their_ends_then_still_shows_two_values() -> None:
    (line,) = difference({"a": "x" * 200 + "1"}, {"a": "x" * 200 + "2"})

    before, after = line.removeprefix("a: ").split(" → ")
    assert before != after
    assert len(line) < 180
