"""Makes the weights of a model fit to be loaded: of a student made here they are hashed, pickled ones are converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_cli.artifacts.disk import check_free_disk
from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.log import get_logger
from pocl_cli.models import folder
from pocl_cli.models.source import ModelSource

if TYPE_CHECKING:
    from pocl_cli.steps.chain import Chain


def loadable(chain: Chain, source: ModelSource) -> ModelSource:
    """`source`, with weights that `load_model` may read.

    Raises:
        ArtifactError: the files of a student made here are not those that were written, or a pickle is damaged.
        SecurityError: a pickle holds more than tensors.
        ResourceError: the hub does not give the pickle, or the disk is full.
    """
    if source.pickled:
        return replace(source, weights=_converted(chain, source).path / "model", pickled=False)
    if made := source.identity.get("student"):
        artifact = chain.store.find(("students", str(made)))
        if artifact is not None:
            chain.store.verify(artifact)
    return source


def _converted(chain: Chain, source: ModelSource) -> Artifact:
    """The artifact that holds a pickled model's weights as safetensors, made where it is not there yet."""
    place = _place(source)
    files = {path.name: chain.hashes.sha256_file(path) for path in folder.weight_files(place, pickled=True)}
    settings = {path.name: chain.hashes.sha256_file(path) for path in folder.settings_files(place)}
    key = chain.conversion_key(source.label, {**files, **settings})
    found = chain.store.find(key)
    if found is None:
        from pocl_cli.models import pickled

        with chain.store.open_work(key, wait=True) as work:
            if work.finished is not None:
                return work.finished
            get_logger().warning(
                "%s has pickled weights only: they are read once, tensors only, and kept", source.label
            )
            size = sum(path.stat().st_size for path in folder.weight_files(place, pickled=True))
            check_free_disk(work.path, size, f"the weights of {source.label} as safetensors")
            pickled.convert(place, work.path / "model")
            found = work.commit(config=chain.run.resolved, inputs={}, command=chain.run.command, seed=None)
        get_logger().info("converted to safetensors: %s", found.path)
    chain.store.verify(found)
    return found


def _place(source: ModelSource) -> Path:
    """The folder that holds the pickle, fetched where it is on the hub."""
    if isinstance(source.weights, Path):
        return source.weights
    assert source.weights is not None, "a model made from nothing has no pickle"
    from pocl_cli.models import hub

    return hub.fetch(source.weights, weights=True)
