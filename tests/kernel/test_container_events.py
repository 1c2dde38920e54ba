"""
Events of real containers: each process, however short, is in its container, and nothing stays without a name for ever.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from procwatch.events import ContainerEvent, Exec
from tests.kernel.conftest import Watch, watching
from tests.kernel.test_containers import Podman, bundle, need_programs, podman, rootfs

__all__ = ["podman", "rootfs"]  # fixtures

COMPLETE = ("ebpf", "netlink")
COMMAND = ["/bin/sh", "-c", "sleep 0.5; /tiny; :"]
LOOP = "i=0; while [ $i -lt 50 ]; do /tiny $i; i=$((i+1)); done"


@pytest.fixture
def with_tiny(rootfs: Path, tiny: Path) -> Path:
    """
    The root file system with the smallest program in it.
    """
    shutil.copy(tiny, rootfs / "tiny")
    return rootfs


async def run(*argv: str | Path) -> None:
    """
    Run a command to its end, its input closed.
    """
    process = await asyncio.create_subprocess_exec(*map(str, argv), stdin=subprocess.DEVNULL)
    assert await process.wait() == 0


async def tinies(watch: Watch, count: int) -> list[Any]:
    """
    The execs of /tiny, once so many of them have ended.
    """
    ended = 0

    def last(event: Any) -> bool:
        nonlocal ended
        ended += bool(event.event == "exit" and event.exe == "/tiny")
        return ended == count

    await watch.wait(last)
    return [event for event in watch.collector.events if isinstance(event, Exec) and event.exe == "/tiny"]


@pytest.mark.parametrize("backend", COMPLETE)
async def test_fifty_short_programs_in_a_podman_container(backend: str, podman: Podman, with_tiny: Path):
    """
    50 of 50 programs that live 100 µs have the container's id; its names are announced once, and then on each event.
    """
    name = f"shop-{backend}-{os.getpid()}"
    async with watching(backend, roots=podman.roots) as watch:
        await run(*podman.run("--name", name, "--rootfs", str(with_tiny), "sh", "-c", LOOP))
        execs = await tinies(watch, 50)
        announced = await watch.wait(lambda event: isinstance(event, ContainerEvent) and event.container.name == name)
    assert len(execs) == 50
    assert {event.container and event.container.id for event in execs} == {announced.container.id}
    assert {event.container.runtime for event in execs} == {"podman"}
    assert {event.container.name for event in execs if event.time > announced.time} <= {name}


@pytest.mark.parametrize("backend", COMPLETE)
async def test_fifty_short_programs_in_a_plain_container(backend: str, tmp_path: Path, with_tiny: Path):
    """
    Where the path of the cgroup does not say that it is a container's, 50 of 50 have its id, too.
    """
    need_programs("runc")
    name = f"bare-{backend}-{os.getpid()}"
    directory = bundle(tmp_path / name, with_tiny, "sh", "-c", LOOP + "; sleep 0.5")
    async with watching(backend) as watch:
        await run("runc", "run", "--bundle", directory, name)
        execs = await tinies(watch, 50)
    assert {event.container and event.container.id for event in execs} == {name}


@pytest.mark.parametrize("backend", COMPLETE)
async def test_complete_lines_for_who_can_wait(backend: str, podman: Podman, with_tiny: Path):
    """
    With container_wait_ms no event of the container goes out before its name is known.
    """
    name = f"patient-{backend}-{os.getpid()}"
    async with watching(backend, roots=podman.roots, container_wait_ms=5000) as watch:
        await run(*podman.run("--name", name, "--rootfs", str(with_tiny), "sh", "-c", LOOP + "; sleep 0.5"))
        execs = await tinies(watch, 50)
    assert {event.container and event.container.name for event in execs} == {name}


@pytest.mark.parametrize("backend", COMPLETE)
async def test_the_first_program_of_a_runc_container_is_in_it(backend: str, tmp_path: Path, with_tiny: Path):
    """
    runc's own steps move the process into the cgroup before it executes the program: that one is in the container.
    """
    need_programs("runc")
    name = f"plain-{backend}-{os.getpid()}"
    directory = bundle(tmp_path / name, with_tiny, *COMMAND)
    async with watching(backend, container_wait_ms=5000) as watch:
        await run("runc", "run", "--bundle", directory, name)
        first = await watch.wait(lambda event: isinstance(event, Exec) and event.argv == COMMAND)
        (last,) = await tinies(watch, 1)
    assert first.container is not None
    assert (first.container.id, first.container.runtime) == (name, "runc")
    assert last.container == first.container
    assert last.parent.pid == first.pid
