"""
The stream sink: whole lines into files and pipes, whoever reads them, and never a blocked loop.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import Event
from procwatch.formats import native
from procwatch.sinks import stream
from procwatch.sinks.stream import StreamSink
from procwatch.table.draft import Draft, Maker

pytestmark = pytest.mark.usefixtures("no_leaks")
TIME = "2026-01-02T03:04:05.678900000Z"


def lost(count: int) -> Event:
    """
    An event that is easy to tell from others.
    """
    return events.Lost(time=TIME, host="h" * 500, count=count, exact=True, where="test", since=None, until=None)


def encode(item: Event | Draft, buffer: bytearray) -> None:
    assert isinstance(item, Event)
    native.encode_into(item, buffer)


class Closed(list[Any]):
    """
    What the sink said of its descriptor.
    """


def sink(fd: int, said: Closed, latency_s: float = 0, path: str | None = None) -> StreamSink:
    return StreamSink(
        fd,
        encode,
        Maker("h", Clock()),
        latency_s=latency_s,
        on_closed=lambda: said.append("closed"),
        on_error=said.append,
        path=path,
    )


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """
    A pipe that stays at one page: [reader, writer]; closed at the end, those that are left in it.
    """
    monkeypatch.setattr(stream, "PIPE_BYTES", 4096)
    ends = list(os.pipe())
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def read_all(fd: int, found: list[Any]) -> None:
    """
    Read lines until the other end is closed.
    """
    with open(fd, "rb", closefd=False) as lines:
        for line in lines:
            found.append(json.loads(line))


async def test_a_quiet_line_is_written_at_once(pipe: list[int]):
    """
    Before the next turn of the loop.
    """
    sink(pipe[1], Closed(), latency_s=60)([lost(1)])
    assert json.loads(os.read(pipe[0], 4096))["count"] == 1


async def test_under_load_lines_gather(pipe: list[int]):
    """
    The second one waits for the latency, and comes with what came until then.
    """
    writer = sink(pipe[1], Closed(), latency_s=0.05)
    writer([lost(1)])
    writer([lost(2)])
    writer([lost(3)])
    assert os.read(pipe[0], 4096).count(b"\n") == 1
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe[0], readable.set)
    await readable.wait()
    asyncio.get_running_loop().remove_reader(pipe[0])
    assert os.read(pipe[0], 4096).count(b"\n") == 2


@pytest.mark.parametrize("nowait", [True, False])
async def test_a_full_pipe_does_not_block_and_loses_nothing(
    nowait: bool, pipe: list[int], monkeypatch: pytest.MonkeyPatch
):
    """
    A thousand lines into a page, with a reader that comes later; where a pipe knows RWF_NOWAIT, and where it does not.
    """
    if not nowait:

        def refuse(*_: object) -> int:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "pwritev", refuse)
    writer = sink(pipe[1], Closed())
    for number in range(1000):
        writer([lost(number)])
    found: list[Any] = []
    reader = threading.Thread(target=read_all, args=(pipe[0], found))
    reader.start()
    while writer._buffer:
        await asyncio.sleep(0)
    writer.finish()
    os.close(pipe.pop())
    await asyncio.to_thread(reader.join)
    assert [line["count"] for line in found] == list(range(1000))


async def test_the_end_waits_for_the_reader(pipe: list[int]):
    """
    finish() writes all that is left.
    """
    writer = sink(pipe[1], Closed())
    for number in range(100):
        writer([lost(number)])
    found: list[Any] = []
    reader = threading.Thread(target=read_all, args=(pipe[0], found))
    reader.start()
    writer.finish()
    os.close(pipe.pop())
    reader.join()
    assert [line["count"] for line in found] == list(range(100))


async def test_a_pipe_holds_what_a_turn_writes():
    """
    It is made larger than the 64 KiB that it has by itself.
    """
    reader, writer = os.pipe()
    sink(writer, Closed())
    assert fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) == stream.PIPE_BYTES
    os.close(reader)
    os.close(writer)


async def test_beyond_the_bound_events_are_dropped_and_told(pipe: list[int], monkeypatch: pytest.MonkeyPatch):
    """
    What was dropped is counted where it would have been, and `stop` comes in any case.
    """
    monkeypatch.setattr(stream, "MAX_PENDING", 8192)
    writer = sink(pipe[1], Closed())
    for number in range(100, 200):
        writer([lost(number)])
    writer(
        [events.Stop(time=TIME, host="h", counts={}, lost=0, duration_ns=1, cpu_ns=1, max_rss_bytes=1)],
    )
    lines: list[Any] = []
    reader = threading.Thread(target=read_all, args=(pipe[0], lines))
    reader.start()
    writer.finish()
    os.close(pipe.pop())
    reader.join()
    shown = [line["count"] for line in lines if line.get("where") == "test"]
    (told,) = [line for line in lines if line.get("where") == "sink"]
    assert shown == list(range(100, 100 + len(shown)))
    assert told["count"] + len(shown) == 100
    assert told["exact"] is True
    assert writer.lost == told["count"]
    assert [line["event"] for line in lines[-2:]] == ["lost", "stop"]


async def test_a_loss_at_the_very_end_is_told(pipe: list[int], monkeypatch: pytest.MonkeyPatch):
    """
    Also when no event comes after it.
    """
    monkeypatch.setattr(stream, "MAX_PENDING", 0)
    writer = sink(pipe[1], Closed())
    writer([lost(n) for n in range(20)])
    lines: list[Any] = []
    reader = threading.Thread(target=read_all, args=(pipe[0], lines))
    reader.start()
    writer.finish()
    os.close(pipe.pop())
    reader.join()
    assert (lines[-1]["where"], lines[-1]["count"]) == ("sink", 19)


async def test_a_reader_that_went_away_is_told_once(pipe: list[int]):
    """
    EPIPE is no error: the reader has seen enough.
    """
    os.close(pipe.pop(0))
    said = Closed()
    writer = sink(pipe[0], said)
    for _ in range(3):
        writer([lost(1)])
    writer.finish()
    assert said == ["closed"]


async def test_a_full_disk_is_told_once():
    """
    With the error that the kernel gave.
    """
    fd = os.open("/dev/full", os.O_WRONLY)
    said = Closed()
    try:
        writer = sink(fd, said)
        writer([lost(1)])
        writer([lost(2)])
        writer.finish()
    finally:
        os.close(fd)
    assert [error.errno for error in said] == [errno.ENOSPC]


async def test_a_file_gets_whole_lines_in_one_write(tmp_path: Path):
    """
    A batch that is larger than any buffer.
    """
    with open(tmp_path / "lines", "wb") as file:
        writer = sink(file.fileno(), Closed())
        writer([lost(number) for number in range(3000)])
        writer.finish()
    assert [json.loads(line)["count"] for line in (tmp_path / "lines").read_bytes().splitlines()] == list(range(3000))


async def test_a_file_is_tried_again(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    """
    While the disk is full lines wait, beyond the bound they are counted; with room again it goes on, each line whole.
    """
    monkeypatch.setattr(stream, "MAX_PENDING", 100_000)
    said = Closed()
    with open(small_disk / "lines", "wb") as file:
        writer = sink(file.fileno(), said)
        for number in range(500):
            writer([lost(number)])
        writer.flush()
        full = (small_disk / "lines").read_bytes()
        subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
        writer.flush()
        writer([lost(500)])
        writer.finish()
    found = [json.loads(line) for line in (small_disk / "lines").read_bytes().splitlines()]
    assert [error.errno for error in said] == [errno.ENOSPC]
    assert full.endswith(b"\n")
    told = [one["count"] for one in found if one["where"] == "test"]
    gaps = [one["count"] for one in found if one["where"] == "sink"]
    assert told == sorted(told)
    assert len(told) + sum(gaps) == 501
    assert sum(gaps) == writer.lost > 0


@pytest.mark.parametrize("away", ["moved", "removed"])
async def test_a_file_that_is_gone_is_made_anew(away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    What comes next is in a new file of the same name, without anybody's signal.
    """
    monkeypatch.setattr(stream, "AGAIN_S", 0)
    path = tmp_path / "lines"
    fd = stream.open_file(str(path))
    try:
        writer = sink(fd, Closed(), path=str(path))
        writer([lost(1)])
        path.rename(tmp_path / "lines.1") if away == "moved" else path.unlink()
        writer([lost(2)])
        writer.finish()
    finally:
        os.close(fd)
    assert [json.loads(line)["count"] for line in path.read_bytes().splitlines()] == [2]


async def test_a_file_that_cannot_be_made_anew_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    It is said once, and nothing is lost.
    """
    monkeypatch.setattr(stream, "AGAIN_S", 0)
    (tmp_path / "logs").mkdir()
    fd = stream.open_file(str(tmp_path / "logs" / "lines"))
    said = Closed()
    try:
        writer = sink(fd, said, path=str(tmp_path / "logs" / "lines"))
        (tmp_path / "logs").rename(tmp_path / "old")
        writer([lost(1)])
        writer([lost(2)])
        writer.finish()
    finally:
        os.close(fd)
    assert [error.errno for error in said] == [errno.ENOENT]
    assert len((tmp_path / "old" / "lines").read_bytes().splitlines()) == 2
