"""
What the kernel had to drop is counted, marked where it happened, and put right: the agent is stopped in a storm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from procwatch import storms
from procwatch.sources import procfs
from procwatch.sources.select import LADDER, Options
from tests.conftest import need

COUNT = 6000
KERNEL = ("ebpf", "netlink")  # that tell each event; the scan is another matter
WHERE = {"ebpf": "ring_buffer", "netlink": "netlink_socket"}
Line = dict[str, Any]


class Agent:
    """
    A running `procwatch watch` in a process of its own, and what it printed.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[Line] = []

    def read_until(self, event: str, **fields: object) -> Line:
        """
        Read up to a line that has these fields.
        """
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line: Line = json.loads(text)
            self.lines.append(line)
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                return line
        raise AssertionError(f"ended without {event} {fields}")

    def finish(self) -> Line:
        """
        SIGTERM, and all that is left; the `stop` line.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.read_until("stop")


@contextmanager
def agent(backend: str, *options: str, stderr: IO[str] | None = None) -> Iterator[Agent]:
    """
    An agent that is ready.
    """
    (_, make), *_ = LADDER[backend]
    reason = make(Options()).probe()
    need(reason is None, str(reason))
    command = [sys.executable, "-m", "procwatch", "watch", "--backend", backend, "--format", "json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        running = Agent(process)
        running.read_until("ready")
        try:
            yield running
        finally:
            process.kill()


@contextmanager
def stopped(running: Agent) -> Iterator[None]:
    """
    The agent does not run meanwhile.
    """
    running.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        running.process.send_signal(signal.SIGCONT)


def shown(lines: list[Line]) -> int:
    """
    How many of the kernel's events the lines tell: an exec that tells its fork is two.
    """
    return sum(1 + bool(line.get("forked")) for line in lines if line["event"] in ("fork", "exec", "exit"))


def lost(lines: list[Line]) -> list[Line]:
    """
    The gaps.
    """
    return [line for line in lines if line["event"] == "lost"]


@pytest.mark.parametrize("backend", KERNEL)
def test_shown_and_lost_are_all(backend: str, tiny: Path):
    """
    Three events for each process are shown or counted as lost, and who was born unseen and lives comes after the gap.
    """
    before = procfs.born()
    with agent(backend, "--buffer", "1MiB") as running:
        with stopped(running):
            storms.storm(str(tiny), COUNT // 2, "storm")
            unseen = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            storms.storm(str(tiny), COUNT // 2, "storm")
        found = running.read_until("running", pid=unseen.pid)
        unseen.communicate(b"\n")
        running.read_until("exit", pid=unseen.pid)
        stop = running.finish()
        others = procfs.born() - before - COUNT - 1  # the agent's own start among them

    gaps = lost(running.lines)
    told = shown(running.lines) + sum(gap["count"] for gap in gaps)
    assert max(gap["count"] for gap in gaps) > COUNT
    assert {gap["exact"] for gap in gaps} == {True}
    assert WHERE[backend] in {gap["where"] for gap in gaps}
    assert found["via"] == "resync"
    assert stop["lost"] == sum(gap["count"] for gap in gaps)
    # Of whatever else ran on this machine meanwhile, as many as it may have had; nothing of our own is missing.
    assert 3 * COUNT + 3 <= told <= 3 * COUNT + 3 + 8 * others
    assert 0 < stop["coverage"]["fork"] < 0.7


@pytest.mark.parametrize("backend", KERNEL)
def test_gap_at_the_end_is_told(backend: str, tiny: Path):
    """
    When nothing happens after a gap, it is told all the same: the last events of a burst were dropped.
    """
    with agent(backend, "--buffer", "64KiB") as running:
        with stopped(running):
            storms.storm(str(tiny), 500, "storm")
        gap = running.read_until("lost", where=WHERE[backend])

    assert gap["exact"]
    assert gap["count"] > 0
    assert gap["since"] < gap["until"]


@pytest.mark.parametrize("backend", KERNEL)
def test_nothing_is_lost_in_a_storm(backend: str, tiny: Path):
    """
    With room for it a storm comes through whole, and the kernel's own count agrees.
    """
    with agent(backend) as running:
        storms.storm(str(tiny), 3000, "storm")
        stop = running.finish()

    assert lost(running.lines) == []
    assert stop["lost"] == 0
    assert stop["coverage"]["fork"] == pytest.approx(1, abs=0.001)
    mine = [line for line in running.lines if line.get("ppid") == os.getpid()]
    assert sum(line["event"] == "exec" for line in mine) == 3000
    assert sum(line["event"] == "exit" and line["code"] == 0 for line in mine) == 3000
    if backend == "ebpf":
        assert stop["coverage"] == {"fork": 1.0, "exec": 1.0, "exit": 1.0}


def test_strict_ends_at_the_first_loss(tiny: Path):
    """
    Exit code 3, one line that says why, and `stop` after the gap.
    """
    backend = "ebpf" if LADDER["ebpf"][0][1](Options()).probe() is None else "netlink"
    with agent(backend, "--strict", "--buffer", "4KiB") as running:
        with stopped(running):
            storms.storm(str(tiny), 500, "storm")
        running.read_until("stop")

        assert running.process.wait() == 3
        assert len(lost(running.lines)) >= 1


def test_strict_without_a_loss():
    """
    Exit code 0 when all was seen.
    """
    with agent("netlink", "--strict") as running:
        running.finish()

        assert running.process.wait() == 0


@pytest.mark.parametrize("backend", KERNEL)
def test_the_table_is_right_after_a_gap(backend: str, tiny: Path):
    """
    Who ended unseen vanishes from the table.
    """
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as process,
        agent(backend, "--initial", "--buffer", "64KiB") as running,
    ):
        running.read_until("running", pid=process.pid)
        with stopped(running):
            storms.storm(str(tiny), 1000, "storm")
            process.communicate(b"\n")
        end = running.read_until("vanished", pid=process.pid)

    assert end["argv"][-1] == "input()"
