"""
The socket for readers, and `procwatch tail` at its other end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest
from msgspec import json

from procwatch import events
from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.sinks.unix import UnixSink
from tests.sinks.kit import MAKER, drafts, make, opened, stop, until

pytestmark = pytest.mark.usefixtures("no_leaks")

READY = events.Ready(
    time=MAKER.clock.stamp(0), host="web-1", boot_id="x", version="1", backend="ebpf", sources=["ebpf"], skipped=[],
    kernel="6.18",
)  # fmt: skip


def told(lines: list[bytes]) -> list[object]:
    """
    The pids of what was read, and the counts of what was lost.
    """
    found = map(json.decode, lines)
    return [one.get("pid") or one.get("count") or one["event"] for one in found]


async def connected(path: Path, sink: UnixSink) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """
    A reader that the sink knows.
    """
    before = len(sink._readers)
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
    await until(lambda: len(sink._readers) > before, "the reader being there")
    return reader, writer


async def test_every_reader_has_all_from_when_it_came(tmp_path: Path):
    """
    Several at once, each greeted with `ready`; one that leaves does not matter.
    """
    path = tmp_path / "tail.sock"
    async with opened(UnixSink, path=str(path)) as sink:
        assert path.stat().st_mode & 0o777 == 0o660
        sink.put([READY, *drafts(1, 5)])
        first, first_writer = await connected(path, sink)
        _, gone = await connected(path, sink)
        sink.put(drafts(6, 7))
        second, second_writer = await connected(path, sink)
        gone.close()
        await gone.wait_closed()
        await until(lambda: len(sink._readers) == 2, "the reader being gone")
        sink.put([*drafts(8, 9), stop()])
    assert told((await first.read()).splitlines()) == ["ready", 6, 7, 8, 9, "stop"]
    assert told((await second.read()).splitlines()) == ["ready", 8, 9, "stop"]
    for writer in (first_writer, second_writer):
        writer.close()
        await writer.wait_closed()
    assert not path.exists()


async def test_a_slow_reader_is_told_what_it_missed_and_no_other_notices(tmp_path: Path):
    """
    Its own buffer is full, and nobody else's.
    """
    path = tmp_path / "tail.sock"
    async with opened(UnixSink, path=str(path), reader_bytes="16KiB") as sink:
        slow = socket.socket(socket.AF_UNIX)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(str(path))
        await until(lambda: sink._readers)
        quick, writer = await connected(path, sink)
        lines = []
        for first in range(1, 5000, 20):
            sink.put(drafts(first, first + 19))
            lines += [await quick.readline() for _ in range(20)]
        assert told(lines) == list(range(1, 5001))
        slow.setblocking(False)
        data = bytearray()
        lost, seen = 0, [0]
        while lost + len(seen) <= 5000:
            try:
                data += slow.recv(1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0)
            found = [json.decode(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
            lost = sum(one["count"] for one in found if one["event"] == "lost")
            seen = [0, *(one["pid"] for one in found if one["event"] == "exec")]
        writer.close()
        await writer.wait_closed()
        slow.close()
    assert seen[:50] == list(range(50))
    assert lost == sink.stats().dropped > 0
    assert seen == sorted(seen)


async def test_nothing_is_written_out_while_nobody_listens(tmp_path: Path):
    """
    It costs nothing then.
    """
    calls = []
    async with opened(UnixSink, path=str(tmp_path / "s"), encode=lambda item, buffer: calls.append(item)) as sink:
        sink.put(drafts(1, 9))
    assert calls == []


async def test_the_socket_of_an_agent_that_was_killed_is_taken(tmp_path: Path):
    """
    That of a living one is not.
    """
    path = tmp_path / "tail.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with opened(UnixSink, path=str(path)):
        with pytest.raises(SinkUnavailable, match="another procwatch"):
            await make(UnixSink, path=str(path)).open()
        assert path.exists()


async def test_places_that_cannot_be(tmp_path: Path):
    """
    In one line, when opening or before.
    """
    with pytest.raises(SinkUnavailable, match="No such file"):
        await make(UnixSink, path=str(tmp_path / "no" / "such")).open()
    with pytest.raises(ConfigError, match="no such group"):
        await make(UnixSink, path=str(tmp_path / "s"), group="no-such-group").open()
    with pytest.raises(ConfigError, match="107 bytes"):
        make(UnixSink, path="/" + "x" * 200)


PASSED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "1"
os.dup2(int(sys.argv[2]), 3)
from procwatch.sinks.unix import _passed
found = _passed(sys.argv[1])
print(found.getsockname(), _passed("/other"))
"""


