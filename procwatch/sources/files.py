"""
What an opened file is: path, identity, kind. Shared by the two fanotify sources.
"""

from __future__ import annotations

import os

from procwatch.facts import Opened
from procwatch.sources import libc
from procwatch.wire import elf

# Files whose first bytes are remembered. A host runs some hundreds of programs.
CACHE = 4096

_DELETED = " (deleted)"
_MACHINES = elf.MACHINES.get(os.uname().machine)


State = tuple[int, int, int, int]
"""Device, inode, change time and size: whoever writes to a file changes its time."""


class Files:
    """
    Describes files that fanotify handed over as open descriptors.

    The path is what readlink gives for the descriptor, and that is what /proc/PID/exe shows to a reader on the host:
    both are the kernel's d_path() from the reader's root. Tried: for a file on a mount of another namespace, or of a
    container after pivot_root, it is the path inside; in a chroot the path from the real root; on a detached mount the
    path from that mount's root. The last is also what is left of a mount that went away before we read: that of a
    mount namespace, for instance, which ended with the process.

    Args:
        links: /proc/self/fd, if the caller keeps it open: that saves a third of what a path costs.
    """

    def __init__(self, links: int | None = None) -> None:
        self._links = links
        self._link = b"/proc/self/fd/%d" if links is None else b"%d"
        self._heads: dict[State, tuple[str, str | None]] = {}
        self._last: dict[int, State] = {}  # by pid
        self._before: dict[int, State] = {}
        self._memory_dev = libc.memory_device()

    def next_batch(self) -> None:
        """
        Forget the opens of all but the last batch.
        """
        self._before, self._last = self._last, {}

    def describe(self, fd: int, pid: int, time_ns: int) -> Opened:
        """
        The fact for one open by `pid`. Without a path when it is longer than the kernel can tell.
        """
        status = os.fstat(fd)
        try:
            path = os.readlink(self._link % fd, dir_fd=self._links).decode("utf-8", "surrogateescape")
        except OSError:
            path = ""
        dev, inode, size = status.st_dev, status.st_ino, status.st_size
        deleted = memfd = False
        if path.endswith(_DELETED) and (status.st_nlink == 0 or not _is_named(path, status)):
            path, deleted = path[: -len(_DELETED)], True
            memfd = dev == self._memory_dev and path.startswith("/memfd:")
        state = (dev, inode, status.st_ctime_ns, size)
        kind, interpreter = self._heads.get(state) or self._read_head(fd, state)
        last = self._last
        before = last.get(pid) or self._before.get(pid)
        over = before is not None and before[0] != dev and _is_over(before, state, fd)
        last[pid] = state
        stray = kind == "script" and interpreter is not None and _is_nowhere(pid, interpreter)
        return Opened(time_ns, pid, path, deleted, memfd, dev, inode, size, kind, interpreter, None, stray, over)

    def _read_head(self, fd: int, state: State) -> tuple[str, str | None]:
        try:
            head = _read(fd)
        except OSError:  # an I/O error of the filesystem: the exec fails as well
            return elf.OTHER.kind, None
        if len(self._heads) >= CACHE:
            del self._heads[next(iter(self._heads))]
        self._heads[state] = head
        return head


def _read(fd: int) -> tuple[str, str | None]:
    first = os.pread(fd, elf.FIRST_BYTES, 0)
    head = elf.head(first, _MACHINES)
    if head.kind != "elf":
        return head.kind, head.interpreter
    headers = _piece(fd, first, *elf.headers_range(head))
    name = _piece(fd, first, *elf.interpreter_range(head, headers))
    return head.kind, elf.name(name)


def _piece(fd: int, first: bytes, offset: int, size: int) -> bytes:
    return first[offset : offset + size] if offset + size <= len(first) else os.pread(fd, size, offset)


def _is_named(path: str, status: os.stat_result) -> bool:
    """
    Whether a file is really called "something (deleted)".
    """
    try:
        named = os.stat(os.fsencode(path))
    except (OSError, ValueError):
        return False
    return (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino)


def _is_nowhere(pid: int, interpreter: str) -> bool:
    """
    Whether a process that still lives would not find an interpreter; of one that is gone nobody can tell.

    A link is enough: an absolute one could not be followed from the root of another.
    """
    if not interpreter.startswith("/"):
        return False
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.stat(os.fsencode(interpreter).lstrip(b"/"), dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(root)
    return False


def _is_over(below: State, state: State, fd: int) -> bool:
    """
    Whether this is a file of an overlay, and the open before was of the layer's file beneath it.

    overlayfs opens the real file with the same flags, so that an exec gives two events, the layer's first. Its path is
    one that exists nowhere: from the root of the overlay's own private mount.
    """
    return below[2:] == state[2:] and libc.filesystem_magic(fd) == libc.OVERLAYFS_SUPER_MAGIC
