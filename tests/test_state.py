"""
The table over a restart of the agent: by hand-made processes, and with real ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch import state
from procwatch.clock import Clock
from procwatch.enrich.enricher import Enricher, Remembered
from procwatch.events import Container, Event
from procwatch.facts import Alive, Details
from procwatch.sources import procfs
from procwatch.state import StateError
from procwatch.table.draft import Maker
from procwatch.table.identity import process_id
from procwatch.table.process import Process, make
from procwatch.table.table import Table
from procwatch.watcher import Watcher
from tests.living import living

BOOT = procfs.boot_id().replace("-", "")[:8]
T0 = 1_000_000_000_000
NAMES = ["id", "start_ticks", "ppid", "argv", "argv_truncated", "argv_missing", "ns_pid", "born_ns", "inherited",
         "start_inferred", "ended"]  # fmt: skip


def process(pid: int, parent: Process | None = None, **fields: Any) -> Process:
    details = Details(**{"exe": f"/bin/{pid}", "ppid": parent.pid if parent else 1, "missing": {}, **fields})
    return make(pid, pid * 10, process_id(BOOT, pid, pid * 10), parent, details)


def again(path: Path, *processes: Process) -> dict[int, Process]:
    """
    Processes as they are after a restart.
    """
    state.save(str(path), processes, None)
    loaded = state.load(str(path))
    assert loaded is not None
    return {one.pid: one for one in loaded.processes}


def alive(one: Process, **fields: Any) -> Alive:
    details = {"exe": one.details.exe, "argv": one.argv, "start_ticks": one.start_ticks, "ppid": one.ppid, **fields}
    return Alive(T0 + 1, one.pid, Details(**details))


def resumed(before: list[Process], facts: list[Alive], **options: Any) -> tuple[Table, list[Any]]:
    maker = Maker("h", Clock(offset_ns=0))
    table = Table(boot=BOOT, maker=maker, **options)
    table.snapshot(facts, T0, tell=False, before=before)
    return table, [maker.event(draft) for draft in table.flush(T0)]


class TestFile:
    """
    What is written and read.
    """

    def test_same_again(self, tmp_path: Path):
        """
        Every field that events are made from is the same, also strings that are not UTF-8.
        """
        one = process(7, argv=["a", "b\udcff\x00"], cwd="/\udc80", missing={"exe": "exited"}, inferred=("cwd",), uid=0)
        one.born_ns, one.argv_missing, one.ns_pid, one.start_inferred = 123, "paged_out", 3, True
        found = again(tmp_path / "s", one)[7]

        assert [getattr(found, name) for name in NAMES] == [getattr(one, name) for name in NAMES]
        assert found.details == one.details

    def test_ancestors(self, tmp_path: Path):
        """
        Dead ancestors are kept, others are not; details that processes share are written once.
        """
        old = process(5)
        dead = process(6, old)
        old.ended = dead.ended = True
        children = [process(8, dead), process(9, dead)]
        children[1].details = children[0].details
        found = again(tmp_path / "s", *children)

        assert set(found) == {8, 9}
        assert [ancestor.id for ancestor in found[9].ancestors()] == [dead.id, old.id]
        assert found[8].parent is found[9].parent
        assert found[8].details is found[9].details

    def test_hash(self, tmp_path: Path):
        """
        The hash of an executable that was known is known.
        """
        digest = again(tmp_path / "s", process(7, hash=state.Digest("ab12")))[7].details.hash

        assert digest is not None
        assert (digest.hex, digest.done) == ("ab12", True)

    def test_removed_when_read(self, tmp_path: Path):
        """
        A state is taken up once: what an agent leaves that is killed later would be out of date.
        """
        path = tmp_path / "new" / "s"
        state.save(str(path), [process(7)], None)

        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o750
        assert state.load(str(path)) is not None
        assert state.load(str(path)) is None
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda saved: saved.update(boot_id="other"), "of another boot"),
            (lambda saved: saved.update(pid_namespace=1), "of another boot"),
            (lambda saved: saved.update(version=99), "of another version, 99"),
            (lambda saved: saved["processes"][0].__setitem__(3, 5), "a parent that is not there"),
            (lambda saved: saved["processes"][0].__setitem__(4, 5), "not ours"),
            (lambda saved: saved["details"][0].update(uid="x"), "Expected `int | null`"),
        ],
    )
    def test_not_taken_up(self, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str):
        """
        A state of another boot, or one that is not whole, is refused with its reason, and gone.
        """
        path = tmp_path / "s"
        state.save(str(path), [process(7, uid=1)], None)
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))

        with pytest.raises(StateError, match=reason):
            state.load(str(path))
        assert not path.exists()

    @given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(msgspec.json.encode))
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: bytes):
        """
        Whatever stands in the file, it is a StateError.
        """
        path = tmp_path_factory.getbasetemp() / "any"
        path.write_bytes(data)
        with pytest.raises(StateError):
            state.load(str(path))

    def test_no_place(self, tmp_path: Path):
        """
        A directory that cannot be made is one line.
        """
        (tmp_path / "file").write_text("")
        with pytest.raises(StateError, match=r"^the state is not kept: .*: (Not a directory|File exists)$"):
            state.save(str(tmp_path / "file" / "s"), [], None)


class TestResume:
    """
    What the table makes of it.
    """

    def test_goes_on(self):
        """
        A process that still runs the same is not told of; what /proc cannot say stays, what it says is taken.
        """
        one = process(7, argv=["x"], file="./x", uid=1, cwd="/a")
        table, events = resumed([one], [alive(one, uid=2)])

        assert events == []
        assert table.processes[7] is one
        assert (one.details.file, one.details.uid, one.details.cwd, one.argv) == ("./x", 2, "/a", ["x"])

    def test_argv_from_kernel(self):
        """
        Arguments that were the process's own go on where /proc cannot be read.
        """
        one = process(7)
        one.argv = ["x", "y"]
        table, _ = resumed([one], [alive(one, argv=None, missing={"argv": "permission"})])

        assert (table.processes[7].argv, one.details.missing) == (["x", "y"], {})

    def test_gone(self):
        """
        Who is gone, or whose pid is another's, has vanished.
        """
        one, two = process(7), process(8)
        _, events = resumed([one, two], [alive(two, start_ticks=99_999)])

        assert [(event.event, event.id) for event in events] == [
            ("vanished", one.id),
            ("vanished", two.id),
            ("running", process_id(BOOT, 8, 99_999)),
        ]

    def test_new(self):
        """
        Who was born meanwhile is running; who was born since the sources are open is told of by these.
        """
        one, born, later = process(7), process(8), process(9)
        _, events = resumed([one], [alive(one), alive(born, ppid=7), alive(later, start_ticks=T0 // 10_000_000 + 1)])

        (running,) = events
        assert (running.event, running.id, running.via) == ("running", born.id, "restart")
        assert running.parent.id == one.id

    def test_another_program(self):
        """
        Who executed another program meanwhile is running, with nothing of the one before.
        """
        one = process(7, file="./x")
        _, (running,) = resumed([one], [alive(one, exe="/bin/other")])

        assert (running.via, running.id, running.exe, running.file) == ("restart", one.id, "/bin/other", None)

    def test_another_start(self):
        """
        The start that was taken from a stamp is put right by the look, and with it the id.
        """
        one = process(7)
        one.start_inferred = True
        table, _ = resumed([one], [alive(one, start_ticks=71)])

        assert (table.processes[7].id, one.start_inferred) == (process_id(BOOT, 7, 71), False)

    def test_workers_of_the_kernel(self):
        """
        Threads of the kernel come and go untold.
        """
        kthreadd = process(2)
        _, events = resumed([kthreadd, process(70, kthreadd)], [alive(kthreadd), alive(process(71, kthreadd))])

        assert events == []

    def test_all_told_if_asked(self):
        """
        With `initial` every process that lives is told, once.
        """
        one, two = process(7), process(8)
        maker = Maker("h", Clock(offset_ns=0))
        table = Table(boot=BOOT, maker=maker)
        table.snapshot([alive(one), alive(two)], T0, tell=True, before=[one])

        told = [maker.event(draft) for draft in table.flush(T0)]
        assert [(event.event, event.via) for event in told] == [("running", "snapshot")] * 2  # type: ignore[attr-defined]


def test_containers(tmp_path: Path):
    """
    The names of a container that is still there go on, without a look at disks; of one that is gone they do not.
    """
    mine = procfs.read(os.getpid()).cgroup
    assert mine is not None
    enricher = Enricher()
    try:
        identity = enricher._names.identity(mine)
        if identity is None:
            pytest.skip("no cgroup file system here")
        container = Container("c" * 64, "docker", "web", "img", None)
        kept = [Remembered(mine, mine, identity, container), Remembered("/gone", "/gone", 1, container)]
        enricher.recall(kept)

        assert enricher.place(mine)[0] == container
        assert enricher.remember() == kept[:1]
    finally:
        enricher.close()


async def test_real_processes(tmp_path: Path):
    """
    Over a restart ids go on, a dead parent is still known, who ended has vanished, and who is new is running.
    """
    path = str(tmp_path / "s")

    async def run() -> list[Event]:
        events: list[Event] = []
        watcher = Watcher(backend="scan", events=["exec", "running", "vanished", "exit"])
        watcher.add_sink(events.extend)
        watcher.start(state.load(path))
        watcher.stop()
        watcher.save(path)
        return events

    with living(["cat"]) as before, living(["cat"]) as ends:
        first = Watcher(backend="scan")
        first.start()
        ids = {pid: first.processes[pid].id for pid in (before.pid, ends.pid)}
        parent = first.processes[os.getpid()].id
        first.stop()
        first.save(path)
        ends.kill()
        ends.wait()
        with living(["cat"]) as new:
            events = await run()

    told = {(event.event, getattr(event, "pid", 0)): event for event in events}
    vanished: Any = told["vanished", ends.pid]
    running: Any = told["running", new.pid]
    assert ("running", before.pid) not in told
    assert (vanished.id, vanished.parent.id) == (ids[ends.pid], parent)
    assert (running.via, running.parent.id) == ("restart", parent)
    assert state.load(path) is not None
