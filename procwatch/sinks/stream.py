"""
Write to a descriptor that somebody else may be slow to read: standard output, or a file.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable

from procwatch.events import Event, Lost, Stop
from procwatch.express import Written
from procwatch.table.draft import Draft, Maker

MAX_PENDING = 64 << 20
# Between two looks whether a file was moved away, and two attempts at one that cannot be written.
AGAIN_S = 1.0
# poll(2) says that a pipe is writable when one page of it is free; that much never blocks. For where RWF_NOWAIT of
# pwritev2(2) is not known.
PIPE_CHUNK = 4096
PIPE_BYTES = 1 << 20  # fs.pipe-max-size, beyond which root's privilege is needed


def open_file(path: str) -> int:
    """
    A descriptor that appends to a file; a new one has mode 0640.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


def widen(fd: int) -> None:
    """
    Let a pipe hold what a turn writes in a storm: with the 64 KiB that it has by itself, writer and reader wake each
    other four times for that. Pages that are not used are not taken.
    """
    try:
        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:  # no pipe; or more than this user may have, fs.pipe-user-pages-soft
        pass


class StreamSink:
    """
    Gathers lines and writes them in batches, without ever blocking the loop on a full pipe.

    What cannot be written waits, at most MAX_PENDING bytes; beyond that whole events are dropped and counted, and a
    `lost` event with `where="sink"` stands in their place. We must not set O_NONBLOCK on the descriptor: it would hold
    for everyone who shares it, the user's shell too.

    A file that cannot be written, because the disk is full, is tried again each second meanwhile. It never ends in the
    middle of a line.

    Args:
        fd: Where to write; not closed here.
        encode_into: Appends an event, or the draft of one, to a buffer, as text.
        maker: Makes events of the drafts that must be dropped.
        latency_s: How long lines may gather under load.
        on_closed: Called once when the reader is gone (EPIPE).
        on_error: Called with any other failure to write; of a file with the first one of a row, and writing goes on.
        path: The name of `fd`; if it is a regular file another one takes its place when that was moved away or removed.
    """

    def __init__(
        self,
        fd: int,
        encode_into: Callable[[Event | Draft, bytearray], None],
        maker: Maker,
        *,
        latency_s: float,
        on_closed: Callable[[], None],
        on_error: Callable[[OSError], None],
        path: str | None = None,
    ) -> None:
        self._fd = fd
        self._encode_into = encode_into
        self._maker = maker
        self._loop = asyncio.get_running_loop()
        self._latency_s = latency_s
        self._on_closed = on_closed
        self._on_error = on_error
        self._buffer = bytearray()
        self.file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._nowait = not self.file
        widen(fd)
        self._path = path if self.file else None
        self._nameless = False
        self._looked = self._loop.time()
        self.failure: OSError | None = None  # of the last attempt to write to the file
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = False
        self._broken = False
        self._dropped: Lost | None = None
        self.lost = 0

    def __call__(self, batch: list[Event | Draft]) -> None:
        """
        Take a batch; it is on its way at once when the line was quiet, else within the latency.
        """
        if self._broken:
            return
        buffer = self._buffer
        wait = self._last + self._latency_s - self._loop.time()
        due = wait <= self._latency_s / 4  # who waited for the batch has waited long enough
        for event in batch:
            if len(buffer) > MAX_PENDING and type(event) is not Stop:
                self._drop(event)
                continue
            if self._dropped is not None:
                self._tell_dropped()
            if type(event) is not Written:
                self._encode_into(event, buffer)
            elif self.file and due and not buffer:  # without a copy: that is a tenth of the cost
                buffer += event.data[self._send(event.data) :]
            else:
                buffer += event.data
        if self._waiting or self._timer is not None:
            return
        if due or len(buffer) >= 1 << 16:
            self.flush()
        else:
            self._timer = self._loop.call_later(wait, self.flush)

    def flush(self) -> None:
        """
        Write what can be written now.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last = self._loop.time()
        if self._path is not None and self._last - self._looked >= AGAIN_S:
            self._looked = self._last
            if self._moved(self._path):
                self.reopen()
        if self._buffer:
            self._write()
        if self.file:
            if self.failure is not None:
                self._timer = self._loop.call_later(AGAIN_S, self.flush)
            return
        waiting = bool(self._buffer) and not self._broken
        if waiting != self._waiting:
            self._waiting = waiting
            if waiting:
                self._loop.add_writer(self._fd, self.flush)
            else:
                self._loop.remove_writer(self._fd)

    def finish(self) -> None:
        """
        Write all that is left, waiting for the reader; for the end.
        """
        if self._waiting:
            self._loop.remove_writer(self._fd)
            self._waiting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell_dropped()
        while self._buffer and not self._broken:
            self._write()
            if self.file:
                break
            if self._buffer and not self._broken:
                self._writable(None)

    def reopen(self) -> None:
        """
        Open the file anew, by its name; if that cannot be done the old one is written on.
        """
        assert self._path is not None
        try:
            new = open_file(self._path)
        except OSError as error:
            if not self._nameless:
                self._on_error(error)
            self._nameless = True
            return
        os.dup2(new, self._fd, inheritable=False)
        os.close(new)
        self._nameless = False

    def _moved(self, path: str) -> bool:
        ours = os.fstat(self._fd)
        try:
            there = os.stat(path)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _write(self) -> None:
        with memoryview(self._buffer) as view:
            done = self._send(view)
        del self._buffer[:done]

    def _send(self, view: bytes | memoryview) -> int:
        """
        Write as much as does not block; how many bytes that was.
        """
        done = 0
        try:
            while done < len(view):
                if self.file:
                    done += os.write(self._fd, view[done:])
                elif self._nowait:
                    done += self._write_now(view[done:])
                elif self._writable():
                    done += os.write(self._fd, view[done : done + PIPE_CHUNK])
                else:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            if self.file:
                if self.failure is None:
                    self._on_error(error)
                self.failure = error
                return self._whole(view[:done])
            self._broken = True
            if error.errno == errno.EPIPE:
                self._on_closed()
            else:
                self._on_error(error)
        else:
            self.failure = None
        return done

    def _write_now(self, view: bytes | memoryview) -> int:
        """
        As much as there is room for, by one call: 64 KiB for a pipe, where a call that may wait is safe with 4 KiB.
        """
        try:
            return os.pwritev(self._fd, [view], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE, errno.ENOSYS):
                raise
            self._nowait = False  # a terminal; a pipe before Linux 6.4
            return 0

    def _whole(self, written: bytes | memoryview) -> int:
        """
        Take back the part of a line at the end of what was written; how many bytes are left.
        """
        whole = bytes(written).rfind(b"\n") + 1
        if whole != len(written):
            os.ftruncate(self._fd, os.lseek(self._fd, whole - len(written), os.SEEK_CUR))
        return whole

    def _writable(self, timeout_ms: int | None = 0) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(timeout_ms))

    def _tell_dropped(self) -> None:
        if self._dropped is not None:
            self._encode_into(self._dropped, self._buffer)
            self._dropped = None

    def _drop(self, item: Event | Draft) -> None:
        if isinstance(item, Written):
            count, since, until = item.count, *map(self._maker.clock.stamp, (item.since_ns, item.until_ns))
        else:
            count, since, until = 1, *[self._maker.event(item).time] * 2
        self.lost += count
        first = self._dropped
        self._dropped = Lost(
            time=until,
            host=self._maker.host,
            count=count + (first.count if first is not None else 0),
            exact=True,
            where="sink",
            since=first.since if first is not None else since,
            until=until,
        )
