"""
Decode the texts of /proc, proc(5): whatever bytes come, a value or DecodeError.

Nothing here opens a file; `procwatch.sources.procfs` reads them.
"""

from __future__ import annotations

import struct
from typing import Final

from msgspec import Struct

from procwatch.errors import DecodeError

# Task flags in field 9 of stat (include/linux/sched.h).
PF_EXITING: Final = 0x00000004
PF_FORKNOEXEC: Final = 0x00000040  # was forked, and has executed nothing yet; every user may see it
PF_KTHREAD: Final = 0x00200000

AT_NULL: Final = 0
AT_EXECFN: Final = 31  # address of the name that was given to execve(2)

DELETED: Final = b" (deleted)"
# The hierarchy whose path says most of where a process belongs, best first; others come after these.
_V1_ORDER: Final = (b"pids", b"memory", b"cpu", b"cpuacct", b"cpuset", b"devices", b"freezer", b"blkio")
# AT_ types are small numbers; a 32-bit vector read as 64-bit has its values in the upper halves.
_AT_PLAUSIBLE: Final = 256


class Stat(Struct, frozen=True, gc=False):
    """
    What is used of /proc/PID/stat.

    `image` is start_code, end_code and start_stack: places in memory that an exec draws anew and nothing else
    changes (but for prctl(PR_SET_MM), which needs CAP_SYS_RESOURCE). Who may not trace the process sees 0 as the
    last of them: `readable` is False then.
    """

    comm: str
    state: str  # one letter: "R", "S", "Z" ...
    ppid: int
    session: int
    tty_nr: int
    flags: int
    threads: int
    start_ticks: int
    image: tuple[int, int, int]
    exit_signal: int  # -1 for a thread that is not the leader of its group
    exit_code: int  # as wait(2) gives it; 0 while the process lives, and to who may not trace it

    @property
    def readable(self) -> bool:
        """
        Whether the reader may look into the process (never so for kernel threads and zombies, that have no memory).
        """
        return self.image[2] != 0

    @property
    def kernel_thread(self) -> bool:
        """
        Has no program of user space.
        """
        return bool(self.flags & PF_KTHREAD)

    @property
    def ending(self) -> bool:
        """
        The task has given its memory back, or is about to.
        """
        return self.state in "ZXx" or bool(self.flags & PF_EXITING)

    @property
    def ended(self) -> bool:
        """
        The whole group is dead, and waits at most for its parent.
        """
        return self.state in "ZXx" and self.threads <= 1


class Status(Struct, frozen=True, gc=False):
    """
    What is used of /proc/PID/status.

    `ns_pids` are the pids in each nested namespace, outermost first; empty before Linux 4.1.
    """

    tgid: int
    uid: int
    euid: int
    gid: int
    egid: int
    ns_pids: tuple[int, ...]


def text(data: bytes) -> str:
    """
    The kernel's bytes as text from which they can be had back.
    """
    return data.decode("utf-8", "surrogateescape")


def stat(data: bytes) -> Stat:
    """
    Decode /proc/PID/stat.

    The comm may hold anything but NUL, also ")" and newlines; what follows its end is only numbers and a letter.
    """
    begin, end = data.find(b"("), data.rfind(b")")
    fields = data[end + 1 :].split()
    if begin < 0 or end < begin or len(fields) < 50:
        raise DecodeError(f"stat: {data[:80]!r} is not the text of a process")
    try:
        return Stat(
            comm=text(data[begin + 1 : end]),
            state=fields[0].decode("ascii"),
            ppid=int(fields[1]),
            session=int(fields[3]),
            tty_nr=int(fields[4]),
            flags=int(fields[6]),
            threads=int(fields[17]),
            start_ticks=int(fields[19]),
            image=(int(fields[23]), int(fields[24]), int(fields[25])),
            exit_signal=int(fields[35]),
            exit_code=int(fields[49]),
        )
    except ValueError as error:
        raise DecodeError(f"stat: {error}") from error


