"""
The short way from facts to lines gives what the general way gives, to the byte, and leaves the same table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from procwatch.clock import Clock
from procwatch.errors import DecodeError
from procwatch.events import Event
from procwatch.express import Express, Written
from procwatch.facts import Alive, Details, Fact, Lost
from procwatch.formats.native import Lines
from procwatch.sources.ebpf import Walk
from procwatch.table.draft import Draft, Maker
from procwatch.table.process import Process
from procwatch.table.table import Table
from procwatch.wire.bpf_event import Decoder

CAPTURE = (Path(__file__).parent / "captures" / "bpf_ring-6.18.bin").read_bytes()
TICK = 10_000_000
PIDS = range(10, 15)
WITH_FORKS = ("exec", "exit", "fork")
# Two processes are there from the start: an ordinary one, and one whose name is not UTF-8.
SHELL, ODD = 5, 6
EXEC, FORK, EXIT, FAILED = 1, 2, 3, 5


def record(kind: int, pid: int, time_ns: int, start_ns: int, ppid: int, extra: int, body: bytes) -> bytes:
    """
    A record of the ring.
    """
    content = struct.pack("<IIQQII", kind, pid, time_ns, start_ns, ppid, extra) + body
    return struct.pack("<II", len(content), 0) + content + bytes(-len(content) % 8)


def shared(exe: bytes, comm: bytes, flags: int) -> bytes:
    """
    What execs have in common.
    """
    names = (exe[::-1] + b"\0bin\0", b"tmp\0", b"a.slice\0", b"./" + exe)
    head = struct.pack("<QQQ8I32s16s4H", 3, 4, 5, 0, 0, 0, 0, 0xFFFFFFFF, 1, 0, flags, b"", comm, *map(len, names))
    return head + b"".join(names)


def ordinary() -> tuple[bytes, bytes]:
    """
    Two drains: an exec and its exit, then two of the same kind, of which one has an odd parent.
    """
    common = shared(b"x", b"x", 0)
    own = struct.pack("<QIIII", 10, 10, 2, 0, len(common)) + common + b"x\0"
    usage = struct.pack("<QQQQQII16s", 0, 0, 5, 7, 0, 0, 0, b"x")
    first = record(EXEC, 12, 50, 40, SHELL, 4, own) + record(EXIT, 12, 60, 40, SHELL, 0, usage)
    ring = b"".join(
        [
            record(EXEC, 10, 100, 50, SHELL, 4, own),
            record(EXEC, 11, 200, 60, ODD, 4, own),
            record(EXIT, 11, 300, 60, ODD, 0, usage),
            record(EXIT, 10, 400, 50, SHELL, 0, usage),
        ]
    )
    return first, ring


ORDINARY = ordinary()
often = st.integers(0, 9).map(lambda number: number < 8)


@st.composite
def one_record(
    draw: st.DrawFn,
    time_ns: int,
    kinds: Sequence[int],
    pids: Sequence[int] = PIDS,
    ppids: Sequence[int] = (ODD, 99, 2, *PIDS),
) -> bytes:
    """
    Any record, ordinary ones more often.
    """
    kind = draw(st.sampled_from(kinds)) if draw(often) else FAILED
    pid = draw(st.sampled_from(pids))
    start_ns = TICK * (pid if draw(often) else draw(st.integers(1, 3)))
    ppid = SHELL if draw(often) else draw(st.sampled_from(ppids))
    if kind == FORK:
        return record(kind, pid, time_ns, start_ns // TICK, ppid, 0, b"")
    if kind == FAILED:
        return record(kind, pid, time_ns, start_ns, ppid, 3, struct.pack("<II", 2, 0) + b"/no")
    if kind == EXIT:
        status = draw(st.sampled_from([0, 0, 0, 1 << 8, 77 << 8, 11, 0x8B, 9]))
        rss = draw(st.sampled_from([0, 7]))
        # Kernels before 6.16 give the memory back first, and tell what the process ever had.
        no_mm, peak = draw(st.sampled_from([(0, 0), (0, 0), (8, 9), (8, 20)]))
        times = draw(st.sampled_from([(0, 0, 5), (4, 4, 6), (0, 3, 9)]))
        return record(
            kind, pid, time_ns, start_ns, ppid, no_mm, struct.pack("<QQQQQII16s", *times, rss, peak, status, 0, b"c")
        )
    names = draw(
        st.sampled_from([(b"x", b"x", 0)] * 4 + [(b"\xff", b"x", 0), (b"y", b"\xfe", 0), (b"z", b"z", 1 << 6 | 1)])
    )
    common = shared(*names)
    argv = draw(st.sampled_from([b"x\0", b"x\0-l\0", 'ä"\\\n\x1b\0'.encode(), b"\0", b""]) | st.binary(max_size=6))
    flags = draw(st.sampled_from([4] * 6 + [0, 1, 2, 6]))
    ns_pid = pid if draw(often) else draw(st.integers(1, 3))
    own = struct.pack("<QIIII", 10, ns_pid, len(argv), 0 if draw(often) else 8192, len(common))
    return record(kind, pid, time_ns, start_ns, ppid, flags, own + common + argv)


@st.composite
def rings(draw: st.DrawFn, late: bool = True, kinds: Sequence[int] = (EXEC, EXIT, EXEC, EXIT, FORK)) -> list[bytes]:
    """
    The bytes of a few drains, with records a little out of order if `late`, across the turn of a second.
    """
    drains = []
    time_ns = 999_999_000
    for drain in range(draw(st.integers(1, 4))):
        records = []
        for number in range(draw(st.integers(0, 12))):
            time_ns += draw(st.integers(1, 400))
            records.append(draw(one_record(time_ns, kinds)))
            if late and draw(st.integers(0, 3)) == 0:
                # Another CPU was quicker to stamp and slower to write; what concerns one process is always in order.
                records.append(
                    draw(one_record(time_ns - 300, kinds, pids=[1000 + 100 * drain + number], ppids=[SHELL]))
                )
        drains.append(b"".join(records) + (b"" if draw(often) else draw(st.binary(max_size=200))))
    return drains


class Ring:
    """
    A source that gives what it was given.
    """

    def __init__(self) -> None:
        self.decoder = Decoder(peaks=True)
        self.data = b""

    def drain(self, walk: Walk) -> Lost | None:
        """
        In pieces of a few records, as the real one does.
        """
        begin, at = -1, 0
        with suppress(DecodeError):
            while begin < at < len(self.data):
                begin, at = at, walk(self.data, at, len(self.data), 5)
                self.data, at, begin = self.data[at:], 0, -1 if at != begin else 0
        return None

    def took(self, facts: int) -> None:
        """
        Nobody asks for it.
        """

    def read(self) -> list[Fact]:
        """
        Facts as the source gives them.
        """
        facts: list[Fact] = []
        self.drain(lambda data, at, end, most: self.decoder.decode(data, at, end, facts, most))
        facts.sort(key=attrgetter("time_ns"))
        return facts


class Way:
    """
    A table with what writes its lines.
    """

    def __init__(self, kinds: tuple[str, ...], *, express: bool) -> None:
        self.maker = Maker("host 100%d", Clock(offset_ns=0))
        self.lines = Lines(self.maker)
        self.table = Table(boot="0123abcd", maker=self.maker, kinds=kinds)
        known = [
            Alive(1, SHELL, Details(ppid=1, start_ticks=1, exe="/bin/sh", comm="sh", argv=["sh"])),
            Alive(1, ODD, Details(ppid=1, start_ticks=1, exe="/bin/\udcff", comm="\udcfe", argv_truncated=True)),
        ]
        self.table.snapshot(known, 1, tell=False)
        self.ring = Ring()
        self.express: Express | None = None
        if express:
            wanted = {"tells_exit": "exit" in kinds, "tells_fork": "fork" in kinds}
            self.express = Express(self.ring, self.table, self.maker, self.lines, **wanted)
        self.short = 0

    def drafts(self) -> list[Event | Draft]:
        """
        What comes of what is in the ring.
        """
        if self.express is not None:
            return self.express.take()
        self.table.apply(self.ring.read())
        return self.table.flush_drafts(0)

    def write(self, drains: Iterable[bytes]) -> bytes:
        """
        The lines.
        """
        out = bytearray()
        for data in [*drains, None]:
            self.ring.data = data or b""
            items = self.drafts()
            if data is None:
                if self.express is not None:
                    self.express.finish()
                items += self.table.drain_drafts()
            for item in items:
                if isinstance(item, Written):
                    assert item.data.count(b"\n") == item.count
                    assert item.data.count(b'{"event":"exit"') == item.exits
                    assert item.since_ns <= item.until_ns
                    self.short += item.count
                    out += item.data
                else:
                    self.lines.encode_into(item, out)
        return bytes(out)

    def state(self) -> dict[int, dict[str, object]]:
        """
        All that the table knows.
        """
        return {pid: self._known(process) for pid, process in self.table.processes.items()}

    @staticmethod
    def _known(process: Process) -> dict[str, object]:
        # Without what is kept only because it was written once.
        details = structs.replace(process.details, line=None, named=0, unread=None)
        parent = process.parent.id if process.parent is not None else None
        return structs.asdict(process) | {"details": details, "parent": parent, "who": None, "view": None}


@given(rings(), st.sampled_from([("exec", "exit"), ("exec",), ("exec", "vanished"), ("exec", "exit", "exec_failed")]))
@settings(max_examples=200, deadline=None)
def test_both_ways_give_the_same(drains: list[bytes], kinds: tuple[str, ...]):
    """
    Whatever comes, in whatever order.
    """
    general, short = Way(kinds, express=False), Way(kinds, express=True)

    assert short.write(drains) == general.write(drains)
    assert short.state() == general.state()


@given(rings(late=False, kinds=(FORK, FORK, EXEC, EXEC, EXIT)))
@settings(max_examples=200, deadline=None)
def test_both_ways_give_the_same_with_forks(drains: list[bytes]):
    """
    A fork that waits for its exec holds back what comes after it; whether that comes in the same drain, or never.
    """
    general, short = Way(WITH_FORKS, express=False), Way(WITH_FORKS, express=True)

    assert short.write(drains) == general.write(drains)
    assert short.state() == general.state()


@st.composite
def storms(draw: st.DrawFn, forks: bool) -> list[bytes]:
    """
    Children of one shell, some side by side: forks (if wanted), execs and exits, in drains that end anywhere.
    """
    records = []
    time_ns = 200_000_000
    lives: list[list[int]] = []
    for pid in range(1000, 1000 + draw(st.integers(3, 10))):
        lives.append([pid, draw(st.sampled_from([0, 0, 0, 0, 1, 2] if forks else [0]))])
    alive: list[list[int]] = []
    while lives or alive:
        if lives and (not alive or draw(st.integers(0, 2)) == 0):
            alive.append([*lives.pop(0), 0 if forks else 1])
        time_ns += draw(st.integers(1, 400))
        life = draw(st.sampled_from(alive))
        pid, kind, step = life
        # 0: it executes something; 1: it never does; 2: it is in another cgroup.
        if step == 0:
            records.append(record(FORK, pid, time_ns, pid, SHELL, 2 * (kind == 2), b"a\0"[: 2 * (kind == 2)]))
        elif step == 1 and kind != 1:
            common = shared(b"x", b"x", 0)
            own = struct.pack("<QIIII", 10, pid, 2, 0, len(common)) + common + b"x\0"
            records.append(record(EXEC, pid, time_ns, TICK * pid, SHELL, 4, own))
        else:
            no_mm, rss, peak = draw(st.sampled_from([(0, 7, 0), (0, 0, 0), (8, 0, 10), (8, 0, 20)]))
            stime, status = draw(st.sampled_from([(0, 0), (0, 0), (4, 0), (0, 77 << 8)]))
            usage = struct.pack("<QQQQQII16s", 0, stime, 5, rss, peak, status, 0, b"x")
            records.append(record(EXIT, pid, time_ns, TICK * pid, SHELL, no_mm, usage))
            alive.remove(life)
        life[2] += 1
    cuts = sorted(draw(st.lists(st.integers(0, len(records)), max_size=4)))
    return [b"".join(records[a:b]) for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]


@given(st.sampled_from([WITH_FORKS, ("exec", "exit")]), st.data())
@settings(max_examples=200, deadline=None)
def test_storms(kinds: tuple[str, ...], data: st.DataObject):
    """
    A drain that ends between a fork and its exec costs no line, and no order.
    """
    general, short = Way(kinds, express=False), Way(kinds, express=True)
    drains = [drain for drain in data.draw(storms("fork" in kinds)) if drain]

    assert short.write(drains) == general.write(drains)
    assert short.state() == general.state()


def test_a_real_ring():
    """
    Records of real processes, as the kernel wrote them.
    """
    general, short = Way(("exec", "exit"), express=False), Way(("exec", "exit"), express=True)

    assert short.write([CAPTURE]) == general.write([CAPTURE])


def test_the_ordinary_goes_the_short_way():
    """
    An exec of a new process and its end, whoever else did something odd in between; but for the first of a kind.
    """
    short = Way(("exec", "exit"), express=True)

    assert short.write(ORDINARY) == Way(("exec", "exit"), express=False).write(ORDINARY)
    assert short.short == 2
