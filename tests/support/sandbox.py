"""Runs an action in a forked child that has no network, its own home, and somebody who watches what it does."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_cli import cli, log

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of Python by what they mean; the paths or the program are among their first arguments.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
REACHES = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind", "socket.getaddrinfo"}
REACHES |= {"socket.gethostbyname", "urllib.Request", "http.client.connect"}


@dataclass(frozen=True)
class Site:
    """A place of its own for one trial: `work` is the working folder, and only `work/outputs` may change."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def outside(self) -> Path:
        """Somebody else's folder."""
        return self.root / "outside"

    @property
    def canary(self) -> Path:
        """What a payload makes, once it runs."""
        return self.root / "canary"

    def make(self) -> None:
        for name in ("work", "home", "tmp", "outside"):
            (self.root / name).mkdir(parents=True)

    def listing(self) -> dict[str, str]:
        """Everything outside `work/outputs` by its content, links by where they lead."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            if Path(folder) == self.work:
                folders[:] = [name for name in folders if name != "outputs" or (self.work / name).is_symlink()]
            for name in [*folders, *files]:
                path = Path(folder, name)
                shown = (
                    os.readlink(path)
                    if path.is_symlink()
                    else hashlib.sha256(path.read_bytes()).hexdigest()
                    if path.is_file()
                    else "folder"
                )
                found[str(path.relative_to(self.root))] = shown
        return found


@dataclass(frozen=True)
class Outcome:
    """What became of an action: its exit code as a command, what it printed, and what it did that it should not.

    `value` is what it returned, where it is plain; `num_packets` are those it sent, None where the child could not get
    a network of its own.
    """

    exit_code: int
    stdout: str
    stderr: str
    value: Any
    incidents: list[str]
    num_packets: int | None


def watched(site: Site, action: Callable[[], object], env: Mapping[str, str] | None = None) -> Outcome:
    """Runs `action` in `site.work` and says what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        report = Path(folder) / "report"
        pid = os.fork()
        if pid == 0:
            _child(site, action, env or {}, streams, report)
        os.waitpid(pid, 0)
        assert report.exists(), streams[1].read_text(encoding="utf-8", errors="replace")
        texts = [path.read_bytes().decode(errors="backslashreplace") for path in streams]
        content = json.loads(report.read_text(encoding="utf-8"))
    return Outcome(content["exit_code"], *texts, content["value"], content["incidents"], content["num_packets"])


def _child(site: Site, action: Callable[[], object], env: Mapping[str, str], streams: list[Path], report: Path) -> None:
    incidents: list[str] = []
    try:
        alone = _leave_the_network()
        os.chdir(site.work)
        os.environ.update({"HOME": str(site.root / "home"), "TMPDIR": str(site.root / "tmp"), **env})
        tempfile.tempdir = None
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        log._console = None
        _reach_for_the_hub(site)
        watching = [True]
        sys.addaudithook(lambda event, arguments: _watch(event, arguments, site, incidents) if watching else None)
        value, code = None, 0
        try:
            value = action()
        except BaseException as error:
            code = cli.ended_by(error)
        watching.clear()
        sys.stdout.flush()
        sys.stderr.flush()
        content = {
            "exit_code": code,
            "value": value if isinstance(value, bool | int | str | list | None) else str(value),
            "incidents": incidents,
            "num_packets": _num_packets() if alone else None,
        }
        report.write_text(json.dumps(content), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _leave_the_network() -> bool:
    """Gives this process a network without any device that leads out; False where the system does not allow it."""
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is None:
        return False
    user, group = os.getuid(), os.getgid()
    if unshare(CLONE_NEWNET) == 0:
        return True
    if unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _num_packets() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[9]) for line in lines)


def _reach_for_the_hub(site: Site) -> None:
    """Lets the libraries ask the hub, so that whatever makes them ask is seen."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = str(site.root / "home" / "hub")


def _watch(event: str, arguments: tuple[Any, ...], site: Site, incidents: list[str]) -> None:
    if event == "open":
        path, mode, flags = arguments
        writes = bool(set(str(mode or "")) & set("wax+")) or bool((flags or 0) & WRITES)
        if writes and isinstance(path, str | bytes | os.PathLike) and not _may_change(path, site):
            incidents.append(f"writes {os.fsdecode(path)}")
    elif event in CHANGES:
        for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
            absolute = isinstance(path, str | bytes | os.PathLike) and os.path.isabs(os.fsdecode(path))
            if absolute and event != "os.symlink" and not _may_change(path, site):
                incidents.append(f"{event} {os.fsdecode(path)}")
    elif event in STARTS:
        if os.path.basename(str(arguments[0] if arguments else "")) != "git":
            incidents.append(f"{event} {arguments[:2]}")
    elif event in REACHES:
        incidents.append(f"{event} {arguments[1:]}")
    elif event == "pickle.find_class":
        incidents.append(f"unpickles {arguments}")
    elif event in ("import", "ctypes.dlopen"):
        named = [str(one) for one in arguments if isinstance(one, str)]
        if any(one.startswith(str(site.root)) for one in named):
            incidents.append(f"{event} {named}")
    elif event == "exec":
        name = str(getattr(arguments[0], "co_filename", ""))
        if name.startswith(str(site.root)):
            incidents.append(f"runs {name}")


def _may_change(path: str | bytes | os.PathLike[str], site: Site) -> bool:
    real = Path(os.path.realpath(os.fsdecode(path)))
    return real == Path(os.devnull) or real.is_relative_to(site.work / "outputs")
