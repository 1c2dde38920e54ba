"""
Lines to a file that is rotated, by size and by time.

Whole lines only: what a full disk or a kill cut off is taken back, at the failure or at the next start. One writer
only: the file is locked (flock), because taking back a part of a line would hit the lines of another one.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Literal

from procwatch import options
from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.sinks import whole
from procwatch.sinks.base import Common, QueueSink, Record

MIN_ROTATE = 4096
_SUFFIX = {"gzip": ".gz", "zstd": ".zst", "none": ""}
_TAIL = 1 << 16


class FileSink(QueueSink):
    """
    Appends lines to a file.

    A rotated file has the time of its rotation in its name (`events.jsonl.20261123T101500.123456`, UTC), is
    compressed beside the writing, and the oldest ones are removed. The file is opened anew when it was moved away.

    Args:
        common: See Common.
        path: The file; its directory must exist.
        rotate_bytes: Begin another file before this one grows beyond it: bytes, or as "100MiB"; 0: never.
        rotate_s: And at each multiple of so many seconds since 1970, UTC, as 3600 or 86400; 0: never.
        count: So many rotated files are kept.
        compress: How rotated files are: "gzip", "zstd" or "none".
        mode: Permissions of new files.

    Raises:
        ConfigError: A value that cannot be.
    """

    name = "file"

    def __init__(
        self,
        common: Common,
        *,
        path: str,
        rotate_bytes: int | str = "100MiB",
        rotate_s: float = 0,
        count: int = 10,
        compress: Literal["gzip", "zstd", "none"] = "gzip",
        mode: int = 0o640,
    ) -> None:
        super().__init__(common)
        self._path = os.path.abspath(path)
        self._rotate_bytes = options.size(rotate_bytes)
        if 0 < self._rotate_bytes < MIN_ROTATE:
            raise ConfigError(f"rotate_bytes={rotate_bytes} cannot be: 0 or at least {MIN_ROTATE}")
        if rotate_s < 0:
            raise ConfigError(f"rotate_s={rotate_s} cannot be: 0 or more")
        if count < 0:
            raise ConfigError(f"count={count} cannot be: 0 or more")
        if not 0 < mode <= 0o777:
            raise ConfigError(f"mode=0o{mode:o} cannot be: permissions as 0o640")
        self._rotate_s = rotate_s
        self._count = count
        self._mode = mode
        self._copy = _compressor(compress)
        self._suffix = _SUFFIX[compress]
        self._rotated = re.compile(re.escape(os.path.basename(self._path)) + r"\.\d{8}T\d{6}\.\d{6}")
        self._fd = -1
        self._size = 0
        self._period = 0
        self._reopen = False
        self._tidying: threading.Thread | None = None

    def reopen(self) -> None:
        """
        Open the file anew.
        """
        self._reopen = True
        self._wake()

    def _open(self) -> None:
        try:
            self._open_file()
        except BlockingIOError as error:
            raise SinkUnavailable(
                self.name, f"another procwatch writes to {self._path}", "give each its own"
            ) from error
        except OSError as error:
            reason = f"cannot write to {self._path}: {os.strerror(error.errno or 0)}"
            raise SinkUnavailable(self.name, reason, "its directory must be there and writable") from error

    def _open_file(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK  # does not wait for the reader of a FIFO
        try:
            fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, self._mode)
            os.fchmod(fd, self._mode)  # whatever the umask is
        except FileExistsError:
            fd = os.open(self._path, flags)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"path={self._path!r} cannot be: it is not a regular file")  # noqa: TRY301
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = _cut(fd, found.st_size)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._period = self._period_of(found.st_mtime if self._size else time.time())

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _turn(self) -> None:
        if self._reopen:
            self._reopen = False
            self._close_file()  # the next write opens it
            self._try_open()
        super()._turn()

    def _try_open(self) -> None:
        try:
            self._open_file()
        except (OSError, ConfigError) as error:
            self._fail(error)

    def _write(self, records: list[Record]) -> int:
        if self._fd < 0 or self._moved():
            self._close_file()
            self._open_file()
        self._size = os.fstat(self._fd).st_size  # somebody may have cut it (logrotate's copytruncate)
        at = 0
        try:
            while at < len(records):
                end, size = self._fitting(records, at)
                if self._due(size):
                    self._rotate()
                    end, size = self._fitting(records, at)
                done = self._append(records[at:end])
                at += done
                if at < end:
                    break
        except OSError as error:
            self._fail(error)
        return at

    def _moved(self) -> bool:
        try:
            there, ours = os.stat(self._path), os.fstat(self._fd)
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _fitting(self, records: list[Record], at: int) -> tuple[int, int]:
        """
        How far the records fit into this file, at least one, and their size.
        """
        if not self._rotate_bytes:
            return len(records), 0
        size = len(records[at].data)
        end = at + 1
        while end < len(records) and self._size + size + len(records[end].data) <= self._rotate_bytes:
            size += len(records[end].data)
            end += 1
        return end, size

    def _append(self, records: list[Record]) -> int:
        """
        Write lines; returns how many, all of them whole.
        """
        pieces = [record.data for record in records]
        done, error = whole.append(self._fd, self._size, pieces)
        if error is not None:
            self._fail(error)
        self._size += sum(map(len, pieces[:done]))
        return done

    # Rotation

    def _period_of(self, seconds: float) -> int:
        return int(seconds // self._rotate_s) if self._rotate_s else 0

    def _due(self, size: int) -> bool:
        if not self._size:
            self._period = self._period_of(time.time())
            return False
        if self._rotate_bytes and self._size + size > self._rotate_bytes:
            return True
        return self._period != self._period_of(time.time())

    def _rotate(self) -> None:
        now_ns = time.time_ns()
        while any(os.path.exists(self._rotated_name(now_ns) + suffix) for suffix in _SUFFIX.values()):
            now_ns += 1000
        os.rename(self._path, self._rotated_name(now_ns))
        self._close_file()
        self._open_file()
        if self._tidying is not None:
            self._tidying.join()
        self._tidying = threading.Thread(target=self._tidy, name="procwatch-tidy", daemon=True)
        self._tidying.start()

    def _rotated_name(self, now_ns: int) -> str:
        seconds, ns = divmod(now_ns, 1_000_000_000)
        return f"{self._path}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}.{ns // 1000:06d}"

    def _tidy(self) -> None:
        """
        Compress what is rotated and remove the oldest, also what an earlier agent left.
        """
        folder = os.path.dirname(self._path)
        try:
            names = os.listdir(folder)
            for name in names:
                if name.endswith(".part") and self._rotated.match(name):
                    os.unlink(os.path.join(folder, name))
            rotated = sorted(filter(self._is_rotated, names))
            gone = len(rotated) - self._count
            for at, name in enumerate(rotated):
                path = os.path.join(folder, name)
                if at < gone:
                    os.unlink(path)
                elif self._suffix and self._rotated.fullmatch(name):
                    self._compress(path)
        except OSError as error:
            self._fail(error)

    def _is_rotated(self, name: str) -> bool:
        return any(self._rotated.fullmatch(name.removesuffix(suffix)) for suffix in _SUFFIX.values())

    def _compress(self, path: str) -> None:
        part = f"{path}{self._suffix}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, self._mode)
        with open(path, "rb") as source, os.fdopen(fd, "wb") as target:
            os.fchmod(fd, self._mode)
            self._copy(source, target)
        os.rename(part, path + self._suffix)
        os.unlink(path)

    def _end(self) -> None:
        self._close_file()
        if self._tidying is not None:
            self._tidying.join()


def _cut(fd: int, size: int) -> int:
    """
    Take back a line that has no end; returns the size of the whole lines.
    """
    end = size
    while end:
        start = max(end - _TAIL, 0)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)
    return end


def _compressor(kind: str) -> Callable[[IO[bytes], IO[bytes]], Any]:
    if kind == "gzip":
        return _gzip
    if kind == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError("compress='zstd' needs the package zstandard: install procwatch[zstd]") from error
        copy: Callable[[IO[bytes], IO[bytes]], Any] = zstandard.ZstdCompressor().copy_stream
        return copy
    if kind == "none":
        return shutil.copyfileobj
    raise ConfigError(f"compress={kind!r} cannot be: gzip, zstd or none")


def _gzip(source: IO[bytes], target: IO[bytes]) -> None:
    with gzip.open(target, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(source, packed)
