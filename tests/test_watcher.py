"""
Watching from a Python program: consumers, ends of all kinds, mistakes, and nothing left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest

import procwatch
from procwatch import ConfigError, ProcwatchError, SourceUnavailable, Watcher
from procwatch.enrich import hashes
from procwatch.errors import SourceLost
from procwatch.facts import Fork, Gone, Lost
from procwatch.sources.base import Source
from procwatch.testing import FIRST_PID, Collector, FakeSource

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_the_first_event_is_ready_and_the_last_is_stop():
    """
    Whatever came between; and iteration ends by itself.
    """
    source = FakeSource()
    async with Watcher(sources=[source], count=2) as watcher:
        source.end(source.start(["x"]), code=1)
        kinds = [event.event async for event in watcher]
    assert kinds == ["ready", "exec", "exit", "stop"]


async def test_count_counts_events_of_processes():
    """
    ready, lost and stop are not among them.
    """
    source = FakeSource()
    async with Watcher(sources=[source], count=3) as watcher:
        source.feed(Lost(source_now(), 0, "test", 5))
        for _ in range(5):
            source.start(["x"])
        events = [event async for event in watcher]
    assert [event.event for event in events] == ["ready", "lost", "exec", "exec", "exec", "stop"]
    stop: Any = events[-1]
    assert (stop.counts["exec"], stop.lost) == (3, 5)


def source_now() -> int:
    """
    A stamp for facts.
    """
    from procwatch.clock import Clock

    return Clock.now_ns()


async def test_for_s_ends_an_idle_watcher():
    """
    With stop, though nothing happened.
    """
    async with Watcher(sources=[FakeSource()], for_s=0.01) as watcher:
        assert [event.event async for event in watcher] == ["ready", "stop"]


async def test_a_slow_consumer_is_told_what_it_missed_and_the_others_miss_nothing():
    """
    `lost` with where="consumer" stands in the place of what was dropped, and stop comes though the queue is full.
    """
    source = FakeSource()
    async with Watcher(sources=[source], queue=4) as watcher:
        collector = Collector(watcher)
        for number in range(10):
            source.end(source.start(["x", str(number)]))
        await collector.wait(lambda event: event.event == "exit" and getattr(event, "argv", 0) == ["x", "9"])
        watcher.stop()
        slow: list[Any] = [event async for event in watcher]
    assert [event.event for event in slow] == ["ready", "exec", "exit", "exec", "lost", "stop"]
    assert (slow[-2].where, slow[-2].count, slow[-2].exact) == ("consumer", 17, True)
    assert slow[3].time <= slow[-2].since <= slow[-2].until
    assert len(collector.of("exec")) == len(collector.of("exit")) == 10


async def test_a_consumer_that_catches_up_goes_on():
    """
    Events after the gap come again.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        collector = Collector(watcher)
        slow = watcher.subscribe(queue=2)
        for number in range(5):
            source.start(["x", str(number)])
        await collector.wait(lambda event: getattr(event, "argv", 0) == ["x", "4"])
        first = [await anext(slow), await anext(slow)]
        source.start(["again"])
        second: list[Any] = [await anext(slow), await anext(slow)]
    assert [getattr(event, "argv", None) for event in first] == [["x", "0"], ["x", "1"]]
    assert (second[0].event, second[0].count) == ("lost", 3)
    assert second[1].argv == ["again"]


async def test_several_watchers_do_not_know_of_each_other():
    """
    Each has its sources, its table and its end.
    """
    one, two = FakeSource(), FakeSource()
    async with Watcher(sources=[one]) as first, Watcher(sources=[two]) as second:
        collectors = Collector(first), Collector(second)
        one.start(["one"])
        two.start(["two"])
        found = [await collector.wait("exec") for collector in collectors]
        first.close()
        two.start(["three"])
        await collectors[1].wait(lambda event: getattr(event, "argv", 0) == ["three"])
    assert [event.argv for event in found] == [["one"], ["two"]]
    assert len(collectors[0].of("exec")) == 1


