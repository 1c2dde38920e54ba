"""
What every sink does: it chooses, it is bounded, it tells what it dropped, and nothing that it waits for holds up put().
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from msgspec import json

from procwatch import events
from procwatch.errors import ConfigError
from procwatch.sinks import SINKS
from procwatch.sinks.base import QueueSink, Record
from tests.sinks.kit import MAKER, draft, drafts, idle, make, opened, stop, until


class Gate(QueueSink):
    """
    Keeps what it is given; waits while the gate is shut; fails when told to.
    """

    name = "gate"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.waits = threading.Event()
        self.lines: list[bytes] = []
        self.failure: Exception | None = None

    def _write(self, records: list[Record]) -> int:
        self.waits.set()
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.lines += [record.data for record in records]
        return len(records)

    def _abandon(self) -> None:
        self.gate.set()

    @property
    def told(self) -> list[Any]:
        """
        The pids of what was written, and the counts of what was lost.
        """
        found = map(json.decode, self.lines)
        return [one.get("pid") or (f"lost {one['count']}" if one["event"] == "lost" else "stop") for one in found]


async def test_events_come_in_order():
    """
    All of them, as lines.
    """
    async with opened(Gate) as sink:
        sink.put(drafts(1, 3))
        sink.put(drafts(4, 3000))
    assert sink.told == list(range(1, 3001))
    stats = sink.stats()
    assert (stats.written, stats.dropped, stats.pending, stats.failures) == (3000, 0, 0, 0)


async def test_only_the_kinds_that_are_wanted_and_what_always_comes():
    """
    ready, lost and stop say what the others are worth.
    """
    async with opened(Gate, events=frozenset({"exit"})) as sink:
        sink.put([draft(1), draft(2, kind=events.Fork), stop()])
    assert sink.told == ["stop"]


async def test_a_filter_chooses_processes():
    """
    It gets events, not drafts.
    """
    async with opened(Gate, keep=lambda event: event.pid == 2) as sink:
        sink.put([draft(1), draft(2), draft(3), stop()])
    assert sink.told == [2, "stop"]


async def test_what_did_not_fit_is_told_in_its_place():
    """
    Never more than the bound waits, and `stop` comes always.
    """
    async with opened(Gate, queue=2) as sink:
        sink.gate.clear()
        sink.put(drafts(1, 1))
        await until(sink.waits.is_set)
        sink.put(drafts(2, 5))
        assert sink.stats().pending == 2
        sink.gate.set()
        await idle(sink)
        sink.put([draft(6)])
        await idle(sink)
        sink.gate.clear()
        sink.put([*drafts(7, 9), stop()])
        sink.gate.set()
    assert sink.told == [1, 2, "lost 3", 6, 7, 8, "lost 1", "stop"]
    lost = json.decode(sink.lines[2], type=events.Lost)
    stamp = MAKER.clock.stamp
    assert (lost.where, lost.exact, lost.since, lost.until) == ("sink", True, stamp(3000), stamp(5000))
    assert sink.stats().dropped == 4


async def test_a_few_huge_events_are_bounded_too(monkeypatch: pytest.MonkeyPatch):
    """
    An event may have 128 KiB of arguments: the queue is bounded in bytes.
    """
    monkeypatch.setattr("procwatch.sinks.base.MAX_QUEUED_BYTES", 100_000)
    async with opened(Gate) as sink:
        sink.gate.clear()
        sink.put([draft(number, argv=["x" * 60_000]) for number in range(1, 6)])
        assert sink.stats().pending == 2
        sink.gate.set()
    assert sink.told == [1, 2, "lost 3"]


async def test_a_lost_event_that_is_dropped_counts_for_all_that_it_told():
    """
    Nothing is forgotten.
    """
    before = events.Lost(
        time=MAKER.clock.stamp(0), host="web-1", count=40, exact=True, where="ring_buffer", since=None, until=None
    )
    async with opened(Gate, queue=1) as sink:
        sink.gate.clear()
        sink.put([draft(1), before, draft(2)])
        sink.gate.set()
    assert sink.told == [1, "lost 41"]


async def test_what_could_not_be_written_is_told_when_writing_works_again():
    """
    A failure does not end the sink, whatever it was.
    """
    async with opened(Gate) as sink:
        sink.failure = ValueError("not today\nnor tomorrow")
        sink.put(drafts(1, 5))
        await idle(sink)
        stats = sink.stats()
        assert (stats.written, stats.dropped, stats.failures, stats.error) == (0, 5, 1, "not today")
        sink.failure = None
        sink.put(drafts(6, 7))
    assert sink.told == ["lost 5", 6, 7]


async def test_a_loss_is_told_at_the_end_if_nothing_follows():
    """
    The last chance.
    """
    async with opened(Gate) as sink:
        sink.failure = OSError(28, "No space left on device")
        sink.put(drafts(1, 5))
        await idle(sink)
        sink.failure = None
    assert sink.told == ["lost 5"]


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch):
    """
    What a stuck other end did not take is counted.
    """
    monkeypatch.setattr("procwatch.sinks.base.CLOSE_S", 0.01)
    async with opened(Gate) as sink:
        sink.gate.clear()
        sink.put([draft(1)])
        await until(sink.waits.is_set)
        sink.put(drafts(2, 5000))
    stats = sink.stats()
    assert stats.pending == 0
    assert stats.written + stats.dropped == 5000
    assert stats.dropped > 0


def test_a_queue_of_none_cannot_be():
    """
    One at least.
    """
    with pytest.raises(ConfigError, match="queue=0"):
        make(Gate, queue=0)


@pytest.mark.parametrize("name", SINKS)
def test_sinks_are_found_by_name(name: str):
    """
    As the configuration writes them; no library that may be missing is needed to look.
    """
    assert SINKS[name].name == name
