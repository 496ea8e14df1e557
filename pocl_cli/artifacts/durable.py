"""The only module that opens durable files for writing.

Every write goes to a temporary file in the target's folder, is flushed and fsynced, and renamed over the target; the
folder is fsynced last. A reader, and a rerun after a crash at any point, sees the old content or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pocl_cli import faults
from pocl_cli.artifacts.disk import rename_without_replacing, reported
from pocl_cli.artifacts.encoding import json_text, safetensors_header
from pocl_cli.errors import ArtifactError

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

TEMPORARY = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file by `data`. Makes missing parent folders. Raises ResourceError."""
    with _replacing(path) as handle:
        handle.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces the file by `text` in UTF-8; lone surrogates become backslash escapes. Raises ResourceError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Replaces the file by `value` as indented JSON with sorted keys. Raises ResourceError, NonFiniteError."""
    write_text(path, json_text(value, where=str(path), indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Replaces the file by one JSON line a row, keys sorted. Raises ResourceError, NonFiniteError."""
    with _replacing(path) as handle:
        for row in rows:
            handle.write((json_text(row, where=str(path)) + "\n").encode())


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Appends one JSON line a row and fsyncs. Raises ResourceError, NonFiniteError.

    What an interrupted append left behind (a last line without its end) is removed first, and what a failed one
    wrote is taken back, so that the file holds whole lines only.
    """
    data = "".join(json_text(row, where=str(path)) + "\n" for row in rows).encode()
    make_folder(path.parent)
    with reported(path, "append to"):
        is_new = not path.exists()
        faults.reached("write", path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+b") as handle:
            end = _end_of_last_line(handle)
            handle.truncate(end)
            handle.seek(end)
            try:
                handle.write(data)
                handle.flush()
                faults.reached("fsync", path)
                os.fsync(handle.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
    if is_new:
        fsync_folder(path.parent)


def _end_of_last_line(handle: BinaryIO, block: int = 65536) -> int:
    end = handle.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        handle.seek(start)
        newline = handle.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def truncate(path: Path, num_bytes: int) -> None:
    """Cuts the file back to its first `num_bytes` bytes; a missing file counts as an empty one and is made.

    Raises:
        ArtifactError: the file is shorter: lines that were flushed once are gone.
        ResourceError: the file cannot be written.
    """
    make_folder(path.parent)
    with reported(path, "shorten"):
        faults.reached("write", path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size < num_bytes:
                raise ArtifactError(
                    f"{path} is damaged",
                    why=f"it has {size} bytes, and {num_bytes} were written to it",
                    fix=f"delete the unfinished run: rm -r {shlex.quote(str(path.parent))}",
                )
            os.ftruncate(descriptor, num_bytes)
            faults.reached("fsync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(path.parent)


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    """Replaces the file by `table`, compressed with zstd. Raises ResourceError."""
    import pyarrow.parquet

    with _replacing(path) as handle:
        pyarrow.parquet.write_table(table, handle, compression="zstd")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces the file by `tensors` in safetensors format. Equal tensors and metadata give equal bytes.

    Written here and not by the library, which orders the metadata at random.
    Tensors that share storage are written once each. Raises ResourceError.
    """
    import torch

    order, header = safetensors_header(tensors, metadata or {})
    with _replacing(path) as handle:
        handle.write(header)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    make_folder(path.parent)
    temporary = _temporary_beside(path)
    with reported(path, "write"):
        try:
            faults.reached("write", path)
            with open(temporary, "xb") as handle:
                yield handle
                handle.flush()
                faults.reached("fsync", path)
                os.fsync(handle.fileno())
            faults.reached("rename", path)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    fsync_folder(path.parent)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def make_folder(path: Path) -> None:
    """Makes the folder and its missing parents, durably. Raises ResourceError."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    with reported(path, "make the folder"):
        faults.reached("mkdir", path)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Flushes a file that somebody else wrote to the disk. Raises ResourceError."""
    with reported(path, "flush"):
        faults.reached("fsync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk. Raises ResourceError."""
    with reported(path, "flush"):
        faults.reached("fsync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
                raise
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, itself last. Raises ResourceError."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in sorted(files):
            fsync_file(Path(root, name))
        fsync_folder(Path(root))


def place_file(source: Path, target: Path) -> None:
    """Gives the file a second name, or a copy where the file system knows no hard links. Raises ResourceError."""
    make_folder(target.parent)
    with reported(target, "write"):
        faults.reached("link", target)
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS):
                raise
            shutil.copyfile(source, target, follow_symlinks=False)


def rename(source: Path, target: Path) -> None:
    """Renames `source` to `target` without replacing anything, and flushes the folders of both.

    Flush the content of a folder with `fsync_tree` first.

    Raises:
        FileExistsError: something has the name `target` already; `source` is left as it was.
        ResourceError: any other failure.
    """
    try:
        faults.reached("rename", target)
        rename_without_replacing(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        with reported(target, "rename to"):
            raise
    for parent in {target.parent, source.parent}:
        fsync_folder(parent)


def point_link(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, replacing an earlier link at once. Raises ResourceError."""
    temporary = _temporary_beside(link)
    with reported(link, "write"):
        faults.reached("symlink", link)
        os.symlink(target, temporary)
        try:
            faults.reached("rename", link)
            os.replace(temporary, link)
        except OSError:
            os.unlink(temporary)
            raise
    fsync_folder(link.parent)


def remove_file(path: Path) -> None:
    """Removes a file or a link; nothing happens where there is none. Raises ResourceError."""
    with reported(path, "remove"), suppress(FileNotFoundError):
        faults.reached("unlink", path)
        os.unlink(path)


def remove_tree(path: Path) -> None:
    """Removes a folder and all in it, never through a link, whoever else removes it too. Raises ResourceError."""
    if path.is_symlink() or not path.is_dir():
        remove_file(path)
        return
    with reported(path, "remove"):
        while path.is_dir():
            with suppress(FileNotFoundError):  # somebody else was faster: look again what is left
                _remove_content(path)
                os.rmdir(path)


def _remove_content(path: Path) -> None:
    for root, folders, files, descriptor in os.fwalk(path, topdown=False, follow_symlinks=False):
        for name in [*files, *folders]:
            faults.reached("unlink", Path(root, name))
            try:
                os.unlink(name, dir_fd=descriptor)
            except (IsADirectoryError, PermissionError):  # a folder: EISDIR on Linux, EPERM on macOS
                os.rmdir(name, dir_fd=descriptor)


def remove_temporaries(folder: Path, *, recursive: bool, older_than_seconds: float) -> None:
    """Removes temporary files which killed writers left in `folder`. Raises ResourceError.

    Args:
        folder: where to look; nothing happens where it does not exist.
        recursive: look in the folders below, too.
        older_than_seconds: leave younger ones, whose writers may live; 0 only where their lock is held.
    """
    for root, folders, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            with suppress(FileNotFoundError):
                if TEMPORARY.fullmatch(name) and time.time() - path.lstat().st_mtime >= older_than_seconds:
                    remove_file(path)
        if not recursive:
            folders.clear()