@pytest.mark.parametrize("backend", ["netlink", "scan"])
async def test_several_watchers_on_the_real_host(backend: str):
    """
    Two of one backend in one program see the same process.
    """
    try:
        async with Watcher(backend=backend) as first, Watcher(backend=backend) as second:
            collectors = Collector(first), Collector(second)
            with subprocess.Popen(["cat", "-"], stdin=subprocess.PIPE) as process:
                for collector in collectors:
                    await collector.wait(
                        lambda e: getattr(e, "pid", 0) == process.pid and getattr(e, "argv", 0) == ["cat", "-"]
                    )
                await asyncio.to_thread(process.communicate)
                ended = [
                    await collector.wait(lambda e: e.event == "exit" and getattr(e, "pid", 0) == process.pid)
                    for collector in collectors
                ]
    except SourceUnavailable as error:
        pytest.skip(str(error))
    assert ended[0].id == ended[1].id
    assert ended[0].argv == ended[1].argv == ["cat", "-"]


@pytest.mark.parametrize("backend", ["auto", "netlink", "scan"])
@pytest.mark.parametrize("how", ["break", "exception", "cancel"])
async def test_nothing_is_left_however_the_loop_is_left(backend: str, how: str):
    """
    Sockets and descriptors are closed; the fixture looks.
    """
    entered = asyncio.Event()

    async def body() -> None:
        async with contextlib.aclosing(procwatch.watch(backend=backend)) as events:
            async for _ in events:
                entered.set()
                if how == "break":
                    break
                if how == "exception":
                    raise ZeroDivisionError

    task = asyncio.create_task(body())
    try:
        await asyncio.wait([task, asyncio.create_task(entered.wait())], return_when=asyncio.FIRST_COMPLETED)
        if how == "cancel":
            task.cancel()
        await task
    except SourceUnavailable as error:
        pytest.skip(str(error))
    except ZeroDivisionError:
        assert how == "exception"
    except asyncio.CancelledError:
        assert how == "cancel"


async def test_a_source_that_fails_to_open_leaves_the_others_closed():
    """
    And says why.
    """
    sources: list[Source] = [FakeSource(), FakeSource(unavailable=SourceUnavailable("fake", "not today", "wait"))]
    with pytest.raises(SourceUnavailable, match="fake: not today: wait"):
        async with Watcher(sources=sources):
            pass


class Broken(FakeSource):
    """
    A source that fails while it is read.
    """

    failing = False

    def read(self) -> list[Any]:
        if self.failing:
            raise OSError(5, "it broke")
        return super().read()


async def test_a_source_that_fails_again_and_again_ends_the_iteration_with_its_error():
    """
    Not in silence, and not in the loop's log; the first time it was opened anew.
    """
    source = Broken()
    async with Watcher(sources=[source]) as watcher:
        await anext(aiter(watcher))
        source.failing = True
        source.start(["x"])
        with pytest.raises(SourceLost, match=r"fake failed \(it broke\) again and again"):
            async for _ in watcher:
                pass


# wait_exit