def test_a_socket_that_systemd_passes_is_taken(tmp_path: Path):
    """
    By its path.
    """
    path = tmp_path / "tail.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        fd = os.dup(listener.fileno())
    command = [sys.executable, "-c", PASSED, str(path), str(fd)]
    said = subprocess.run(command, pass_fds=[fd], stdout=subprocess.PIPE, text=True, check=True).stdout
    os.close(fd)
    assert said == f"{path} None\n"


async def tail(*arguments: str) -> Process:
    """
    `procwatch tail`.
    """
    command = (sys.executable, "-m", "procwatch", "tail", *arguments)
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)


async def test_tail_prints_lines_to_the_end(tmp_path: Path):
    """
    The agent's own, or those for people; only the kinds that are asked for.
    """
    path = tmp_path / "tail.sock"
    async with opened(UnixSink, path=str(path)) as sink:
        sink.put([READY])
        plain = await tail("--socket", str(path))
        console = await tail("--socket", str(path), "--format", "console", "--events", "exit")
        await until(lambda: len(sink._readers) == 2)
        sink.put([*drafts(1, 3), stop()])
    said, complaints = await plain.communicate()
    assert (told(said.splitlines()), complaints, plain.returncode) == (["ready", 1, 2, 3, "stop"], b"", 0)
    said, complaints = await console.communicate()
    assert (complaints, console.returncode) == (b"", 0)
    assert b"ebpf" in said
    assert b"stop" in said
    assert b"/bin/true" not in said


async def test_tail_says_what_is_wrong(tmp_path: Path):
    """
    In one line: nobody there or the socket of one that was killed, no such name, gone in the middle, another format.
    """
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(stale))
    for place, why in ((tmp_path / "no", b"no agent"), (stale, b"no agent"), (Path("/" + "x" * 200), b"path too long")):
        nobody = await tail("--socket", str(place))
        _, complaints = await nobody.communicate()
        assert (nobody.returncode, complaints.count(b"\n")) == (1, 1)
        assert why in complaints
    path = tmp_path / "tail.sock"
    async with opened(UnixSink, path=str(path)) as sink:
        cut = await tail("--socket", str(path))
        await until(lambda: sink._readers)
    _, complaints = await cut.communicate()
    assert (cut.returncode, complaints.count(b"\n")) == (1, 1)
    assert b"has closed" in complaints
    async with opened(UnixSink, path=str(path), encode=lambda item, buffer: buffer.extend(b"x=1\n")) as sink:
        other = await tail("--socket", str(path))
        await until(lambda: sink._readers)
        sink.put(drafts(1, 1))
        _, complaints = await other.communicate()
    assert (other.returncode, complaints.count(b"\n")) == (2, 1)
    assert b"format = 'json'" in complaints


async def test_tail_ends_when_it_is_told(tmp_path: Path):
    """
    Ctrl-C, without a traceback.
    """
    path = tmp_path / "tail.sock"
    async with opened(UnixSink, path=str(path)) as sink:
        running = await tail("--socket", str(path))
        await until(lambda: sink._readers)
        running.send_signal(signal.SIGINT)
        _, complaints = await running.communicate()
    assert (running.returncode, complaints.strip()) == (130, b"")
