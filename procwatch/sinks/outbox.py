"""
What the sinks that send over a network have in common: a spool, if one is wanted, and to send again until it is there.
"""

from __future__ import annotations

import random
import time
from abc import abstractmethod

from msgspec import structs

from procwatch import options
from procwatch.sinks.base import BATCH, Common, Gap, QueueSink, Record, SinkStats
from procwatch.sinks.spool import Memory, Outbox, Spool

WINDOW = 4096  # records that wait beside the queue, without a spool
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 30.0


class Spooled(Common, frozen=True, kw_only=True):
    """
    What sinks with an outbox are made with.
    """

    spool: str | None = None  # a directory of this sink's own; None: memory
    spool_bytes: int | str = "1GiB"  # most that it may hold
    fsync_s: float = 1.0  # most that a loss of power takes; 0: each batch is synced; inf: as the kernel writes


class OutboxSink(QueueSink):
    """
    A sink that keeps records until the other end has them.

    Without a spool they wait in memory, and are lost with the agent. With one they wait on disk, whoever is killed;
    when it is full the oldest are dropped, a 16th of its size at a time, and a `lost` event stands in their place.
    """

    common = Spooled

    def __init__(self, common: Spooled) -> None:
        super().__init__(common)
        self._spool_path = common.spool
        self._spool_bytes = options.size(common.spool_bytes)
        self._fsync_s = common.fsync_s
        self._outbox: Outbox = Memory(WINDOW)
        self._spool: Spool | None = None
        self._confirmed = 0
        self._rejected = 0  # of these, records that the other end does not want
        self._unsent: list[Record] = []  # read and not confirmed
        self._retry_s = FIRST_RETRY_S
        self._retry_at = 0.0

    def stats(self) -> SinkStats:
        """
        Counters so far; what is in the spool is pending.
        """
        stats = super().stats()
        dropped = stats.dropped + (self._spool.dropped if self._spool is not None else 0)
        pending = stats.pending + self._outbox.pending
        return structs.replace(
            stats,
            written=self._confirmed - self._rejected,
            dropped=dropped,
            pending=pending,
            peak=max(stats.peak, pending),
        )

    def _open(self) -> None:
        if self._spool_path is not None:
            self._outbox = self._spool = Spool(
                self._spool_path, max_bytes=self._spool_bytes, fsync_s=self._fsync_s, tell=self._gap_record
            )

    def _gap_record(self, gap: Gap) -> Record:
        return self._record(gap.event(self._maker.host))

    # In the thread

    def _fill(self) -> None:
        """
        From the queue to the outbox.
        """
        while self._outbox.room() and (records := self._take()):
            self._deliver(records)
        if self._outbox.sync_in_s() == 0:
            self._outbox.sync()

    def _write(self, records: list[Record]) -> int:
        done, error = self._outbox.append(records)
        if error is not None:
            self._fail(error)
        return done

    def _confirm(self, count: int) -> None:
        self._outbox.confirm(count)
        self._confirmed += count
        self._retry_s = FIRST_RETRY_S

    def _reject(self, records: list[Record]) -> None:
        """
        Drop what the other end will never take: it is told as lost, and must be confirmed all the same.
        """
        self._drop(records)
        self._rejected += len(records)

    def _back_off(self) -> None:
        """
        Try again later, each time later, and not all hosts at once.
        """
        self._retry_at = time.monotonic() + self._retry_s * random.uniform(0.5, 1.0)  # noqa: S311
        self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)

    def _end(self) -> None:
        if self._spool is None:  # what is in memory ends with us
            self._failed += self._outbox.pending
        self._outbox.close()


class SenderSink(OutboxSink):
    """
    An outbox for a protocol whose answer is waited for, one batch after the other.
    """

    def _turn(self) -> None:
        self._fill()
        if time.monotonic() < self._retry_at and not self._closing:
            return
        try:
            while not self._abandoned and (records := self._unsent or self._outbox.read(BATCH)):
                self._unsent = records
                done = self._send(records)
                self._confirm(done)
                self._unsent = records[done:]
                self._fill()
        except OSError as error:
            self._fail(error)
            self._back_off()

    @abstractmethod
    def _send(self, records: list[Record]) -> int:
        """
        Send records and wait until the other end has them.

        Returns:
            How many it has, from the first one on; at least one.

        Raises:
            OSError: None: they are sent again later.
        """

    def _sleep(self) -> None:
        waits = [self._outbox.sync_in_s()]
        if self._outbox.pending:
            waits.append(max(self._retry_at - time.monotonic(), 0.001))
        self._ready.wait(min((wait for wait in waits if wait is not None), default=None))
        self._ready.clear()