async def test_wait_exit_gives_the_end_now_or_later():
    """
    Before it happens, and again afterwards.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        collector = Collector(watcher)
        pid = source.start(["x"])
        started = await collector.wait("exec")
        waiting = asyncio.create_task(watcher.wait_exit(started.id))
        await asyncio.sleep(0)
        source.end(pid, code=4)
        ended = await waiting
        assert (ended.id, ended.code, ended.argv) == (started.id, 4, ["x"])
        assert await watcher.wait_exit(started.id) == ended


async def test_wait_exit_of_nobody():
    """
    What never was, or is no id, is a LookupError at once.
    """
    async with Watcher(sources=[FakeSource()]) as watcher:
        for nobody in ("", "x", "0123abcd-1", "0123abcd-²-3", "0123abcd-99999999-1", f"0123abcd-{os.getpid()}-1"):
            with pytest.raises(LookupError):
                await watcher.wait_exit(nobody)


async def test_wait_exit_needs_exits():
    """
    A watcher without exit events cannot answer.
    """
    async with Watcher(sources=[FakeSource()], events="exec") as watcher:
        with pytest.raises(ConfigError, match="exit"):
            await watcher.wait_exit("0123abcd-1-1")


async def test_wait_exit_does_not_wait_for_ever():
    """
    The watcher ends first, or the end was not seen: an error, and never a cancellation out of nowhere.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        collector = Collector(watcher)
        first, second = source.start(["x"]), source.start(["y"])
        await collector.wait(lambda event: getattr(event, "argv", 0) == ["y"])
        waiting = [asyncio.create_task(watcher.wait_exit(watcher.processes[pid].id)) for pid in (first, second)]
        await asyncio.sleep(0)
        source.feed(Gone(source_now(), first))
        with pytest.raises(LookupError, match="not seen"):
            await waiting[0]
        watcher.stop()
        with pytest.raises(ProcwatchError, match="ended before"):
            await waiting[1]
        with pytest.raises(LookupError):
            await watcher.wait_exit("0123abcd-99999999-1")


@pytest.mark.parametrize("kinds", ["exec,exit", "exec,exit,vanished"])
async def test_wait_exit_of_who_vanished(kinds: str):
    """
    Its end was lost: an error, whether or not the watcher tells of those.
    """
    source = FakeSource()
    async with Watcher(sources=[source], events=kinds) as watcher:
        collector = Collector(watcher)
        pid = source.start(["x"])
        started = await collector.wait("exec")
        waiting = [asyncio.create_task(watcher.wait_exit(started.id)) for _ in range(2)]
        await asyncio.sleep(0)
        source.feed(Gone(source_now(), pid))
        for one in waiting:
            with pytest.raises(LookupError, match="not seen"):
                await one


async def test_wait_exit_of_who_is_filtered_out():
    """
    Its end is not shown, so nobody can wait for it, and nobody does.
    """
    source = FakeSource()
    async with Watcher(sources=[source], keep=lambda event: event.event != "exit") as watcher:
        collector = Collector(watcher)
        pid = source.start(["x"])
        started = await collector.wait("exec")
        waiting = asyncio.create_task(watcher.wait_exit(started.id))
        await asyncio.sleep(0)
        source.end(pid)
        with pytest.raises(LookupError, match="not seen"):
            await waiting


# Other doors


def test_watch_sync_gives_the_same_events():
    """
    Without asyncio; leaving the loop closes everything.
    """
    source = FakeSource()
    pid = source.start(["x"])
    source.end(pid)
    events = []
    for event in procwatch.watch_sync(sources=[source]):
        events.append(event.event)
        if event.event == "exit":
            break
    assert events == ["ready", "exec", "exit"]


async def test_watch_sync_within_a_loop_is_an_error():
    """
    It would block the loop.
    """
    with pytest.raises(ProcwatchError, match="running event loop"):
        next(iter(procwatch.watch_sync(sources=[FakeSource()])))


def test_snapshot_is_who_lives_now():
    """
    We are in it, with our own arguments and an id that is ours.
    """
    found = {event.pid: event for event in procwatch.snapshot()}
    own = found[os.getpid()]
    assert own.exe == os.path.realpath("/proc/self/exe")
    assert own.uid == os.getuid()
    assert own.parent is not None
    assert own.parent.pid == os.getppid()
    process = own.process()
    assert process is not None
    assert process.pid == os.getpid()


async def test_initial_tells_who_was_there():
    """
    `running` events come before anything else.
    """
    async with Watcher(sources=[FakeSource()], initial=True) as watcher:
        collector = [event async for event in _until(watcher, os.getpid())]
    assert {event.event for event in collector[1:]} == {"running"}


