"""
For tests of programs that use procwatch: a source that tells what the test says, and a collector of events.

No privileges, no real processes, no waiting: what is fed comes out as events in the same turn of the loop.

Example:
    >>> import asyncio
    >>> from procwatch import Watcher
    >>> async def deploy_is_seen() -> str:
    ...     source = FakeSource()
    ...     async with Watcher(sources=[source]) as watcher:
    ...         collector = Collector(watcher)
    ...         pid = source.start(["deploy", "--all"], exe="/usr/bin/deploy")
    ...         source.end(pid, code=3)
    ...         ended = await collector.wait("exit")
    ...     return f"{ended.exe} {ended.argv} {ended.code}"
    >>> asyncio.run(deploy_is_seen())
    "/usr/bin/deploy ['deploy', '--all'] 3"
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from procwatch.errors import SourceUnavailable
from procwatch.events import Event
from procwatch.facts import Details, Exec, Exit, Fact, Fork
from procwatch.sources.base import SourceStats
from procwatch.table.identity import ticks
from procwatch.watcher import Watcher

__all__ = ["Collector", "FakeSource"]

# Above every pid that Linux gives out (PID_MAX_LIMIT in include/linux/threads.h), so never a real process.
FIRST_PID = 1 << 22


class FakeSource:
    """
    A source for `Watcher(sources=[...])` that tells the facts it is given.

    Args:
        facts: Told at the first reading.
        unavailable: `open()` raises this, as a real source does where it cannot work.
    """

    name: ClassVar[str] = "fake"

    def __init__(self, facts: Iterable[Fact] = (), *, unavailable: SourceUnavailable | None = None) -> None:
        self._facts = list(facts)
        self._unavailable = unavailable
        self._ready = -1  # an eventfd(2)
        self._next_pid = FIRST_PID
        self._told = self._wakeups = 0

    def start(
        self, argv: list[str], *, exe: str | None = None, pid: int | None = None, ppid: int = 1, **details: Any
    ) -> int:
        """
        A process is born and executes a program.

        Args:
            argv: Its arguments, the first one is its name.
            exe: Path of the file; None: argv[0].
            pid: Its pid; None: the next one that no real process can have.
            ppid: Its parent's.
            details: More fields of `procwatch.facts.Details`: uid, cwd, cgroup ...

        Returns:
            Its pid.
        """
        if pid is None:
            pid, self._next_pid = self._next_pid, self._next_pid + 1
        exe = exe or argv[0]
        now = _now()
        known = Details(
            **{"ppid": ppid, "exe": exe, "file": exe, "comm": os.path.basename(exe)[:15], "argv": argv, **details}
        )
        self.feed(Fork(now, pid, ppid, ticks(now)), Exec(now, pid, known))
        return pid

    def end(self, pid: int, *, code: int = 0, signal: int = 0) -> None:
        """
        A process ends by itself with `code`, or by a signal.
        """
        self.feed(Exit(_now(), pid, signal or code << 8))

    def feed(self, *facts: Fact) -> None:
        """
        Tell any facts, such as `procwatch.facts.Lost`.
        """
        self._facts += facts
        self._wake()

    def _wake(self) -> None:
        if self._facts and self._ready >= 0:
            os.eventfd_write(self._ready, 1)

    def probe(self) -> SourceUnavailable | None:
        """
        What `open()` would raise.
        """
        return self._unavailable

    def open(self) -> None:
        """
        Begin.

        Raises:
            SourceUnavailable: The one that was given.
        """
        if self._unavailable is not None:
            raise self._unavailable
        self._ready = os.eventfd(0)
        self._wake()

    def fileno(self) -> int | None:
        """
        Readable while there are facts.
        """
        return self._ready

    def delay_s(self) -> float:
        """
        Never wait.
        """
        return 0.0

    def read(self) -> list[Fact]:
        """
        What was fed since.
        """
        if not self._facts or self._ready < 0:
            return []
        os.eventfd_read(self._ready)
        facts, self._facts = self._facts, []
        self._told += len(facts)
        self._wakeups += 1
        return facts

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        return SourceStats(facts=self._told, wakeups=self._wakeups)

    @property
    def closed(self) -> bool:
        """
        Whether the watcher has let go of it, or never took it.
        """
        return self._ready < 0

    def close(self) -> None:
        """
        End.
        """
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


class Collector:
    """
    Keeps all events from now on, and waits for those that a test needs.

    Args:
        watcher: Collect from this one.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.events: list[Event] = []
        self._waiting: list[tuple[Callable[[Event], bool], asyncio.Future[Any]]] = []
        watcher.add_sink(self)

    def __call__(self, batch: list[Event]) -> None:
        """
        Take events; called by the watcher.
        """
        for event in batch:
            self.events.append(event)
            for matches, future in self._waiting:
                if not future.done() and matches(event):
                    future.set_result(event)

    def of(self, *kinds: str) -> list[Any]:
        """
        The events of these kinds, so far.
        """
        return [event for event in self.events if event.event in kinds]

    async def wait(self, what: str | Callable[[Event], bool], *, timeout_s: float = 10) -> Any:
        """
        The first event of a kind, or for which `what` says True; at once if it came already.

        Raises:
            TimeoutError: None came in `timeout_s` seconds.
        """
        matches = (lambda event: event.event == what) if isinstance(what, str) else what
        for event in self.events:
            if matches(event):
                return event
        waiting = (matches, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiting[1]
        finally:
            self._waiting.remove(waiting)


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