def status(data: bytes) -> Status:
    """
    Decode /proc/PID/status. The kernel escapes newlines in Name, so that no process can forge a line.
    """
    try:
        uids, gids = _line(data, b"\nUid:").split(), _line(data, b"\nGid:").split()
        return Status(
            tgid=int(_line(data, b"\nTgid:")),
            uid=int(uids[0]),
            euid=int(uids[1]),
            gid=int(gids[0]),
            egid=int(gids[1]),
            ns_pids=tuple(map(int, _line(data, b"\nNSpid:").split())) if b"\nNSpid:" in data else (),
        )
    except (ValueError, IndexError) as error:
        raise DecodeError(f"status: {error}") from error


def _line(data: bytes, key: bytes) -> bytes:
    at = data.index(key) + len(key)
    end = data.find(b"\n", at)
    return data[at:] if end < 0 else data[at:end]


def argv(data: bytes) -> list[str]:
    """
    Decode /proc/PID/cmdline: each argument ends with NUL, but for a text written over them (setproctitle).

    >>> argv(b"a" + bytes(2) + b"b" + bytes(1))
    ['a', '', 'b']
    """
    if not data:
        return []
    return text(data.removesuffix(b"\0")).split("\0")


def cgroup_path(data: bytes) -> str:
    """
    Choose the path from /proc/PID/cgroup, lines of "hierarchy:controllers:path".

    The v2 hierarchy, else systemd's, else the controller that container runtimes always use; a hierarchy that does
    not sort processes has "/". A path of a removed cgroup loses its " (deleted)".
    """
    paths: dict[bytes, bytes] = {}
    for line in data.split(b"\n"):
        if not line:
            continue
        fields = line.split(b":", 2)
        if len(fields) != 3 or not fields[2].startswith(b"/"):
            raise DecodeError(f"cgroup: {line[:80]!r} is not hierarchy:controllers:path")
        path = fields[2].removesuffix(DELETED)
        if path != b"/":
            for controller in fields[1].split(b","):
                paths[controller] = path
    for controller in (b"", b"name=systemd", *_V1_ORDER):
        if controller in paths:
            return text(paths[controller])
    return text(next(iter(paths.values()), b"/"))


def last_pid(data: bytes) -> int:
    """
    Decode /proc/loadavg: the pid that was given out last in the reader's pid namespace.
    """
    try:
        return int(data.split()[4])
    except (ValueError, IndexError) as error:
        raise DecodeError(f"loadavg: {data[:80]!r}") from error


def born(data: bytes) -> int:
    """
    Decode /proc/stat: how many tasks, threads among them, were born since boot, in all namespaces.
    """
    try:
        return int(_line(data, b"\nprocesses "))
    except ValueError as error:
        raise DecodeError(f"/proc/stat: {error}") from error


def auxv(data: bytes) -> dict[int, int]:
    """
    Decode /proc/PID/auxv, a process of 64 or of 32 bits; empty for a process without memory.
    """
    if not data:
        return {}
    for layout in ("=QQ", "=II"):
        found: dict[int, int] = {}
        whole = len(data) - len(data) % struct.calcsize(layout)
        for key, value in struct.iter_unpack(layout, data[:whole]):
            if key == AT_NULL and found:
                return found
            if not AT_NULL < key < _AT_PLAUSIBLE:
                break
            found[key] = value
    raise DecodeError(f"auxv: {len(data)} bytes are no auxiliary vector")


def tty_name(number: int) -> str:
    """
    The name below /dev of a terminal, "" for none, "major:minor" for one not known here (Documentation/devices.txt).

    >>> tty_name(34816), tty_name(1025), tty_name(0)
    ('pts/0', 'tty1', '')
    """
    if number == 0:
        return ""
    # new_encode_dev() in include/linux/kdev_t.h; printed as a signed int
    number &= 0xFFFFFFFF
    major, minor = (number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00)
    if 136 <= major <= 143:
        return f"pts/{(major - 136) * 256 + minor}"
    if major == 4:
        return f"tty{minor}" if minor < 64 else f"ttyS{minor - 64}"
    return {(5, 0): "tty", (5, 1): "console"}.get((major, minor), f"{major}:{minor}")
