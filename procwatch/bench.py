"""
What watching costs on this host, and how much is seen: storms of the shortest processes, on each backend.

Each round is a pair, a storm without the agent and one with it, so that what else the host does hits both alike. The
storm has a process of its own, and so has the agent, started as a user starts it; here we only read its lines and note
when they come.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO, Any

from msgspec import DecodeError, Struct, json

from procwatch import peers, storms
from procwatch.errors import ProcwatchError
from procwatch.sources import procfs
from procwatch.sources.select import LADDER, Options

ROUNDS = 3
# Processes before each round, seen like the others but not measured: a program that has just begun is slow.
WARM_UP = 500
# An agent that printed nothing for so long after a storm has told all of it.
QUIET_S = 0.25
PATIENCE_S = 10.0


class Latency(Struct, frozen=True):
    """
    From the kernel's stamp to the arrival of the line, ms.
    """

    p50: float | None
    p99: float | None


class Row(Struct, frozen=True):
    """
    One backend. The shares are of all execs of the storm: those whose line had this field, and right.
    """

    backend: str
    exe: float
    argv: float
    cwd: float
    cgroup: float
    lost: int
    cpu_ms_per_1k: float  # of the agent, for 1000 processes from fork to exit
    slowdown: float  # time of the storm beside the agent, by that without: 1.0 is none
    latency_ms: Latency
    max_rss_bytes: int


class Result(Struct, frozen=True):
    """
    The contract of `procwatch bench --json`; `peers` only with those that are installed.
    """

    backends: list[Row]
    peers: list[peers.Row]


def bench(
    count: int,
    backends: list[str] | None = None,
    *,
    with_peers: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Result:
    """
    Measure.

    Args:
        count: Processes of each storm with an agent, in all rounds together.
        backends: Of the ladder; None: all that work here.
        with_peers: Measure other tools, too, that are installed.
        tell: Called with a line on what is being measured.

    Raises:
        ProcwatchError: None works, or an agent ended.
    """
    rows = []
    found = []
    with storms.installed() as tiny, _storm(tiny) as storm:
        storm.run(min(count, 200))  # what comes first is slow
        for backend in backends if backends is not None else _working():
            tell(f"{backend}: {count} processes beside it")
            rows.append(_measure(backend, storm, count))
        for peer in peers.installed() if with_peers else ():
            tell(f"{peer.name}: {count} processes beside it")
            found.append(_measure_peer(peer, storm, count))
    if not rows:
        raise ProcwatchError("no backend works here: see procwatch doctor")
    return Result(rows, [row for row in found if row is not None])


def _working() -> list[str]:
    return [backend for backend, ((_, make), *_) in LADDER.items() if make(Options()).probe() is None]


class Storm(Struct):
    """
    A process that runs storms, and what its children look like.
    """

    process: subprocess.Popen[str]
    tiny: str
    mark: str
    cwd: str
    cgroup: str | None

    def run(self, count: int) -> float:
        """
        So many processes; seconds that they took.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ProcwatchError("the storm ended: are there too many processes?")
        return float(answer)


@contextlib.contextmanager
def _storm(tiny: str) -> Iterator[Storm]:
    mark = f"procwatch-bench-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "procwatch.storms", tiny, mark]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Storm(process, tiny, mark, os.getcwd(), procfs.read(process.pid).cgroup)
        finally:
            process.kill()


