"""What Linux tells of other processes: who their children are, and where they listen."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path

LISTENS, UNCONNECTED = "0A", "07"  # states of TCP and UDP sockets


def family(pid: int) -> set[int]:
    """The process and everything below it that is alive."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(") ")
        except OSError:
            continue  # it has just ended
        parents[int(name.partition(" ")[0])] = (int(rest.split()[1]), rest.split()[0])
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, (parent, _) in parents.items() if parent in more} - found
    return {one for one in found if one in parents and parents[one][1] != "Z"}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def open_to_others(pids: set[int]) -> set[str]:
    """The sockets of these processes that a machine beside this one could reach."""
    own = set().union(*map(_sockets, pids))
    found = set()
    for protocol, state in (("tcp", LISTENS), ("tcp6", LISTENS), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        table = Path("/proc/net") / protocol
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == state and fields[9] in own and not _is_loopback(fields[1].partition(":")[0]):
                found.add(f"{protocol} {fields[1]}")
    return found


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    inodes = set()
    try:
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(descriptor.path)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:
        pass  # it has just ended
    return inodes


def _is_loopback(address: str) -> bool:
    """Whether an address of /proc/net, words of 32 bits in the machine's order, is of this machine alone."""
    words = [int(address[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
