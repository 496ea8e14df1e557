"""Where a model comes from, and what decides its weights: known before anything is loaded. Free of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pocl_cli.artifacts.hashing import HashCache
from pocl_cli.artifacts.manifest import MANIFEST
from pocl_cli.errors import ArtifactError, ConfigError
from pocl_cli.models import folder, toy_tokenizer

if TYPE_CHECKING:
    from pocl_cli.artifacts.store import Store
    from pocl_cli.models.hub import HubCommit
    from pocl_cli.schema import ModelConfig, StudentConfig, TeacherConfig

TOY = "toy"
_ARTIFACT_NAME = re.compile(r"latest|[0-9a-f]{4,12}|[a-z0-9.-]+-[0-9a-f]{12}")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded (`models.load`).

    Attributes:
        label: a short name for slugs and logs.
        identity: the plain values that decide the weights and the tokenizer; of a student made here, the key `student`
            holds its artifact's id.
        tokenizer_identity: the plain values that decide the tokenizer.
        dtype: of the weights in memory: a name of torch's, or `auto` for the checkpoint's own.
        weights: a local folder or a hub commit; None for a model that is made from nothing.
        pickled: the weights are, which was allowed: they are converted before they are loaded (`models.pickled`).
        tokenizer: the place of the tokenizer's files; None for the toy tokenizer.
        layers: which decoder layers are kept (`models.prune`); None keeps all.
        architecture: the configuration of a model made from nothing, `model_type` among it.
        init_seed: seed of the weights of a model made from nothing.
    """

    label: str
    identity: dict[str, Any]
    tokenizer_identity: dict[str, Any]
    dtype: str
    weights: Path | HubCommit | None
    tokenizer: Path | HubCommit | None
    layers: int | tuple[int, ...] | None = None
    architecture: Mapping[str, Any] | None = None
    init_seed: int = 0
    pickled: bool = False


def resolve_teacher(config: TeacherConfig, store: Store, *, hashes: HashCache | None = None) -> ModelSource:
    """Where the model of `config.path` is. `config.experiment` has been replaced by a path before.

    Args:
        config: the section; `path` is a local folder, a student's path, id or beginning of an id, or a hub id.
        store: the artifacts among which a student is looked up.
        hashes: remembers the hashes of large files; by default in the store's folder.

    Raises:
        ConfigError: the path is nothing of these, or `revision` is set for a local one.
        ArtifactError: a local path does not exist, or holds no whole model; a student is missing or damaged.
        ResourceError: the hub does not give the model, and the cache has none.
        SecurityError: loading the model would run code.
    """
    assert config.path is not None, "steps replace an experiment by the path of what it makes"
    return _resolve_path(config, config.path, store, hashes or HashCache(store.outputs))


def resolve_student(config: StudentConfig, store: Store, *, hashes: HashCache | None = None) -> ModelSource:
    """As `resolve_teacher`, for the student before training: pruned to `layers`, or made from `architecture`."""
    hashes = hashes or HashCache(store.outputs)
    if config.architecture is None:
        assert config.path is not None, "steps replace an experiment by the path of what it makes"
        source = _resolve_path(config, config.path, store, hashes)
        if config.layers is None:
            return source
        kept = config.layers if isinstance(config.layers, int) else list(config.layers)
        named = f"{kept}-layers" if isinstance(kept, int) else f"layers-{'-'.join(map(str, kept))}"
        return replace(
            source, label=f"{source.label}-{named}", layers=config.layers, identity={**source.identity, "layers": kept}
        )
    assert config.tokenizer is not None, "the schema asks for a tokenizer beside an architecture"
    if config.layers is not None:
        raise ConfigError(
            "student.layers goes with student.path",
            why="a model made from student.architecture has the number of layers that is written there",
            fix="set student.layers to null",
        )
    tokenizer, tokenizer_identity = _resolve_tokenizer(config.tokenizer, config.revision, hashes)
    identity = {
        "architecture": dict(config.architecture),
        "init_seed": config.init_seed,
        "tokenizer": tokenizer_identity,
        "dtype": config.dtype,
    }
    return ModelSource(
        config.name,
        identity,
        tokenizer_identity,
        config.dtype,
        weights=None,
        tokenizer=tokenizer,
        architecture=config.architecture,
        init_seed=config.init_seed,
    )


