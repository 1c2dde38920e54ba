"""
SHA-256 of the files that ran, computed in a thread from the file itself, not from what its path names later.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from procwatch.enrich.files import find
from procwatch.enrich.worker import Worker

MAX_BYTES = 256 << 20
MAX_FILES = 8192
# Files that wait are open: this bounds the descriptors. What does not fit has no hash this time, and is counted.
MAX_WAITING = 128

Key = tuple[int, int, int, int]  # device, inode, change time, size


class Hash:
    """
    The hash of one file: `hex` is there when `done`, or None where it could not be had.
    """

    __slots__ = ("done", "hex")

    def __init__(self, digest: str | None = None, *, done: bool = False) -> None:
        self.hex = digest
        self.done = done


_NONE = Hash(done=True)
REFUSED = Hash()  # too many wait: asked for again with the next event


class Hasher:
    """
    Args:
        max_bytes: Larger files are not hashed.
        capacity: Hashes that are remembered; then all are forgotten.
        on_ready: Called from the thread whenever a hash is done.
    """

    def __init__(
        self, *, max_bytes: int = MAX_BYTES, capacity: int = MAX_FILES, on_ready: Callable[[], None] | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._capacity = capacity
        self._on_ready = on_ready
        self._hashes: dict[Key, Hash] = {}
        self._worker = Worker("procwatch-hashes", MAX_WAITING)
        self._waiting: set[int] = set()  # descriptors

    @property
    def refused(self) -> int:
        """
        Files that were not hashed because too many waited.
        """
        return self._worker.refused

    def of(self, pid: int, path: str | None, dev: int | None = None, inode: int | None = None) -> Hash:
        """
        The hash of the file that process `pid` runs, reported as `path`; it may not be done yet.
        """
        found = find(pid, path, dev, inode)
        if found is None or found[1].st_size > self._max_bytes:
            return _NONE
        known = self._hashes.get(_key(found[1]))
        return known if known is not None else self._start(found[0], _key(found[1]))

    def close(self) -> None:
        """
        End the thread; what waits is not hashed.
        """
        self._on_ready = None
        self._worker.close()
        for fd in self._waiting:
            os.close(fd)
        self._waiting.clear()

    def _start(self, path: str, key: Key) -> Hash:
        try:
            # Not a FIFO or a device: something with this inode has been executed. O_NONBLOCK in case it changed.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return _NONE
        if _key(os.fstat(fd)) != key:
            os.close(fd)
            return _NONE
        pending = Hash()
        self._waiting.add(fd)
        if not self._worker.submit(lambda: self._digest(fd, key, pending)):
            self._waiting.discard(fd)
            os.close(fd)
            return REFUSED
        if len(self._hashes) >= self._capacity:
            self._hashes.clear()
        self._hashes[key] = pending
        return pending

    def _digest(self, fd: int, key: Key, pending: Hash) -> None:
        self._waiting.discard(fd)
        try:
            with open(fd, "rb", buffering=0) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if _key(os.fstat(fd)) == key:  # else it was written to meanwhile
                    pending.hex = digest
        except OSError:
            pass
        pending.done = True
        if (ready := self._on_ready) is not None:
            ready()


def _key(state: os.stat_result) -> Key:
    return (state.st_dev, state.st_ino, state.st_ctime_ns, state.st_size)
