"""
Storms of processes that live some 100 µs: nothing is missed, nothing is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from procwatch.events import Exec, Exit
from tests.kernel.conftest import Watch, watching

# Spawns argv[3:] with a number appended, argv[1] times, in the directory argv[2].
SPAWN = """
import os, sys
count, directory, *argv = sys.argv[1:]
os.chdir(directory)
for number in range(int(count)):
    os.waitpid(os.posix_spawn(argv[0], [*argv, str(number)], {}), 0)
"""
SIDE_BY_SIDE = 4


def storm(count: int, directory: Path, *argv: str) -> subprocess.Popen[bytes]:
    """
    Begin to run a program so many times, one after the other.
    """
    return subprocess.Popen([sys.executable, "-c", SPAWN, str(count), str(directory), *argv])


async def weather(watch: Watch, storms: list[subprocess.Popen[bytes]]) -> tuple[list[Exec], list[Exit]]:
    """
    The execs and exits of the children of storms, once the storms are over.
    """
    for process in storms:
        await watch.events_of(process.pid, process.wait)
    pids = {process.pid for process in storms}
    told = [event for event in watch.collector.events if isinstance(event, Exec | Exit) and event.ppid in pids]
    execs = [event for event in told if isinstance(event, Exec)]
    return execs, [event for event in told if isinstance(event, Exit)]


CASES = {
    "absolute": (3000, "{tiny}", 1),
    "relative": (1000, "./{name}", 1),
    "linked": (1500, "/bin/true", 1),
    "side by side": (1000, "{tiny}", SIDE_BY_SIDE),
}


@pytest.mark.parametrize("case", CASES)
async def test_on_ebpf_all_is_known_of_all(case: str, tiny: Path):
    """
    Every exec has its exact path, arguments, directory and cgroup; every end is joined to it; nothing is lost.
    """
    count, name, at_once = CASES[case]
    program = name.format(tiny=tiny, name=tiny.name)
    async with watching("ebpf") as watch:
        storms = [storm(count, tiny.parent, program) for _ in range(at_once)]
        execs, exits = await weather(watch, storms)
        stats = watch.watcher.stats()
    assert (len(execs), len(exits), stats.lost) == (count * at_once, count * at_once, 0)
    assert {event.exe for event in execs} == {os.path.realpath(tiny.parent / program)}
    assert {event.cwd for event in execs} == {str(tiny.parent)}
    assert all(event.cgroup is not None and not event.inferred and not event.missing for event in execs)
    numbers = Counter(event.argv[-1] for event in execs if event.argv)
    assert numbers == {str(number): at_once for number in range(count)}
    assert all(event.argv and event.argv[0] == program and event.code == 0 for event in exits)
    assert {event.id for event in execs} == {event.id for event in exits}


@pytest.mark.parametrize("case", CASES)
async def test_on_netlink_every_file_is_known(case: str, tiny: Path):
    """
    Without a program in the kernel every exec is told, and its file is exact: fanotify has it, however short it lived.
    """
    count, name, at_once = CASES[case]
    program = name.format(tiny=tiny, name=tiny.name)
    async with watching("netlink") as watch:
        storms = [storm(count, tiny.parent, program) for _ in range(at_once)]
        execs, exits = await weather(watch, storms)
    assert (len(execs), len(exits)) == (count * at_once, count * at_once)
    paths = Counter(event.exe for event in execs)
    assert paths[os.path.realpath(tiny.parent / program)] >= 0.999 * len(execs)
    assert set(paths) <= {os.path.realpath(tiny.parent / program), None}
    assert all(event.duration_ns is not None and event.cpu_user_ns is not None for event in exits)
