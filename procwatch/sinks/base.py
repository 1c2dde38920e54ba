"""
What a sink is, and what all of them have in common: choosing, a bound, the mark where something was dropped, a thread.

    put() on the loop: filter ─> encode ─> queue ──> thread: write
                                             └ full: dropped, counted, `lost` in the place

An event is encoded at once, so the queue holds bytes and its bound is one of memory; all that may wait (disks,
networks, slow readers) happens in the sink's own thread, so no sink holds up another one, nor a source.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, Protocol, Self

from msgspec import Struct

from procwatch.clock import Clock
from procwatch.errors import ConfigError
from procwatch.events import Event, Lost, ProcessEvent
from procwatch.latency import Latency
from procwatch.policy.filter import Predicate
from procwatch.table.draft import Draft, Maker

Encode = Callable[[Event | Draft, bytearray], None]

# These are never filtered out: they say what the others are worth.
ALWAYS = frozenset({"ready", "lost", "stop"})
QUEUE = 65_536
# A line is 1 kB, but an event may have 128 KiB of arguments: the queue has a bound in bytes, too.
MAX_QUEUED_BYTES = 64 << 20
# Records that a thread takes at once.
BATCH = 1024
CLOSE_S = 5.0


class SinkStats(Struct, frozen=True):
    """
    Counters of one sink, since it was opened; in events.
    """

    written: int  # the other end has them
    dropped: int  # lost here; `lost` events in this sink's output say where
    pending: int  # waiting now, in memory and in the spool
    peak: int  # most that ever waited
    failures: int  # times that writing or connecting failed
    error: str = ""  # the last of these failures, one line


class Sink(Protocol):
    """
    Where events go. The agent calls all of these on its loop.
    """

    name: str

    async def open(self) -> None:
        """
        Begin.

        Raises:
            ConfigError: An option that cannot be.
            SinkUnavailable: It cannot work here.
        """

    def put(self, batch: list[Event | Draft]) -> None:
        """
        Take a batch; never waits.
        """

    async def close(self) -> None:
        """
        Write what is pending, in a bounded time, and end.
        """

    def reopen(self) -> None:
        """
        Open files and connections anew (SIGHUP).
        """

    def stats(self) -> SinkStats:
        """
        Counters so far.
        """


class Record(Struct, frozen=True, gc=False):
    """
    One event as bytes, on its way.
    """

    data: bytes
    count: int  # events that are lost with it: 1, for a `lost` event as many as it tells
    time_ns: int  # since 1970


class Gap:
    """
    Events that were dropped and not told yet.
    """

    __slots__ = ("count", "since_ns", "until_ns")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """
        It was told.
        """
        self.count = self.since_ns = self.until_ns = 0

    def add(self, count: int, time_ns: int) -> None:
        """
        One more event, or a `lost` event that told of `count`.
        """
        self.since_ns = self.since_ns or time_ns
        self.until_ns = max(self.until_ns, time_ns)
        self.count += count

    def event(self, host: str) -> Lost:
        """
        What tells it.
        """
        stamp = Clock(offset_ns=0).stamp  # not the sink's: it keeps the last second, and threads would share that
        until = stamp(self.until_ns)
        return Lost(
            time=until,
            host=host,
            count=self.count,
            exact=True,
            where="sink",
            since=stamp(self.since_ns),
            until=until,
        )


class Common(Struct, frozen=True, kw_only=True):
    """
    What all sinks are made with.
    """

    maker: Maker  # makes events of drafts
    encode: Encode  # appends one event to a buffer, with its newline
    events: frozenset[str] | None = None  # kinds to write; None: all. ready, lost and stop always come
    keep: Predicate | None = None  # only the events of processes for which this is true
    queue: int = QUEUE  # events that may wait in memory


class QueueSink(ABC):
    """
    A sink with a bounded queue and a thread that writes.

    When the queue is full the newest events are dropped, and a `lost` event with `where="sink"` stands in their place.
    `stop` comes always.

    Raises:
        ConfigError: A value that cannot be.
    """

    name = ""
    default_format: ClassVar[str] = "json"  # of procwatch.formats.FORMATS, where the configuration names none
    common: ClassVar[type[Common]] = Common  # what it is made with, besides the options of its own

    def __init__(self, common: Common) -> None:
        if common.queue < 1:
            raise ConfigError(f"queue={common.queue} cannot be: 1 or more")
        self._maker = common.maker
        self._encode = common.encode
        self._events = common.events
        self._keep = common.keep
        self._bound = common.queue
        # The loop adds at the right and the thread takes at the left. Each counter is changed by one of the two only.
        self._records: deque[Record] = deque()
        self._added = self._added_bytes = self._refused = self._peak = 0
        self._done = self._done_bytes = self._failed = 0
        self._written = 0
        self._failures = 0
        self._error = ""
        self.latency = Latency()  # from the kernel's stamp until it was written
        self._refused_gap = Gap()
        self._failed_gap = Gap()
        self._ready = threading.Event()
        self._closing = False
        self._abandoned = False
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, **options: Any) -> Self:
        """
        One with these options, those of `common` and its own.
        """
        common = {name: options.pop(name) for name in cls.common.__struct_fields__ if name in options}
        return cls(cls.common(**common), **options)

    # On the loop

    async def open(self) -> None:
        """
        Begin: see Sink.
        """
        await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._run, name=f"procwatch-{self.name}", daemon=True)
        self._thread.start()

    def put(self, batch: list[Event | Draft]) -> None:
        """
        Take a batch; never waits.
        """
        for item in batch:
            if self._wanted(item):
                self._put(item)
        self._peak = max(self._peak, self._added - self._done)
        self._wake()

    async def close(self) -> None:
        """
        Write what is pending, for at most CLOSE_S, and end; what could not be written is counted as dropped.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._tell_refused()
        self._closing = True
        self._wake()
        await asyncio.to_thread(thread.join, CLOSE_S)
        if thread.is_alive():
            self._abandoned = True
            self._abandon()
            self._wake()
            await asyncio.to_thread(thread.join, 1.0)

    def reopen(self) -> None:  # noqa: B027
        """
        Nothing to open anew here.
        """

    def stats(self) -> SinkStats:
        """
        Counters so far.
        """
        return SinkStats(
            written=self._written,
            dropped=self._refused + self._failed,
            pending=self._added - self._done,
            peak=self._peak,
            failures=self._failures,
            error=self._error,
        )

    def _wanted(self, item: Event | Draft) -> bool:
        kind = item.event
        if kind in ALWAYS:
            return True
        if self._events is not None and kind not in self._events:
            return False
        if self._keep is None:
            return True
        event = self._maker.event(item)
        return not isinstance(event, ProcessEvent) or self._keep(event)

    def _put(self, item: Event | Draft) -> None:
        full = self._added - self._done >= self._bound or self._added_bytes - self._done_bytes >= MAX_QUEUED_BYTES
        if full and item.event != "stop":
            count = item.count if isinstance(item, Lost) else 1
            self._refused += count
            self._refused_gap.add(count, self._time_ns(item))
            return
        self._tell_refused()
        self._add(item)

    def _tell_refused(self) -> None:
        if self._refused_gap.count:
            self._add(self._refused_gap.event(self._maker.host))
            self._refused_gap.clear()

    def _add(self, item: Event | Draft) -> None:
        record = self._record(item)
        self._added += 1
        self._added_bytes += len(record.data)
        self._records.append(record)

    def _record(self, item: Event | Draft) -> Record:
        """
        An event as bytes. On the loop for all that comes from there; in the thread for `lost` events of its own.
        """
        buffer = bytearray()
        self._encode_item(item, buffer)
        return Record(bytes(buffer), item.count if isinstance(item, Lost) else 1, self._time_ns(item))

    def _time_ns(self, item: Event | Draft) -> int:
        return item.time_ns + self._maker.clock.offset_ns if isinstance(item, Draft) else item.time_ns

    def _encode_item(self, item: Event | Draft, buffer: bytearray) -> None:
        """
        What goes to the other end for one event.
        """
        self._encode(item, buffer)

    def _wake(self) -> None:
        """
        There is something to do for the thread.
        """
        self._ready.set()

    # In the thread

    def _run(self) -> None:
        try:
            self._work()
        finally:
            while records := self._take():
                self._drop(records)
                self._settle(records)
            self._end()

    def _work(self) -> None:
        """
        Until the sink is closed.
        """
        while not self._abandoned:
            closing = self._closing  # read first: all that was put before it was set is written
            self._turn()
            if closing:
                break
            self._sleep()
        if self._failed_gap.count:  # the last chance to tell
            self._deliver([])

    def _turn(self) -> None:
        """
        Write all that waits.
        """
        while not self._abandoned and (records := self._take()):
            self._deliver(records)

    def _take(self, limit: int = BATCH) -> list[Record]:
        """
        The oldest records, off the queue.
        """
        records = self._records
        return [records.popleft() for _ in range(min(limit, len(records)))]

    def _deliver(self, records: list[Record]) -> None:
        """
        Write records, those that were dropped before told first; drop those that cannot be written.
        """
        told = [self._record(self._failed_gap.event(self._maker.host))] if self._failed_gap.count else []
        try:
            written = self._write(told + records)
        except Exception as error:  # an agent stays alive whatever a sink's other end does
            self._fail(error)
            written = 0
        if told and written:
            self._failed_gap.clear()
        written = max(written - len(told), 0)
        self._written += written
        if written:
            now_ns = Clock.now_ns() + self._maker.clock.offset_ns
            self.latency.add(records[:written], now_ns, attrgetter("time_ns"))
        self._drop(records[written:])
        self._settle(records)

    def _drop(self, records: list[Record]) -> None:
        """
        Count records that are lost, to be told.
        """
        for record in records:
            self._failed += record.count
            self._failed_gap.add(record.count, record.time_ns)

    def _settle(self, records: list[Record]) -> None:
        """
        These wait no more.
        """
        self._done += len(records)
        self._done_bytes += sum(len(record.data) for record in records)

    def _fail(self, error: BaseException) -> None:
        """
        Count a failure and keep its reason.
        """
        self._failures += 1
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._error = (text or type(error).__name__).partition("\n")[0]

    # For each kind of sink

    def _open(self) -> None:  # noqa: B027
        """
        Begin, in a thread; may raise ConfigError and SinkUnavailable.
        """

    @abstractmethod
    def _write(self, records: list[Record]) -> int:
        """
        Write records, waiting as long as needed.

        Returns:
            How many of them were written, from the first one on. The others, and all when it raises, are dropped.
        """

    def _sleep(self) -> None:
        """
        Wait for `_wake`.
        """
        self._ready.wait()
        self._ready.clear()

    def _abandon(self) -> None:  # noqa: B027
        """
        Make a `_write` that waits return soon; called on the loop when closing has taken too long.
        """

    def _end(self) -> None:  # noqa: B027
        """
        Close everything, in the thread.
        """
