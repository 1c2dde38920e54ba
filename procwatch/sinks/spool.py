"""
What waits for a network: in memory, or on disk, where it outlives the agent.

The spool is a directory of segments, each a file of frames that is only appended to, named by the number of its first
record; numbers count on for ever. `cursor` has the number of the first record that the other end has not confirmed. A
segment goes when all of it is confirmed.

    0000000000001388.seg  0000000000002710.seg  cursor  lock

When the segments are larger than allowed, the oldest one that nobody has begun to read is replaced by a file that holds
one record, the `lost` event: `FIRST-END.lost`. So the loss is told in its place, and outlives the agent, too.

A kill at any moment leaves whole frames, half a frame at the end (taken back at the next start), or a segment together
with the `.lost` file that replaces it (the segment is removed then). Records that were sent and not yet confirmed are
sent again: the other end must know them by their ids.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import Protocol

from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.sinks import whole
from procwatch.sinks.base import Gap, Record

MIN_BYTES = 1 << 20
SEGMENTS = 16  # as much as may be lost at once: a 16th
MAX_SEGMENT = 16 << 20
MAX_RECORD = 64 << 20
CHUNK = 1 << 18
# Length of the data, CRC-32 of the rest of the frame, events that are lost with it, time in ns since 1970.
_FRAME = Struct("<IIIq")
_NAME = re.compile(r"([0-9a-f]{16})(?:-([0-9a-f]{16}))?\.(seg|lost)")


class Outbox(Protocol):
    """
    Records on their way out, oldest first. Used by one thread.
    """

    def room(self) -> bool:
        """
        Whether it takes more.
        """

    def append(self, records: list[Record]) -> tuple[int, OSError | None]:
        """
        Take records; returns how many, and why not all of them.
        """

    def read(self, limit: int) -> list[Record]:
        """
        The next records, at most `limit`, which were not read before.
        """

    def confirm(self, count: int) -> None:
        """
        The other end has the oldest `count` of the records that were read.
        """

    @property
    def pending(self) -> int:
        """
        Records that are not confirmed.
        """

    def sync_in_s(self) -> float | None:
        """
        When to call `sync`, seconds from now; None: no need.
        """

    def sync(self) -> None:
        """
        Make what was appended outlive a loss of power.
        """

    def close(self) -> None:
        """
        End.
        """


class Memory:
    """
    Keeps a few records in memory; the others wait in the sink's queue.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: deque[Record] = deque()
        self._read = 0

    def room(self) -> bool:
        """
        See Outbox.
        """
        return len(self._records) < self._most

    def append(self, records: list[Record]) -> tuple[int, OSError | None]:
        """
        See Outbox.
        """
        self._records.extend(records)
        return len(records), None

    def read(self, limit: int) -> list[Record]:
        """
        See Outbox.
        """
        end = min(self._read + limit, len(self._records))
        found = [self._records[at] for at in range(self._read, end)]
        self._read = end
        return found

    def confirm(self, count: int) -> None:
        """
        See Outbox.
        """
        for _ in range(count):
            self._records.popleft()
        self._read -= count

    @property
    def pending(self) -> int:
        """
        See Outbox.
        """
        return len(self._records)

    def sync_in_s(self) -> float | None:
        """
        Never.
        """
        return None

    def sync(self) -> None:
        """
        Nothing to do.
        """

    def close(self) -> None:
        """
        What is pending is lost.
        """
        self._records.clear()
        self._read = 0


class _Segment:
    """
    A file of frames, with the records from `first` up to `end`.
    """

    __slots__ = ("end", "first", "gap", "path", "size")

    def __init__(self, path: str, first: int, end: int, size: int, *, gap: Gap | None = None) -> None:
        self.path = path
        self.first = first
        self.end = end
        self.size = size
        self.gap = gap  # of a `.lost` file: what it tells


