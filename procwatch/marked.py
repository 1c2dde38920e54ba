"""
Children that are hard to see: what `procwatch doctor` shows to each source.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from msgspec import Struct

from procwatch import storms
from procwatch.events import ProcessEvent
from procwatch.sources import procfs

PATIENCE_S = 0.5
STEP_S = 0.002
_MEMFD = "/memfd:procwatch-doctor"
_FROM_A_THREAD = (
    "import os, sys, threading; threading.Thread(target=os.execv, args=(sys.argv[1], sys.argv[1:])).start()"
)
Seen = Callable[[ProcessEvent], bool]


class Case(Struct, frozen=True):
    """
    A child, and how to know that it was seen as it is.
    """

    name: str
    pid: int
    exe: str
    seen: Seen  # whether the event of its exec is right


@contextmanager
def waiting(tiny: str) -> Iterator[list[Case]]:
    """
    Children that have executed their program by now, and wait until the end of the block.

    Args:
        tiny: See storms.installed().
    """
    with ExitStack() as stack:
        children = Children(tiny)
        stack.callback(children.release)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="procwatch-"))
        python = [sys.executable, "-I", "-S", "-c", "input()"]
        children.start("ordinary", python, exe=os.readlink("/proc/self/exe"))
        children.start("relative", [f"./{os.path.basename(tiny)}"], cwd=os.path.dirname(tiny))
        script = os.path.join(directory, "script")
        storms.write(script, f"#!{tiny}\n".encode())
        children.start("script", [script])
        memory = os.memfd_create(_MEMFD.removeprefix("/memfd:"))
        stack.callback(os.close, memory)
        with open(tiny, "rb") as file:
            os.write(memory, file.read())
        children.start("memfd", [f"/proc/self/fd/{memory}"], exe=_MEMFD, pass_fds=(memory,))
        children.start("thread", [sys.executable, "-I", "-S", "-c", _FROM_A_THREAD, tiny])
        cgroup = stack.enter_context(fresh_cgroup())
        if cgroup is not None:
            name = os.path.basename(cgroup)
            join = f'echo $$ >"{cgroup}/cgroup.procs" && exec "{tiny}"'
            children.start("cgroup", ["/bin/sh", "-c", join], right=lambda event: name in (event.cgroup or ""))
        children.await_execs()
        try:
            yield children.cases
        finally:
            children.release()


class Children:
    """
    Started one after the other, let go together.
    """

    def __init__(self, tiny: str) -> None:
        self.cases: list[Case] = []
        self._tiny = tiny
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        name: str,
        argv: list[str],
        *,
        exe: str | None = None,
        right: Seen = lambda event: True,
        cwd: str | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """
        Another child; none where such a one cannot be (no shell, a directory mounted noexec).
        """
        path = exe or self._tiny
        null = subprocess.DEVNULL
        try:
            child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd=cwd, pass_fds=pass_fds, env={}
            )
        except OSError:
            return
        self._running.append(child)
        self.cases.append(Case(name, child.pid, path, lambda event: event.exe == path and right(event)))

    def await_execs(self) -> None:
        """
        Wait until all run what they are to run.
        """
        deadline = time.monotonic() + PATIENCE_S
        for case in self.cases:
            while procfs.read(case.pid).exe != case.exe and time.monotonic() < deadline:
                time.sleep(STEP_S)

    def release(self) -> None:
        """
        Let all end, one of them by a signal, and wait for it.
        """
        if self._running:
            self._running[0].kill()
        while self._running:
            self._running.pop().communicate()


@contextmanager
def fresh_cgroup() -> Iterator[str | None]:
    """
    The directory of a new cgroup below our own, where we may make one; removed afterwards.
    """
    directory = None
    for parent in own_cgroups():
        directory = os.path.join(parent, f"procwatch-doctor-{os.getpid()}")
        try:
            os.mkdir(directory)
            break
        except OSError:
            directory = None
    yield directory
    deadline = time.monotonic() + PATIENCE_S
    while directory is not None:
        try:
            os.rmdir(directory)
            return
        except OSError:  # the last process of it is being buried
            if time.monotonic() > deadline:
                return
            time.sleep(STEP_S)


def own_cgroups() -> list[str]:
    """
    Directories of the cgroups that we are in, those that events name first: v1 pids, then v2.
    """
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    found = []
    for _, controllers, path in sorted(lines, key=lambda line: line[1] != "pids"):
        if controllers in ("pids", ""):
            mounts = ["pids"] if controllers else ["", "unified"]
            found += [os.path.join("/sys/fs/cgroup", mount, path.lstrip("/")) for mount in mounts]
    return [directory for directory in found if os.path.exists(os.path.join(directory, "cgroup.procs"))]
