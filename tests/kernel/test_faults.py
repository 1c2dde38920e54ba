"""
What goes wrong around the agent: its descriptors die, there are none left, there is another agent.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from procwatch import SourceUnavailable, Watcher, pipeline, storms
from procwatch.errors import SourceLost
from procwatch.events import Event
from procwatch.sources.base import Source
from procwatch.sources.ebpf import Ebpf
from procwatch.sources.fanotify import Fanotify
from procwatch.sources.proc_connector import ProcConnector
from procwatch.sources.scan import Scan
from procwatch.sources.select import LADDER
from procwatch.sources.taskstats import Taskstats
from procwatch.testing import Collector
from tests.conftest import need
from tests.kernel.test_loss import agent, lost

pytestmark = pytest.mark.usefixtures("no_leaks")
# Each source, how it is led, and where it keeps the descriptor that dies.
SOURCES: dict[str, tuple[Callable[[], list[Source]], Callable[[Any], int]]] = {
    "netlink": (lambda: [ProcConnector()], lambda source: int(source.fileno())),
    "ebpf": (lambda: [Ebpf()], lambda source: int(source.fileno())),
    "scan": (lambda: [Scan()], lambda source: int(source._loadavg)),
    "fanotify": (lambda: [ProcConnector(), Fanotify()], lambda source: int(source._group)),
    "taskstats": (lambda: [ProcConnector(), Taskstats()], lambda source: int(source._socket.fileno())),
}


def closed(fd: int) -> None:
    """
    A program closes a descriptor twice.
    """
    os.close(fd)


def replaced(fd: int) -> None:
    """
    And then opens something else, that gets the number.
    """
    ours, other = socket.socketpair()
    with ours, other:
        os.dup2(ours.fileno(), fd, inheritable=False)


@pytest.mark.parametrize("dies", [closed, replaced])
@pytest.mark.parametrize("name", SOURCES)
async def test_a_source_that_dies_is_opened_anew(
    name: str, dies: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    """
    The gap is told where it is, who was born in it comes with the look that follows, and all later ones as ever.
    """
    monkeypatch.setattr(pipeline, "LOOK_EVERY_NS", 200_000_000)
    make, descriptor = SOURCES[name]
    sources = make()
    watcher = Watcher(sources=sources)
    try:
        watcher.start()
    except SourceUnavailable as error:
        need(False, str(error))
    collector = Collector(watcher)

    async def wait(*kinds: str, **fields: object) -> Any:
        def matches(event: Event) -> bool:
            right = all(getattr(event, field, None) == value for field, value in fields.items())
            return right and (not kinds or event.event in kinds)

        return await collector.wait(matches, timeout_s=30)

    try:
        fd = descriptor(sources[-1])
        dies(fd)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as unseen:
            gap = await wait("lost", where=name)
            await wait(pid=unseen.pid)
            unseen.communicate()
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as later:
            seen = await wait("exec", pid=later.pid)
            later.communicate()
        end = await wait("exit", pid=later.pid)
        if dies is replaced:  # what the program has opened there is not ours to close
            assert stat.S_ISSOCK(os.fstat(fd).st_mode)
            assert fd not in {source.fileno() for source in sources}
            os.close(fd)
    finally:
        watcher.close()
    watcher.raise_failure()
    assert gap.exact is False
    assert gap.since < gap.until
    assert gap.count == (name in ("netlink", "ebpf", "scan"))
    assert seen.argv == ["cat"] or name == "scan"  # which may look in the middle of the exec
    if name == "taskstats":
        assert end.cpu_user_ns is not None


async def test_a_source_that_cannot_be_opened_again_ends_the_watch():
    """
    With one error that says so, after what was seen until then.
    """

    class Dying(ProcConnector):
        """
        Works once.
        """

        opened = 0

        def open(self) -> None:
            if self.opened:
                raise SourceUnavailable(self.name, "no more", "a rest")
            self.opened += 1
            super().open()

    source = Dying()
    watcher = Watcher(sources=[source])
    try:
        watcher.start()
    except SourceUnavailable as error:
        need(False, str(error))
    os.close(source.fileno() or -1)
    subprocess.run(["true"], check=True)
    watcher._turn()
    with pytest.raises(SourceLost, match=r"netlink failed \(Bad file descriptor\).*no more: a rest"):
        [event async for event in watcher]


@contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """
    A process can open nothing meanwhile.
    """
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("backend", LADDER)
def test_no_descriptor_left(backend: str, tmp_path: Path, tiny: Path):
    """
    Processes are told, with the reason why fields are missing, or counted; with descriptors again all is as before.
    """
    with open(tmp_path / "errors", "w") as errors, agent(backend, "--initial", stderr=errors) as running:
        with no_descriptors(running.process.pid):
            storms.storm(str(tiny), 50, "storm")
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as without:
                if backend != "scan":
                    poor = running.read_until("exec", pid=without.pid)
                without.communicate()
            if backend != "scan":
                running.read_until("exit", pid=without.pid)
        while backend == "scan" and sum(gap["count"] for gap in lost(running.lines)) < 45:  # a look may have begun
            running.read_until("lost", where="scan")
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as later:
            rich = running.read_until("exec", pid=later.pid)
            later.communicate()
        running.read_until("exit", pid=later.pid)
        stop = running.finish()

        assert running.process.wait() == 0
    assert (tmp_path / "errors").read_text() == ""
    assert rich["argv"] == ["cat"] or backend == "scan"  # which may look in the middle of the exec
    assert "vanished" not in stop["counts"]
    if backend == "netlink":
        assert poor["argv"] is None
        assert poor["missing"]["argv"] == "pressure"
    elif backend == "ebpf":
        assert (poor["argv"], poor["missing"]) == (["cat"], {})


@pytest.mark.parametrize("backend", LADDER)
def test_two_agents(backend: str, tiny: Path):
    """
    Both tell everything.
    """
    with agent(backend) as first, agent(backend) as second:
        if backend != "scan":
            storms.storm(str(tiny), 300, "storm")
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            for running in (first, second):
                running.read_until("exec", pid=child.pid)
            child.communicate()
        for running in (first, second):
            running.read_until("exit", pid=child.pid)
        if backend != "scan":
            for running in (first, second):
                mine = [line for line in running.lines if line.get("ppid") == os.getpid()]
                told = Counter(line["event"] for line in mine if line["pid"] not in (second.process.pid, child.pid))
                assert (told["exec"], told["exit"]) == (300, 300)
                assert not lost(running.lines)
        first.finish()  # whose end leaves the other one alone
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as later:
            second.read_until("exec", pid=later.pid)
            later.communicate()
        second.finish()