class Spool:
    """
    Keeps records on disk until they are confirmed.

    Args:
        path: Its directory; made when it is not there.
        max_bytes: Most that the segments may have together.
        fsync_s: Outlive a loss of power up to so many seconds before it; 0: each append is synced; inf: never.
        tell: Makes the record of the `lost` event.

    Raises:
        ConfigError: A value that cannot be.
        SinkUnavailable: The directory cannot be used.
    """

    def __init__(self, path: str, *, max_bytes: int, fsync_s: float, tell: Callable[[Gap], Record]) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigError(f"spool_bytes={max_bytes} cannot be: at least {MIN_BYTES}")
        if not fsync_s >= 0:
            raise ConfigError(f"fsync_s={fsync_s} cannot be: 0 or more")
        self._folder = path
        self._max_bytes = max_bytes
        self._segment_bytes = min(max_bytes // SEGMENTS, MAX_SEGMENT)
        self._fsync_s = fsync_s
        self._tell = tell
        self._segments: list[_Segment] = []
        self._reading: _Segment | None = None
        self._tail_fd = self._read_fd = self._cursor_fd = self._lock_fd = -1
        self._buffer = b""
        self._at = 0  # in the buffer
        self._offset = 0  # of the buffer's end in the file
        self._unconfirmed: deque[int] = deque()  # numbers of what was read, each with that of the next record
        self._dirty_s: float | None = None
        self.dropped = 0  # events, because there was no room
        try:
            self._open()
        except OSError as error:
            self.close()
            reason = f"cannot use {path}: {os.strerror(error.errno or 0)}"
            raise SinkUnavailable("spool", reason, "give it a directory of its own") from error
        except BaseException:
            self.close()
            raise

    # Opening

    def _open(self) -> None:
        os.makedirs(self._folder, 0o750, exist_ok=True)
        self._lock_fd = os.open(self._place("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SinkUnavailable("spool", f"another procwatch uses {self._folder}", "give each its own") from error
        self._cursor_fd = os.open(self._place("cursor"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._load()
        confirmed = self._cursor()
        first = self._segments[0].first if self._segments else confirmed
        end = self._segments[-1].end if self._segments else confirmed
        self._confirmed = max(confirmed, first)
        self._next = max(confirmed, end)  # number of the next record to be appended
        self._new_tail()
        self._seek(self._confirmed)
        self._remove_confirmed()

    def _place(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _cursor(self) -> int:
        try:
            return int(os.pread(self._cursor_fd, 16, 0), 16)
        except ValueError:
            return 0

    def _load(self) -> None:
        """
        Find the segments. Where each ends is where the next one begins; the last one is read.
        """
        found: list[_Segment] = []
        for name in sorted(os.listdir(self._folder)):
            path = self._place(name)
            if name.endswith(".part"):
                os.unlink(path)
            elif match := _NAME.fullmatch(name):
                first, end = int(match[1], 16), int(match[2] or "0", 16)
                gap = self._gap_of(path) if match[3] == "lost" else None
                found.append(_Segment(path, first, end, os.path.getsize(path), gap=gap))
        replaced_until = 0
        for segment in sorted(found, key=lambda one: (one.first, one.gap is None, -one.end)):
            if segment.first < replaced_until:
                os.unlink(segment.path)
                continue
            if segment.gap is not None:
                replaced_until = segment.end
            self._segments.append(segment)
        for segment, following in zip(self._segments, self._segments[1:], strict=False):
            segment.end = following.first
        if self._segments and self._segments[-1].gap is None:
            self._recover(self._segments[-1])

    def _recover(self, segment: _Segment) -> None:
        """
        Count the frames of the last segment and take back half a frame at its end.
        """
        with open(segment.path, "r+b") as file:
            data = file.read()
            at = count = 0
            while (frame := _frame(data, at)) is not None:
                at += frame[1]
                count += 1
            if at != len(data):
                file.truncate(at)
        segment.size = at
        segment.end = segment.first + count

    def _gap_of(self, path: str) -> Gap:
        with open(path, "rb") as file:
            frame = _frame(file.read(), 0)
        gap = Gap()
        if frame is not None:
            gap.add(frame[0].count, frame[0].time_ns)
        return gap

    # Appending

    def room(self) -> bool:
        """
        Always: the oldest go.
        """
        return True

    def append(self, records: list[Record]) -> tuple[int, OSError | None]:
        """
        See Outbox.
        """
        frames = [_framed(record) for record in records]
        size = sum(map(len, frames))
        try:
            self._make_room(size)
            tail = self._segments[-1]
            if tail.size and tail.size + size > self._segment_bytes:
                self._new_tail()
        except OSError as failure:
            return 0, failure
        tail = self._segments[-1]
        done, error = whole.append(self._tail_fd, tail.size, frames)
        tail.size += sum(map(len, frames[:done]))
        tail.end += done
        self._next = tail.end
        if done and self._dirty_s is None:
            self._dirty_s = time.monotonic()
        if self._fsync_s == 0:
            self.sync()
        return done, error

    def _new_tail(self) -> None:
        path = self._place(f"{self._next:016x}.seg")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        if self._tail_fd >= 0:
            self.sync()
            os.close(self._tail_fd)
        self._tail_fd = fd
        if self._segments and self._segments[-1].path == path:  # empty, from before
            self._segments.pop()
        self._segments.append(_Segment(path, self._next, self._next, os.fstat(fd).st_size))

    def _make_room(self, size: int) -> None:
        while sum(segment.size for segment in self._segments) + size > self._max_bytes:
            # Neither what is being read, nor what is appended to.
            unread = [one for one in self._segments[:-1] if one is not self._reading and one.first >= self._next_read]
            full = [at for at, segment in enumerate(unread) if segment.gap is None]
            if not full:
                return
            at = full[0]
            before = unread[at - 1] if at else None
            self._replace(unread[at], before)

    def _replace(self, segment: _Segment, before: _Segment | None) -> None:
        """
        Put a `lost` event in the place of a segment, and of the `.lost` file before it.
        """
        gap = Gap()
        first = segment.first
        if before is not None and before.gap is not None:
            gap.add(before.gap.count, before.gap.since_ns)
            gap.until_ns = before.gap.until_ns
            first = before.first
        with open(segment.path, "rb") as file:
            data = file.read()
        at = 0
        while (frame := _frame(data, at)) is not None:
            gap.add(frame[0].count, frame[0].time_ns)
            self.dropped += frame[0].count
            at += frame[1]
        path = self._place(f"{first:016x}-{segment.end:016x}.lost")
        frame_of_gap = _framed(self._tell(gap))
        _write_file(path, frame_of_gap)
        at = self._segments.index(segment)
        self._segments[at] = _Segment(path, first, segment.end, len(frame_of_gap), gap=gap)
        os.unlink(segment.path)
        if first != segment.first and before is not None:
            self._segments.remove(before)
            os.unlink(before.path)

    # Reading

    def _seek(self, number: int) -> None:
        """
        Go on with this record.
        """
        self._next_read = number
        self._begin(next(one for one in self._segments if one.end > number or one is self._segments[-1]))
        if self._reading is not None and self._reading.gap is None:
            self._next_read = self._reading.first
            while self._next_read < number and self._frame_here() is not None:
                self._next_read += 1
            self._next_read = number

    def _begin(self, segment: _Segment) -> None:
        if self._read_fd >= 0:
            os.close(self._read_fd)
        self._read_fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        self._reading = segment
        self._buffer, self._at, self._offset = b"", 0, 0
        self._next_read = max(self._next_read, segment.first)

    def read(self, limit: int) -> list[Record]:
        """
        See Outbox.
        """
        found: list[Record] = []
        while len(found) < limit:
            segment = self._reading
            assert segment is not None
            if self._next_read >= segment.end:
                if segment is self._segments[-1]:
                    break
                self._begin(self._segments[self._segments.index(segment) + 1])
                continue
            record = self._frame_here()
            if record is None:  # the disk has changed what was written
                gap = Gap()
                gap.add(segment.end - self._next_read, time.time_ns())
                record = self._tell(gap)
                self.dropped += gap.count
                self._next_read = segment.end
            elif segment.gap is not None:
                self._next_read = segment.end
            else:
                self._next_read += 1
            self._unconfirmed.append(self._next_read)
            found.append(record)
        return found

    def _frame_here(self) -> Record | None:
        while (frame := _frame(self._buffer, self._at)) is None:
            rest = self._buffer[self._at :]
            want = _FRAME.size + (_FRAME.unpack_from(rest)[0] if len(rest) >= _FRAME.size else 0)
            if not len(rest) < want <= MAX_RECORD:
                return None
            more = os.pread(self._read_fd, max(CHUNK, want - len(rest)), self._offset)
            if not more:
                return None
            self._buffer, self._at = rest + more, 0
            self._offset += len(more)
        self._at += frame[1]
        return frame[0]

    def confirm(self, count: int) -> None:
        """
        See Outbox.
        """
        for _ in range(count):
            self._confirmed = self._unconfirmed.popleft()
        os.pwrite(self._cursor_fd, b"%016x\n" % self._confirmed, 0)
        self._remove_confirmed()

    def _remove_confirmed(self) -> None:
        while len(self._segments) > 1 and self._segments[0].end <= self._confirmed:
            if self._segments[0] is self._reading:
                self._begin(self._segments[1])
            os.unlink(self._segments.pop(0).path)

    @property
    def pending(self) -> int:
        """
        See Outbox; a `lost` event is one record.
        """
        skipped = sum(
            one.end - max(one.first, self._confirmed) - 1
            for one in self._segments
            if one.gap is not None and one.end > self._confirmed
        )
        return self._next - self._confirmed - skipped

    # Syncing

    def sync_in_s(self) -> float | None:
        """
        See Outbox.
        """
        if self._dirty_s is None or self._fsync_s == float("inf"):
            return None
        return max(self._dirty_s + self._fsync_s - time.monotonic(), 0)

    def sync(self) -> None:
        """
        See Outbox.
        """
        if self._dirty_s is not None and self._fsync_s != float("inf"):
            os.fdatasync(self._tail_fd)
        self._dirty_s = None

    def close(self) -> None:
        """
        End; what is pending is kept.
        """
        if self._tail_fd >= 0:
            self.sync()
        for fd in (self._tail_fd, self._read_fd, self._cursor_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._tail_fd = self._read_fd = self._cursor_fd = self._lock_fd = -1


def _framed(record: Record) -> bytes:
    body = _FRAME.pack(0, 0, record.count, record.time_ns)[8:] + record.data
    return _FRAME.pack(len(record.data), zlib.crc32(body), record.count, record.time_ns) + record.data


def _frame(data: bytes, at: int) -> tuple[Record, int] | None:
    """
    The record at this place and the length of its frame; None: there is no whole one.
    """
    start = at + _FRAME.size
    if start > len(data):
        return None
    length, crc, count, time_ns = _FRAME.unpack_from(data, at)
    if start + length > len(data) or zlib.crc32(memoryview(data)[at + 8 : start + length]) != crc:
        return None
    return Record(data[start : start + length], count, time_ns), _FRAME.size + length


def _write_file(path: str, data: bytes) -> None:
    """
    Make a file with this contents, or none.
    """
    part = path + ".part"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, path)
