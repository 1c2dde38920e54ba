"""
Places are answered at once, names follow and are announced once, and nothing grows without end.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from procwatch.enrich.enricher import Enricher
from procwatch.enrich.runtimes import Roots
from procwatch.enrich.worker import Worker
from procwatch.events import Container

A = "3f4e9c1ab0d27786e5a1c90b8d7f6e5d4c3b2a190817f6e5d4c3b2a1908f7e6d"


class Waiting:
    """
    An enricher, and everything that it has announced.
    """

    def __init__(self, enricher: Enricher, ready: threading.Event) -> None:
        self.enricher = enricher
        self.announced: list[tuple[Container, str]] = []
        self._ready = ready

    def until(self, condition: Callable[[], object]) -> None:
        """
        Collect what comes until `condition` holds.
        """
        self.announced += self.enricher.collect()
        while not condition():
            assert self._ready.wait(30)
            self._ready.clear()
            self.announced += self.enricher.collect()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Callable[..., Waiting]]:
    """
    Make enrichers of a host that is in `tmp_path`.
    """
    made: list[Enricher] = []

    def make(capacity: int = 8192) -> Waiting:
        ready = threading.Event()
        made.append(Enricher(roots=Roots(prefix=str(tmp_path)), on_ready=ready.set, capacity=capacity))
        return Waiting(made[-1], ready)

    yield make
    for enricher in made:
        enricher.close()


def docker(root: Path, name: str, identity: str = A) -> str:
    """
    Make the files of a Docker container; its cgroup.
    """
    directory = root / f"var/lib/docker/containers/{identity}"
    directory.mkdir(parents=True)
    temporary = directory / "new"
    temporary.write_text(json.dumps({"ID": identity, "Name": f"/{name}", "Config": {"Image": "nginx"}}))
    temporary.rename(directory / "config.v2.json")
    return f"/docker/{identity}"


def test_no_thread_without_containers(waiting: Callable[..., Waiting]) -> None:
    """
    Services and sessions start no thread.
    """
    before = threading.active_count()
    enricher = waiting().enricher
    assert enricher.place("/system.slice/ssh.service") == (None, "ssh.service", None)
    assert enricher.place("/user.slice/user-7.slice/user@7.service/app.slice/x.scope")[1:] == ("x.scope", 7)
    assert enricher.place(None) == enricher.place("/") == (None, None, None)
    assert not enricher.pending("/system.slice/ssh.service")
    assert threading.active_count() <= before + 1  # a user's scope may be a container's


def test_names_follow(tmp_path: Path, waiting: Callable[..., Waiting]) -> None:
    """
    First the id alone; then the names, announced once, also for directories inside.
    """
    cgroup = docker(tmp_path, "web")
    seen = waiting()
    assert seen.enricher.place(cgroup) == (Container(A, "docker", None, None, None), None, None)
    assert seen.enricher.pending(cgroup)
    seen.until(lambda: not seen.enricher.pending(cgroup))
    named = Container(A, "docker", "web", "nginx", None)
    assert seen.enricher.place(cgroup)[0] == named
    assert seen.enricher.place(cgroup + "/init.scope")[0] == named
    seen.until(lambda: not seen.enricher.pending(cgroup + "/init.scope"))
    assert seen.announced == [(named, cgroup)]


def test_files_that_come_late(tmp_path: Path, waiting: Callable[..., Waiting]) -> None:
    """
    A container whose files appear after its first process is looked up again.
    """
    seen = waiting()
    cgroup = f"/docker/{A}"
    seen.enricher.place(cgroup)
    docker(tmp_path, "web")
    seen.until(lambda: seen.announced)
    assert seen.enricher.place(cgroup)[0] == Container(A, "docker", "web", "nginx", None)


def test_unknown_container_stays_an_id(waiting: Callable[..., Waiting]) -> None:
    """
    A container that no file knows keeps its id, and stops being awaited.
    """
    seen = waiting()
    cgroup = f"/docker/{A}"
    seen.enricher.place(cgroup)
    seen.until(lambda: not seen.enricher.pending(cgroup))
    assert seen.enricher.place(cgroup)[0] == Container(A, "docker", None, None, None)
    assert seen.announced == []


def test_thousand_containers(tmp_path: Path, waiting: Callable[..., Waiting], no_leaks: None) -> None:
    """
    1000 containers are all named, and of no more than the capacity anything is kept.
    """
    seen = waiting(capacity=100)
    for number in range(1000):
        identity = f"{number:064x}"
        cgroup = docker(tmp_path, f"web-{number}", identity)
        seen.enricher.place(cgroup)
        seen.enricher.place(cgroup + "/init.scope")
        seen.until(partial(is_settled, seen.enricher, cgroup))
    seen.until(lambda: not seen.enricher.stats()["pending"])
    assert [container.name for container, _ in seen.announced] == [f"web-{number}" for number in range(1000)]
    stats = seen.enricher.stats()
    assert stats["cgroups"] == 100
    assert stats["containers"] <= 100
    assert stats["refused"] == 0


def test_user(waiting: Callable[..., Waiting]) -> None:
    """
    Users have names, and nobody has none.
    """
    enricher = waiting().enricher
    assert enricher.user(0) == "root"
    assert enricher.user(None) is None


def test_worker_refuses_beyond_its_capacity() -> None:
    """
    Jobs that do not fit are refused and counted; one that fails does not end the thread.
    """
    gate, done = threading.Event(), threading.Event()
    worker = Worker("test", capacity=2)
    assert worker.submit(lambda: assert_true(gate.wait(30)))
    while worker.submit(lambda: assert_true(False)):  # the first one may have been taken out already
        pass
    assert worker.refused == 1
    gate.set()
    while not worker.submit(done.set):
        pass
    assert done.wait(30)
    worker.close()
    assert not worker.submit(done.set)
    assert worker.peak == 2


def is_settled(enricher: Enricher, cgroup: str) -> bool:
    """
    Nothing more is awaited.
    """
    return not enricher.pending(cgroup)


def assert_true(value: bool) -> None:
    """
    For a job.
    """
    assert value


def test_close_is_final(tmp_path: Path, waiting: Callable[..., Waiting], no_leaks: None) -> None:
    """
    After `close` no thread is left, and questions are still answered.
    """
    before = threading.active_count()
    enricher = waiting().enricher
    cgroup = docker(tmp_path, "web")
    enricher.place(cgroup)
    enricher.user(os.getpid() + 10_000_000)
    enricher.close()
    assert threading.active_count() == before
    assert enricher.place(cgroup)[0] is not None
