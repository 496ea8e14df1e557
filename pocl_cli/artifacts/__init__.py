"""Durable files, content hashes, and the store of finished artifacts."""

from pocl_cli.artifacts.disk import check_free_disk
from pocl_cli.artifacts.hashing import HashCache
from pocl_cli.artifacts.manifest import KINDS, Artifact, ArtifactKey, FileEntry, Manifest, difference
from pocl_cli.artifacts.store import Interrupted, Store
from pocl_cli.artifacts.work import Work

__all__ = [
    "KINDS",
    "Artifact",
    "ArtifactKey",
    "FileEntry",
    "HashCache",
    "Interrupted",
    "Manifest",
    "Store",
    "Work",
    "check_free_disk",
    "difference",
]
