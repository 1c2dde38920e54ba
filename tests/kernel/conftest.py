"""
One test for every backend that runs here.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from procwatch import SourceUnavailable, Watcher
from procwatch.events import Event
from procwatch.sources.select import LADDER
from procwatch.testing import Collector
from tests.conftest import need

EMULATED = "QEMU TCG" in Path("/proc/cpuinfo").read_text()
# Each rung, and those that several sources make up also with their lead alone, where a test does not take a second.
BACKENDS: dict[str, dict[str, Any]] = {}
for _rung, _sources in LADDER.items():
    BACKENDS[_rung] = {"backend": _rung}
    if len(_sources) > 1 and not EMULATED:
        BACKENDS[f"{_rung} alone"] = {"backend": _rung, "without": [name for name, _ in _sources[1:]]}


def times(count: int) -> int:
    """
    How often to do what shows the same each time: an emulated machine takes ten times as long.
    """
    return count // 5 if EMULATED else count


class Watch:
    """
    A running watcher, what it told, and processes for it to watch.
    """

    def __init__(self, backend: str, watcher: Watcher) -> None:
        self.backend = backend
        self.watcher = watcher
        self.collector = Collector(watcher)

    async def run(self, argv: Sequence[Any], **options: Any) -> list[Any]:
        """
        Run a command to its end, and give all events of its process.
        """
        with subprocess.Popen(argv, **options) as process:
            return await self.events_of(process.pid, process.wait)

    async def events_of(self, pid: int, reap: Callable[[], object] = lambda: None) -> list[Any]:
        """
        All events of one process, once its end is told; `reap` waits for it meanwhile.
        """
        ended = asyncio.create_task(self.wait(lambda event: event.event == "exit" and getattr(event, "pid", 0) == pid))
        await asyncio.to_thread(reap)
        await ended
        return [event for event in self.collector.events if getattr(event, "pid", 0) == pid]

    async def wait(self, matches: str | Callable[[Event], bool]) -> Any:
        """
        The first event that matches.
        """
        return await self.collector.wait(matches, timeout_s=30)


@asynccontextmanager
async def watching(backend: str, **options: Any) -> AsyncIterator[Watch]:
    """
    A watcher with one of BACKENDS; skips where that cannot run.
    """
    watcher = Watcher(**BACKENDS[backend], **options)
    try:
        watcher.start()
    except SourceUnavailable as error:
        need(False, str(error))
    try:
        yield Watch(backend, watcher)
    finally:
        watcher.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """
    The name of each backend in turn.
    """
    name: str = request.param
    return name


@pytest.fixture
async def watch(backend: str) -> AsyncIterator[Watch]:
    """
    A running watcher of each backend in turn.
    """
    async with watching(backend, ancestors=20) as running:
        yield running


_THREADS = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>

static char **args;

static void *run(void *unused)
{
    usleep(150000);
    if (args[2])
        execv(args[2], args + 2);
    else
        _exit(atoi(args[1]));
    return unused;
}

/* threads CODE [PROGRAM ARGUMENT...]: the first thread leaves after 50 ms, and the second one ends the process with
   CODE 100 ms later, or runs a program while the first one waits. */
int main(int argc, char **argv)
{
    pthread_t thread;
    args = argv;
    pthread_create(&thread, NULL, run, NULL);
    if (argc > 2)
        pthread_join(thread, NULL);
    usleep(50000);
    syscall(SYS_exit, 0);
}
"""


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A program whose second thread outlives the first, or executes another program.
    """
    path = tmp_path_factory.mktemp("threads") / "threads"
    try:
        subprocess.run(["gcc", "-pthread", "-o", path, "-x", "c", "-"], input=_THREADS, text=True, check=True)
    except FileNotFoundError:
        need(False, "needs gcc")
    return path
