from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_cli.artifacts.hashing import canonical_json
from pocl_cli.artifacts.store import ArtifactKey, Store
from pocl_cli.errors import ArtifactError, ConfigError, PoclError, SecurityError
from pocl_cli.models.load import load_model
from pocl_cli.models.source import ModelSource, resolve_student, resolve_teacher
from pocl_cli.schema import StudentConfig, TeacherConfig

ARCHITECTURE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


@pytest.fixture
def artifact_id(store: Store, model_folder: Path) -> str:
    """A student made here."""
    with store.open_work(ArtifactKey("students", "tiny", {"seed": 1}, version=1)) as work:
        shutil.copytree(model_folder, work.path / "model")
        return work.commit(config={}, inputs={}, command=["pocl", "distill"], seed=1).id


def teacher(store: Store, path: Path | str, *, revision: str | None = None, dtype: str = "auto") -> ModelSource:
    config = TeacherConfig(
        name="t",
        path=str(path),
        experiment=None,
        overrides=(),
        revision=revision,
        dtype=dtype,
        allow_pickle=False,
        store=False,
    )
    return resolve_teacher(config, store)


def student(store: Store, **values: Any) -> ModelSource:
    defaults = {
        "name": "made-up",
        "path": None,
        "experiment": None,
        "overrides": (),
        "revision": None,
        "dtype": "float32",
        "allow_pickle": False,
        "layers": None,
        "architecture": None,
        "tokenizer": None,
        "init_seed": 0,
        "dropout": None,
        "gradient_checkpointing": False,
        "lora": {"rank": None, "alpha": 1, "dropout": 0.0, "target_modules": None},
    }
    return resolve_student(StudentConfig(**{**defaults, **values}), store)


def test_resolve_of_a_folder_is_identified_by_the_content_of_its_files(store: Store, model_folder: Path) -> None:
    first = teacher(store, model_folder)
    copy = model_folder.parent / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "README.md").write_text("a copy")
    assert teacher(store, copy).identity == first.identity
    assert set(first.identity["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert (first.label, teacher(store, copy).label) == ("tiny-llama", "copy")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_resolve_of_a_folder_where_a_file_changes_is_another_model(store: Store, model_folder: Path, name: str) -> None:
    before = teacher(store, model_folder)
    data = (model_folder / name).read_bytes()
    (model_folder / name).write_bytes(data + b" ")
    after = teacher(store, model_folder)
    assert after.identity != before.identity
    assert (after.tokenizer_identity != before.tokenizer_identity) == (name == "tokenizer.json")


def test_resolve_with_another_dtype_is_another_model(store: Store, model_folder: Path) -> None:
    sources = [teacher(store, model_folder, dtype=dtype) for dtype in ("auto", "float32", "bfloat16")]
    assert len({canonical_json(source.identity) for source in sources}) == 3


@pytest.mark.parametrize("how", ["id", "prefix", "name", "path", "model folder", "latest", "latest link"])
def test_resolve_of_a_student_made_here_is_identified_by_its_id(store: Store, artifact_id: str, how: str) -> None:
    folder = store.outputs / "students" / f"tiny-{artifact_id}"
    path = {
        "id": artifact_id,
        "prefix": artifact_id[:6],
        "name": folder.name,
        "path": str(folder),
        "model folder": str(folder / "model"),
        "latest": "latest",
        "latest link": str(folder.parent / "latest"),
    }[how]
    source = teacher(store, path)
    assert source.identity == {"student": artifact_id, "dtype": "auto"}
    assert source.label == f"student-{artifact_id}"
    loaded = load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=None)
    assert loaded.model.config.hidden_size == 32


def test_resolve_of_a_student_has_the_tokenizer_of_its_folder(
    store: Store, artifact_id: str, model_folder: Path
) -> None:
    assert teacher(store, artifact_id).tokenizer_identity == teacher(store, model_folder).tokenizer_identity


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("./nothing", ArtifactError, "there is no folder './nothing'"),
        ("../nothing", ArtifactError, "there is no folder"),
        ("/nothing/here", ArtifactError, "there is no folder"),
        ("~/nothing-here-at-all", ArtifactError, "there is no folder"),
        ("some/model/folder", ArtifactError, "there is no folder"),
        ("c0ffee", ArtifactError, "there is no 'c0ffee'"),
        ("tiny-0123456789ab", ArtifactError, "there is no 'tiny-0123456789ab'"),
        ("latest", ArtifactError, "there are no students yet"),
        ("", ConfigError, "no path of a model"),
        ("a\nb", ConfigError, "no path of a model"),
        ("a\0b", ConfigError, "no path of a model"),
    ],
)
def test_resolve_of_what_looks_local_and_is_not_there_never_asks_the_hub(
    store: Store, path: str, error: type[PoclError], message: str
) -> None:
    with pytest.raises(error) as caught:
        teacher(store, path)
    assert message in str(caught.value)


