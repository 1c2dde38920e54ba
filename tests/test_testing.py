"""
What procwatch.testing gives to the tests of other programs.
"""

from __future__ import annotations

import pytest

from procwatch import SourceUnavailable, Watcher
from procwatch.facts import Lost
from procwatch.testing import FIRST_PID, Collector, FakeSource

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_started_and_ended_processes_come_out_joined():
    """
    A fake process gives one exec that tells its birth, and one exit with what the exec said.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        collector = Collector(watcher)
        pid = source.start(["ls", "-l"], exe="/bin/ls", uid=7, cwd="/tmp")
        source.end(pid, code=2)
        ended = await collector.wait("exit")

    started = collector.of("exec")[0]
    assert (started.pid, started.exe, started.argv, started.uid, started.cwd) == (
        pid,
        "/bin/ls",
        ["ls", "-l"],
        7,
        "/tmp",
    )
    assert started.forked is True
    assert (ended.id, ended.exe, ended.code, ended.signal) == (started.id, "/bin/ls", 2, None)
    assert pid == FIRST_PID


async def test_facts_before_the_start_are_told():
    """
    Facts given to the constructor come as soon as the watcher runs.
    """
    async with Watcher(sources=[FakeSource([Lost(1, 0, "ring_buffer", 3)])]) as watcher:
        lost = await Collector(watcher).wait(lambda event: event.event == "lost")

    assert (lost.count, lost.where, watcher.stats().lost) == (3, "ring_buffer", 3)


async def test_death_by_signal():
    """
    A fake process can die by a signal, and then has no code.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        source.end(source.start(["/bin/sleep", "9"]), signal=15)
        ended = await Collector(watcher).wait("exit")

    assert (ended.code, ended.signal, ended.signal_name) == (None, 15, "SIGTERM")


async def test_source_is_closed_with_its_watcher():
    """
    Leaving the watcher closes the fake source, as it does real ones.
    """
    source = FakeSource()
    async with Watcher(sources=[source]):
        assert not source.closed

    assert source.closed


async def test_unavailable_source():
    """
    A fake source can refuse to open, so that users can test what they do then.
    """
    refusal = SourceUnavailable("fake", "needs CAP_NET_ADMIN", "run as root")
    with pytest.raises(SourceUnavailable, match="needs CAP_NET_ADMIN: run as root"):
        async with Watcher(sources=[FakeSource(unavailable=refusal)]):
            pass

    assert FakeSource(unavailable=refusal).probe() is refusal


async def test_waiting_ends():
    """
    An event that never comes fails the test that waits for it, with TimeoutError.
    """
    async with Watcher(sources=[FakeSource()]) as watcher:
        with pytest.raises(TimeoutError):
            await Collector(watcher).wait("exec", timeout_s=0)