async def _until(watcher: Watcher, pid: int) -> Any:
    async for event in watcher:
        yield event
        if getattr(event, "pid", 0) == pid:
            return


# Mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        {"backend": "nosuch"},
        {"events": "nosuch"},
        {"events": []},
        {"buffer": "1"},
        {"buffer": "9" * 400},
        {"latency_ms": -1},
        {"latency_ms": float("inf")},
        {"fork_hold_ms": float("nan")},
        {"fork_hold_ms": float("inf")},
        {"count": 0},
        {"for_s": -0.1},
        {"queue": 0},
        {"ancestors": -1},
        {"without": ["nosuch"]},
        {"sources": []},
    ],
)
async def test_what_cannot_be_is_said_before_anything_starts(arguments: dict[str, Any]):
    """
    One line, with the value.
    """
    with pytest.raises(ConfigError) as caught:
        async with Watcher(**arguments):
            pass
    assert "\n" not in str(caught.value)


async def test_use_before_the_start_and_two_starts():
    """
    Both are told how it is meant.
    """
    watcher = Watcher(sources=[FakeSource()])
    for use in (lambda: watcher.ready, lambda: watcher.processes, watcher.stats, lambda: aiter(watcher)):
        with pytest.raises(ProcwatchError, match="async with"):
            use()
    async with watcher:
        with pytest.raises(ProcwatchError, match="only once"):
            watcher.start()
    watcher.close()
    watcher.stop()


async def test_stats_count():
    """
    Events, sources and processes.
    """
    source = FakeSource()
    async with Watcher(sources=[source]) as watcher:
        collector = Collector(watcher)
        source.end(source.start(["x"]))
        await collector.wait("exit")
        stats = watcher.stats()
    assert (stats.events["exec"], stats.events["exit"], stats.lost) == (1, 1, 0)
    assert list(stats.sources) == ["fake"]
    assert stats.processes > 1


def test_a_forgotten_generator_is_cleaned_up_with_its_loop():
    """
    `break` out of watch() without aclosing(): asyncio.run() closes it.
    """
    code = (
        "import asyncio, procwatch\n"
        "async def main():\n"
        "    async for event in procwatch.watch(backend='scan'):\n"
        "        break\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_hash_is_the_first_to_go_under_pressure(monkeypatch: pytest.MonkeyPatch):
    """
    The event comes at once and says why it has none; it is counted, and the next event of the file has it again.
    """
    monkeypatch.setattr(hashes, "MAX_WAITING", 0)
    info = os.stat(sys.executable)
    source = FakeSource()
    async with Watcher(sources=[source], hash="sha256", hash_wait_ms=30_000, events=["exec", "exit"]) as watcher:
        collector = Collector(watcher)
        pid = source.start(["x"], exe=sys.executable, exe_dev=info.st_dev, exe_inode=info.st_ino)
        begun = await collector.wait("exec")
        assert watcher.names()["refused"] == 1
        assert watcher._inspector is not None
        assert watcher._inspector._hasher is not None
        watcher._inspector._hasher._worker._capacity = 1
        source.end(pid)
        ended = await collector.wait("exit", timeout_s=30)
    assert (begun.hash, begun.missing["hash"]) == (None, "pressure")
    assert "hash" not in ended.missing
    assert len(ended.hash["sha256"]) == 64


async def test_what_waits_for_names_is_shown_at_the_end():
    """
    A container whose names never come does not take its events with it.
    """
    source = FakeSource()
    async with Watcher(sources=[source], container_wait_ms=60_000) as watcher:
        collector = Collector(watcher)
        source.feed(Fork(source_now(), FIRST_PID, 1, cgroup="/docker/" + "a" * 64))  # not decided yet
        watcher.stop()
    assert [event.event for event in collector.events] == ["fork", "stop"]