class Lines:
    """
    Takes what a program prints, in a thread, and when it came.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunks: list[tuple[int, bytes]] = []
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        fd = self._stream.fileno()
        while data := os.read(fd, 1 << 20):
            self._chunks.append((time.time_ns(), data))
            self._first.set()
        self._first.set()

    def await_first(self) -> bool:
        """
        Wait for the first line; False when none came.
        """
        return self._first.wait(PATIENCE_S) and bool(self._chunks)

    def await_quiet(self) -> None:
        """
        Wait until nothing more comes.
        """
        deadline = time.monotonic() + PATIENCE_S
        before = -1
        while len(self._chunks) != before and time.monotonic() < deadline:
            before = len(self._chunks)
            time.sleep(QUIET_S)

    def all(self) -> Iterator[tuple[int, bytes]]:
        """
        To the end of the program: each line, and when its last byte came.
        """
        self._thread.join()
        rest = b""
        for came_ns, data in self._chunks:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield came_ns, line


class Tally:
    """
    What the lines of all rounds say of the storm.
    """

    def __init__(self, storm: Storm) -> None:
        self._storm = storm
        self.right = dict.fromkeys(("exe", "argv", "cwd", "cgroup"), 0)
        self.lost = 0
        self.latencies: list[float] = []

    def add(self, came_ns: int, line: bytes) -> None:
        """
        Another line.
        """
        if b'"exec"' not in line and b'"lost"' not in line:
            return
        try:
            event = json.decode(line)
        except DecodeError:
            return
        if event["event"] == "lost":
            self.lost += event["count"]
        elif event["event"] == "exec" and event["ppid"] == self._storm.process.pid:
            self._count(event)
            self.latencies.append((came_ns - _ns(event["time"])) / 1e6)

    def _count(self, event: dict[str, Any]) -> None:
        storm, right = self._storm, self.right
        right["exe"] += event["exe"] == storm.tiny
        right["argv"] += (event["argv"] or ())[:2] == [storm.tiny, storm.mark]
        right["cwd"] += event["cwd"] == storm.cwd
        right["cgroup"] += event["cgroup"] == storm.cgroup

    def latency(self) -> Latency:
        """
        Of all lines.
        """
        if not self.latencies:
            return Latency(None, None)
        ordered = sorted(self.latencies)
        return Latency(*(round(ordered[min(int(len(ordered) * at), len(ordered) - 1)], 3) for at in (0.5, 0.99)))


def _ns(stamp: str) -> int:
    """
    >>> _ns("1970-01-01T00:00:01.000000005Z")
    1000000005
    """
    return int(datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()) * 1_000_000_000 + int(stamp[20:29])


class Cost:
    """
    Of a program beside storms, summed over rounds.
    """

    def __init__(self) -> None:
        self.cpu_ns = 0
        self.processes = 0
        self.ratios: list[float] = []
        self.max_rss_bytes = 0

    def beside(self, storm: Storm, count: int, base_s: float, pid: int, quiet: Callable[[], None]) -> None:
        """
        One storm beside the program `pid`, that is ready.
        """
        storm.run(min(count, WARM_UP))
        quiet()
        before, born = cpu_ns(pid), procfs.born()
        self.ratios.append(storm.run(count) / base_s)
        quiet()
        self.cpu_ns += cpu_ns(pid) - before
        self.processes += max(count, procfs.born() - born)  # what else is born here costs as much
        self.max_rss_bytes = max(self.max_rss_bytes, peak_memory(pid))

    @property
    def cpu_ms_per_1k(self) -> float:
        """
        CPU for 1000 processes, ms.
        """
        return round(self.cpu_ns / self.processes / 1000, 3)

    @property
    def slowdown(self) -> float:
        """
        The median of the pairs.
        """
        return round(statistics.median(self.ratios), 3)


def cpu_ns(pid: int) -> int:
    """
    CPU that a process has used, all its threads, exact: its CPU clock, clock_getcpuclockid(3).
    """
    return time.clock_gettime_ns(~pid << 3 | 2)


def peak_memory(pid: int) -> int:
    """
    VmHWM of a process, bytes.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)


def _measure(backend: str, storm: Storm, count: int) -> Row:
    tally, cost = Tally(storm), Cost()
    command = [sys.executable, "-m", "procwatch", "watch", "--backend", backend, "--format", "json"]
    for part in _parts(count):
        base_s = storm.run(part)
        with _running(command) as (process, lines):
            if not lines.await_first():
                raise ProcwatchError(f"the agent on {backend} did not begin: {' '.join(command)}")
            lines.await_quiet()
            cost.beside(storm, part, base_s, process.pid, lines.await_quiet)
            process.send_signal(signal.SIGTERM)
            for came_ns, line in lines.all():
                tally.add(came_ns, line)
    total = _told(count)
    share = {name: round(right / total, 5) for name, right in tally.right.items()}
    return Row(
        backend=backend,
        lost=tally.lost,
        cpu_ms_per_1k=cost.cpu_ms_per_1k,
        slowdown=cost.slowdown,
        latency_ms=tally.latency(),
        max_rss_bytes=cost.max_rss_bytes,
        **share,
    )


def _measure_peer(peer: peers.Peer, storm: Storm, count: int) -> peers.Row | None:
    """
    The same with another tool; None when it does not run here.
    """
    cost = Cost()
    seen = named = 0
    name = os.path.basename(storm.tiny).encode()
    for part in _parts(count):
        base_s = storm.run(part)
        with _running(peer.command) as (process, lines):
            if not _settled(process):
                return None
            cost.beside(storm, part, base_s, process.pid, lines.await_quiet)
            process.send_signal(signal.SIGINT)
            for _, line in lines.all():
                seen += name in line
                named += storm.tiny.encode() in line
    total = _told(count)
    share = round(min(named / total, 1), 5)
    return peers.Row(peer.name, share, max(total - seen, 0), cost.cpu_ms_per_1k, cost.slowdown, cost.max_rss_bytes)


def _settled(process: subprocess.Popen[bytes]) -> bool:
    """
    Wait until a program that does not say when it is ready does no more work; False when it has ended.
    """
    deadline = time.monotonic() + PATIENCE_S
    before = None  # one that was just started has used nothing yet
    while process.poll() is None:
        now = cpu_ns(process.pid)
        if (before is not None and now - before < 1_000_000) or time.monotonic() > deadline:
            return True
        before = now
        time.sleep(2 * QUIET_S)
    return False


def _parts(count: int) -> list[int]:
    """
    The rounds; a small count is one.

    >>> _parts(1000), _parts(20)
    ([334, 333, 333], [20])
    """
    rounds = max(1, min(ROUNDS, count // 100))
    return [count // rounds + (number < count % rounds) for number in range(rounds)]


def _told(count: int) -> int:
    """
    Processes of all rounds, with those that warm up.

    >>> _told(1000), _told(20)
    (2000, 40)
    """
    return sum(part + min(part, WARM_UP) for part in _parts(count))


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Lines]]:
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=null) as process:
        assert process.stdout is not None
        lines = Lines(process.stdout)
        try:
            yield process, lines
        finally:
            process.kill()
            for _ in lines.all():
                pass