def test_resolve_of_a_file_or_of_an_empty_folder_says_what_a_model_is(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        teacher(store, tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        teacher(store, tmp_path / "empty")


def test_resolve_of_a_folder_with_pickles_only_is_refused_before_torch_is_imported(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    script = (
        "import sys; from pathlib import Path; from pocl_cli.artifacts.store import Store\n"
        "from pocl_cli.errors import SecurityError; from pocl_cli.models.source import resolve_teacher\n"
        "from pocl_cli.schema import TeacherConfig\n"
        "config = dict(name='t', experiment=None, overrides=(), revision=None, dtype='auto')\n"
        "config |= dict(allow_pickle=False, store=False)\n"
        "try: resolve_teacher(TeacherConfig(path=sys.argv[1], **config), Store(Path('outputs')))\n"
        "except SecurityError: print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model_folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_resolve_with_a_revision_of_a_local_folder_is_refused(store: Store, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="revision 'v1' goes with a hub id"):
        teacher(store, model_folder, revision="v1")
    for tokenizer in ("toy", str(model_folder)):
        with pytest.raises(ConfigError, match="revision 'v1' goes with a hub id"):
            student(store, architecture=ARCHITECTURE, tokenizer=tokenizer, revision="v1")


def test_resolve_student_with_layers_is_another_model_with_a_name_of_its_own(store: Store, model_folder: Path) -> None:
    whole, by_number, by_index = (student(store, path=str(model_folder), layers=layers) for layers in (None, 2, (0, 3)))
    assert [source.identity.get("layers") for source in (whole, by_number, by_index)] == [None, 2, [0, 3]]
    assert by_number.label == "tiny-llama-2-layers"
    assert by_index.label == "tiny-llama-layers-0-3"
    assert by_number.tokenizer_identity == whole.tokenizer_identity


def test_resolve_student_from_an_architecture_is_identified_by_what_makes_it(store: Store) -> None:
    def made(**values: Any) -> dict[str, Any]:
        return student(store, **{"architecture": ARCHITECTURE, "tokenizer": "toy", **values}).identity

    wider = {**ARCHITECTURE, "hidden_size": 48}
    assert made() == made()
    variants = [made(), made(init_seed=1), made(architecture=wider), made(dtype="bfloat16")]
    assert len({canonical_json(identity) for identity in variants}) == 4
    assert student(store, architecture=ARCHITECTURE, tokenizer="toy").label == "made-up"


def test_resolve_student_from_an_architecture_with_another_tokenizer_is_another_model(
    store: Store, model_folder: Path
) -> None:
    toy, folder = (student(store, architecture=ARCHITECTURE, tokenizer=name) for name in ("toy", str(model_folder)))
    assert toy.tokenizer_identity != folder.tokenizer_identity
    assert toy.identity != folder.identity
    with pytest.raises(ArtifactError, match="there is no folder"):
        student(store, architecture=ARCHITECTURE, tokenizer="./nothing")


def test_resolve_student_from_an_architecture_with_layers_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"student\.layers goes with student\.path"):
        student(store, architecture=ARCHITECTURE, tokenizer="toy", layers=2)


def test_resolve_of_a_damaged_student_is_refused(store: Store, artifact_id: str) -> None:
    path = store.outputs / "students" / f"tiny-{artifact_id}" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        teacher(store, artifact_id)


def test_resolve_of_a_folder_with_a_configuration_that_names_code_is_refused(store: Store, model_folder: Path) -> None:
    path = model_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"auto_map": {"AutoConfig": "x.Y"}, ', 1))
    with pytest.raises(SecurityError, match="auto_map"):
        teacher(store, model_folder)
