"""
What the tests of sinks share: events, and lines read back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import Event
from procwatch.facts import Details
from procwatch.formats import FORMATS
from procwatch.sinks.base import QueueSink
from procwatch.table.draft import Draft, Maker, Who

MAKER = Maker("web-1", Clock(offset_ns=1_700_000_000_000_000_000))
ENCODE = FORMATS["json"](MAKER)


def draft(number: int, *, argv: list[str] | None = None, kind: type[events.ProcessEvent] = events.Exec) -> Draft:
    """
    An exec of the process with this number.
    """
    known = Details(exe="/bin/true", comm="true", uid=0)
    return Draft(kind, number * 1000, Who(f"0123abcd-{number}-9", number, 1, argv, False, None), known, {}, [], None)


def drafts(first: int, last: int) -> list[Event | Draft]:
    """
    Execs with the numbers from `first` to `last`.
    """
    return [draft(number) for number in range(first, last + 1)]


def stop() -> Event:
    """
    The last event.
    """
    return events.Stop(
        time=MAKER.clock.stamp(10**9), host="web-1", counts={}, lost=0, duration_ns=1, cpu_ns=1, max_rss_bytes=1
    )


def make(kind: type[QueueSink], **options: Any) -> Any:
    """
    A sink of native lines.
    """
    return kind.of(maker=MAKER, encode=options.pop("encode", ENCODE), **options)


@asynccontextmanager
async def opened(kind: type[QueueSink], **options: Any):
    """
    The same, open, and closed at the end.
    """
    sink = make(kind, **options)
    await sink.open()
    try:
        yield sink
    finally:
        await sink.close()


async def until(true: Callable[[], Any], what: str = "it") -> Any:
    """
    Wait for something that another thread or process does.
    """
    deadline = time.monotonic() + 20
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.002)
    return found


async def idle(sink: QueueSink) -> None:
    """
    Wait until nothing is pending.
    """
    await until(lambda: sink.stats().pending == 0, "the queue being empty")


def objects(path: Path) -> list[dict[str, Any]]:
    """
    The lines of a file, which must be whole.
    """
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def pids(path: Path) -> list[int]:
    """
    The pids of the execs in a file.
    """
    return [one["pid"] for one in objects(path) if one["event"] == "exec"]
