"""
A directory tree that somebody else writes: the host's as seen from here, or that of a container.

What runtimes keep on disk is read with four rules. A path never leads out of the tree, whatever symbolic links stand
in it (openat2(2), RESOLVE_IN_ROOT). Only regular files are opened, and nothing is opened to find out: a FIFO or a
device would block or act. No more than a stated number of bytes is read. Nothing raises: what cannot be read is None.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from types import TracebackType
from typing import Any

import msgspec

MAX_BYTES = 8 << 20  # of one file: `containers.json` of Podman has a kilobyte for each container
MAX_ENTRIES = 10_000  # of one directory

_OPENAT2 = 437  # the same on every architecture since Linux 5.6
_NO_MAGICLINKS, _NO_SYMLINKS, _IN_ROOT = 0x02, 0x04, 0x10  # linux/openat2.h
_HOW = struct.Struct("@QQQ")
_libc = ctypes.CDLL(None, use_errno=True)


class Tree:
    """
    The files below one directory.

    Args:
        root: The directory: "/", "/host", "/proc/PID/root".
        foreign: Written by someone who is not trusted (a container): symbolic links are then not followed at all.
    """

    def __init__(self, root: str = "/", *, foreign: bool = False) -> None:
        self.root = root
        self._resolve = _NO_MAGICLINKS | _IN_ROOT | (_NO_SYMLINKS if foreign else 0)
        self._fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """
        Let the directory go.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def open(self, path: str) -> int | None:
        """
        A descriptor to read the regular file at `path`, else None; the caller closes it.
        """
        place = self._look(path)
        if place is None:
            return None
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                return None
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        finally:
            os.close(place)

    def read(self, path: str, limit: int = MAX_BYTES) -> bytes | None:
        """
        The whole file, or None where it is longer than `limit` bytes.
        """
        fd = self.open(path)
        if fd is None:
            return None
        try:
            with open(fd, "rb", buffering=0) as file:
                if os.fstat(fd).st_size > limit:
                    return None
                content = file.read(limit + 1)
        except OSError:
            return None
        return content if content is not None and len(content) <= limit else None

    def json(self, path: str) -> Any:
        """
        The value in a JSON file; None where there is no file or no JSON.
        """
        return decode(self.read(path))

    def list(self, path: str) -> list[str]:
        """
        Names in a directory, in no order; [] where there is none. Cut at `MAX_ENTRIES`.
        """
        place = self._look(path)
        if place is None:
            return []
        try:
            with os.scandir(f"/proc/self/fd/{place}") as entries:
                return [entry.name for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
        except OSError:
            return []
        finally:
            os.close(place)

    def stat(self, path: str) -> os.stat_result | None:
        """
        What is at `path`, without opening it.
        """
        place = self._look(path)
        if place is None:
            return None
        try:
            return os.fstat(place)
        finally:
            os.close(place)

    def _look(self, path: str) -> int | None:
        """
        An O_PATH descriptor, which has no effect on what it names.
        """
        how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, self._resolve)
        try:
            name = os.fsencode(path)
        except UnicodeEncodeError:
            return None
        if b"\0" in name:
            return None
        fd = _libc.syscall(_OPENAT2, self._fd, name, how, len(how))
        return fd if isinstance(fd, int) and fd >= 0 else None


def decode(content: bytes | str | None) -> Any:
    """
    JSON of any origin, or None.
    """
    if content is None:
        return None
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


def dig(value: Any, *keys: str) -> Any:
    """
    `value[key][key]...`, or None where a level is missing or is no object.
    """
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def text(value: Any, *keys: str) -> str | None:
    """
    The text there, unless it is empty or longer than a name has any business to be.
    """
    found = dig(value, *keys)
    return found if isinstance(found, str) and 0 < len(found) <= 1024 else None
