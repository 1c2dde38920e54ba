"""
The sinks of the agent: each batch goes to all of them, and they can be replaced while events go on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from procwatch.config import SinkTable
from procwatch.errors import ProcwatchError
from procwatch.events import Event, Lost, Ready
from procwatch.latency import Latency
from procwatch.sinks import QueueSink, SinkStats
from procwatch.table.draft import Draft, Maker

# Events that wait for a sink which is being replaced.
MAX_WAITING = 65_536


class Outlet:
    """
    One sink. While it is replaced, what comes waits; beyond MAX_WAITING the newest are dropped and counted.
    """

    def __init__(self, table: SinkTable, sink: QueueSink, maker: Maker, log: Any) -> None:
        self.table = table
        self.sink = sink
        self._maker = maker
        self._log = log
        self._waiting: list[Event | Draft] | None = None
        self._dropped = 0
        self._failed = False

    def put(self, batch: list[Event | Draft]) -> None:
        """
        Take a batch; never waits, never raises.
        """
        waiting = self._waiting
        if waiting is not None:
            room = max(MAX_WAITING - len(waiting), 0)
            waiting += batch[:room]
            self._dropped += len(batch[room:])
            return
        try:
            self.sink.put(batch)
        except Exception:  # a bug in one sink must not end the others
            if not self._failed:
                self._failed = True
                self._log.exception("a sink failed; please report it", sink=self.table.name)

    async def replace(self, table: SinkTable, first: list[Event | Draft]) -> None:
        """
        Close the sink and open another one in its place, or the same one again if the other cannot begin.

        Args:
            table: What the other one is.
            first: What it gets before all else.

        Raises:
            ProcwatchError: It cannot; the one before goes on.
        """
        self._waiting = list(first)
        try:
            await self.sink.close()
            try:
                self.sink = await opened(table, self._maker)
                self.table = table
            except ProcwatchError:
                self.sink = await opened(self.table, self._maker)
                raise
        finally:
            self._go_on()

    def _go_on(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting:
            self.put(waiting)
        if self._dropped:
            stamp = self._maker.clock.stamp(self._maker.clock.now_ns())
            count, self._dropped = self._dropped, 0
            self.put(
                [
                    Lost(
                        time=stamp,
                        host=self._maker.host,
                        count=count,
                        exact=True,
                        where="sink",
                        since=None,
                        until=stamp,
                    )
                ]
            )


class Outlets:
    """
    All sinks.

    Args:
        maker: Of the watcher.
        log: For what a user should know.
    """

    def __init__(self, maker: Maker, log: Any) -> None:
        self._maker = maker
        self._log = log
        self._outlets: list[Outlet] = []
        self._ready: list[Event | Draft] = []  # the first event of each sink, also of later ones
        self.lost: dict[str, int] = {}  # by place, before the sinks

    def __call__(self, batch: list[Event | Draft]) -> None:
        """
        Give a batch to each sink.
        """
        for outlet in self._outlets:
            outlet.put(batch)
        for item in batch:
            if type(item) is Lost:
                self.lost[item.where] = self.lost.get(item.where, 0) + item.count
            elif type(item) is Ready:
                self._ready = [item]

    async def open(self, tables: tuple[SinkTable, ...]) -> None:
        """
        Open all; none stays open if one cannot begin.

        Raises:
            ProcwatchError: It cannot.
        """
        try:
            for table in tables:
                await self._add(table)
        except BaseException:
            await self.close(1.0)
            raise

    async def _add(self, table: SinkTable) -> None:
        outlet = Outlet(table, await opened(table, self._maker), self._maker, self._log)
        outlet.put(self._ready)
        self._outlets.append(outlet)

    async def change(self, tables: tuple[SinkTable, ...], *, all_anew: bool) -> None:
        """
        Go over to other sinks: those of the same name and options go on (their files opened anew), others are closed
        when all that they were given is written.

        Args:
            tables: What is wanted.
            all_anew: Keep none, because what they write changed, too.

        Raises:
            ProcwatchError: One cannot begin; for it what was before goes on. The others are changed.
        """
        failures: list[str] = []
        before = {outlet.table.name: outlet for outlet in self._outlets}
        for table in tables:
            outlet = before.pop(table.name, None)
            try:
                if outlet is None:
                    await self._add(table)
                elif outlet.table != table or all_anew:
                    await outlet.replace(table, self._ready)
                else:
                    outlet.sink.reopen()
            except ProcwatchError as error:
                failures.append(f"sink {table.name!r}: {error}")
        for outlet in before.values():
            self._outlets.remove(outlet)
            await outlet.sink.close()
        if failures:
            raise ProcwatchError("; ".join(failures))

    async def close(self, within_s: float) -> None:
        """
        Write what is pending, all sinks at the same time, and end.
        """
        outlets, self._outlets = self._outlets, []
        closing = [asyncio.ensure_future(outlet.sink.close()) for outlet in outlets]
        if not closing:
            return
        _, late = await asyncio.wait(closing, timeout=within_s)
        for task, outlet in zip(closing, outlets, strict=True):
            if task in late:
                task.cancel()
                self._log.warning("a sink was not done in time", sink=outlet.table.name, pending=_pending(outlet))
            elif (error := task.exception()) is not None:
                self._log.error("a sink failed at the end", sink=outlet.table.name, error=str(error))
            elif dropped := outlet.sink.stats().dropped:
                self._log.warning("a sink has dropped events", sink=outlet.table.name, dropped=dropped)

    def stats(self) -> dict[str, tuple[SinkStats, Latency]]:
        """
        Counters of each sink.
        """
        return {outlet.table.name: (outlet.sink.stats(), outlet.sink.latency) for outlet in self._outlets}


async def opened(table: SinkTable, maker: Maker) -> QueueSink:
    """
    A sink that has begun.

    Raises:
        ProcwatchError: It cannot.
    """
    sink = table.make(maker)
    await sink.open()
    return sink


def _pending(outlet: Outlet) -> int:
    return outlet.sink.stats().pending