def _resolve_path(config: ModelConfig, path: str, store: Store, hashes: HashCache) -> ModelSource:
    place = _place(path, store)
    if isinstance(place, str):
        from pocl_cli.models import hub  # 0.5 s that local models do without

        commit = hub.resolve_commit(place, config.revision, allow_pickle=config.allow_pickle)
        identity = {"hub": place, "commit": commit.commit}
        return ModelSource(
            place.rpartition("/")[2],
            {**identity, "dtype": config.dtype},
            identity,
            config.dtype,
            commit,
            commit,
            pickled=commit.pickled,
        )
    _refuse_revision(config.revision, path)
    pickled = folder.check_model_folder(place.path, allow_pickle=config.allow_pickle)
    tokenizer_identity = _hashes(folder.tokenizer_files(place.path), hashes)
    files = folder.model_files(place.path, pickled=pickled)
    identity = {"student": place.artifact} if place.artifact else _hashes(files, hashes)
    label = f"student-{place.artifact}" if place.artifact else _label(place.path)
    return ModelSource(
        label,
        {**identity, "dtype": config.dtype},
        tokenizer_identity,
        config.dtype,
        place.path,
        place.path,
        pickled=pickled,
    )


class _LocalPlace(NamedTuple):
    path: Path
    artifact: str | None = None


def _place(path: str, store: Store | None) -> _LocalPlace | str:
    """The folder that `path` means, with the id of the student that it belongs to; or the hub id.

    A local folder comes first. What looks like a path or an artifact's name and is none is never asked from the hub.
    """
    if not path or not path.isprintable():
        raise ConfigError(f"{path!r} is no path of a model", fix="give a folder, a student's id or a hub id")
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        top = local.parent if local.name == "model" and (local.parent / MANIFEST).is_file() else local
        if store is None or not (top / MANIFEST).is_file():
            return _LocalPlace(local)
        path = str(top)
    elif local.exists():
        raise ArtifactError(f"{path!r} is a file", why="a model is a folder with config.json", fix="name its folder")
    elif path[0] in "./~" or path.count("/") > 1 or "\\" in path:
        raise ArtifactError(
            f"there is no folder {path!r}",
            where=os.getcwd(),
            why="it looks like a local path",
            fix="correct the path; a hub id looks like owner/name",
        )
    elif store is None or not _ARTIFACT_NAME.fullmatch(path):
        return path
    artifact = store.resolve(path, kinds=("students",))
    return _LocalPlace(artifact.path / "model", artifact.id)


def _resolve_tokenizer(
    name: str, revision: str | None, hashes: HashCache
) -> tuple[Path | HubCommit | None, dict[str, Any]]:
    if name == TOY:
        _refuse_revision(revision, name)
        return None, {"toy": toy_tokenizer.VERSION}
    place = _place(name, None)
    if isinstance(place, str):
        from pocl_cli.models import hub

        commit = hub.resolve_commit(place, revision, needs_weights=False)
        return commit, {"hub": place, "commit": commit.commit}
    _refuse_revision(revision, name)
    folder.check_tokenizer_folder(place.path)
    return place.path, _hashes(folder.tokenizer_files(place.path), hashes)


def _refuse_revision(revision: str | None, path: str) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision {revision!r} goes with a hub id", why=f"{path!r} is local", fix="set revision to null"
        )


def _hashes(files: Sequence[Path], hashes: HashCache) -> dict[str, Any]:
    return {"files": {path.name: hashes.sha256_file(path) for path in files}}


def _label(path: Path) -> str:
    absolute = Path(os.path.abspath(path))
    return absolute.parent.name if absolute.name in ("model", "") else absolute.name
