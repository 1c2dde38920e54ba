"""
Decode /proc/PID/mountinfo (proc_pid_mountinfo(5), fs/proc_namespace.c).
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from procwatch.errors import DecodeError

_ESCAPE: Final = re.compile(rb"\\([0-3][0-7]{2})")


class Mount(Struct, frozen=True):
    """
    One mount: its number and its parent's, the superblock as "major:minor", where it is seen, and its type.
    """

    id: int
    parent: int
    device: str
    point: str
    kind: str


def decode(data: bytes) -> list[Mount]:
    """
    All mounts, in the kernel's order.

    Raises:
        DecodeError: A line without the fields that the kernel writes.
    """
    return [_line(line) for line in data.split(b"\n") if line]


def _line(line: bytes) -> Mount:
    head, separator, tail = line.partition(b" - ")
    fields = head.split(b" ")
    if not separator or len(fields) < 6:
        raise DecodeError(f"mountinfo: no such line: {line[:80]!r}")
    try:
        number, parent = int(fields[0]), int(fields[1])
    except ValueError as error:
        raise DecodeError(f"mountinfo: no such numbers: {line[:80]!r}") from error
    return Mount(number, parent, _text(fields[2]), _text(fields[4]), _text(tail.split(b" ", 1)[0]))


def _text(field: bytes) -> str:
    r"""
    Undo the kernel's \040 for a space (mangle() in fs/seq_file.c).
    """
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 8),)), field).decode("utf-8", "surrogateescape")


def reachable(mounts: list[Mount]) -> list[Mount]:
    """
    Those mounts that a lookup of their mount point ends in: nothing is mounted over them or over a directory above.
    """
    children = {(mount.parent, mount.point): mount.id for mount in mounts if mount.id != mount.parent}
    numbers = {mount.id for mount in mounts}
    roots = [mount.id for mount in mounts if mount.point == "/" and (mount.parent not in numbers)]
    if not roots:
        return []
    return [mount for mount in mounts if _walk(mount.point, roots[0], children) == mount.id]


def _walk(path: str, at: int, children: dict[tuple[int, str], int]) -> int:
    """
    The number of the mount that `path` is in, as the kernel's lookup crosses mount points one after the other.
    """
    here = "/"
    names = [name for name in path.split("/") if name]
    for name in ("", *names):
        here = here.rstrip("/") + "/" + name if name else here
        for _ in range(len(children)):  # one may be mounted over the other; bounded, for tables that name each other
            below = children.get((at, here))
            if below is None:
                break
            at = below
    return at
