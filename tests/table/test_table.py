"""
The table: facts in, events out. The clock is a number, the facts are made by hand.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import KINDS, Event, ProcessEvent
from procwatch.facts import (
    EXITED,
    LOST,
    NOT_REPORTED,
    Accounted,
    Alive,
    Changed,
    Details,
    Exec,
    ExecFailed,
    Exit,
    Fact,
    Fork,
    Gone,
    Lost,
    Opened,
    Thread,
    Usage,
)
from procwatch.table.draft import Maker
from procwatch.table.identity import NS_PER_TICK
from procwatch.table.table import HOLD_NS, MAX_HELD_EVENTS, Table

MS = 1_000_000
BOOT = "0123abcd"
SHELL = 100  # a pid that is there at the start
T0 = 1_000 * 1_000_000_000


def at(ms: float) -> int:
    """
    A time after the start.
    """
    return T0 + int(ms * MS)


class Bench:
    """
    A table with a shell in it, and a clock that stands where the test puts it.
    """

    def __init__(self, *, look: Callable[[int], Details] | None = None, **options: Any) -> None:
        self.maker = Maker("h", Clock(offset_ns=0))
        self.table = Table(boot=BOOT, maker=self.maker, look=look, **options)
        self.shell = details("/bin/sh", ["sh"], uid=7, start_ticks=50, ppid=1)
        self.table.snapshot([Alive(T0, SHELL, self.shell)], T0, tell=False)
        assert self.table.flush(T0) == []

    def take(self, *facts: Fact, now: float = 0) -> list[Any]:
        """
        Apply facts, and give what is decided at `now` milliseconds.
        """
        self.table.apply(facts)
        return self.table.flush(at(now))

    def end(self) -> list[Any]:
        """
        All that is left.
        """
        return [self.maker.event(draft) for draft in self.table.drain()]


def details(exe: str | None = "/bin/x", argv: list[str] | None = None, **fields: Any) -> Details:
    """
    What a look at a process gives.
    """
    return Details(exe=exe, argv=argv or ["x"], **{"comm": exe and exe[-15:], "uid": 7, "cwd": "/", **fields})


def fork(pid: int, ms: float = 1, ppid: int = SHELL, **fields: Any) -> Fork:
    return Fork(at(ms), pid, ppid, **fields)


def execute(pid: int, ms: float = 2, what: Details | None = None, **fields: Any) -> Exec:
    return Exec(at(ms), pid, what, **fields)


def leader(pid: int, ms: float = 3, status: int = 0) -> Thread:
    """
    The end of a process's first thread, as netlink tells it.
    """
    return Thread(at(ms), pid, pid, False, status)


def thread(pid: int, tid: int, ms: float, *, born: bool, status: int = 0) -> Thread:
    return Thread(at(ms), pid, tid, born, status)


def kinds(found: Iterable[Event]) -> list[str]:
    return [event.event for event in found]


def ticks(ms: float) -> int:
    return at(ms) // NS_PER_TICK


# The rows of the table's docstring


def test_fork_exec_exit_is_one_exec_and_one_exit():
    """
    f x e: the exec tells the fork.
    """
    bench = Bench()
    started, ended = bench.take(fork(5), execute(5, 2, details("/bin/ls", ["ls", "-l"])), leader(5, 9, 3 << 8))
    assert (started.event, started.forked, started.exe, started.argv) == ("exec", True, "/bin/ls", ["ls", "-l"])
    assert (ended.event, ended.exe, ended.argv, ended.code, ended.signal) == ("exit", "/bin/ls", ["ls", "-l"], 3, None)
    assert ended.id == started.id
    assert ended.duration_ns == 8 * MS


def test_fork_exit_is_a_fork_and_an_exit():
    """
    f e: the child that never executed shows what it has of its parent, and that it was deduced.
    """
    bench = Bench()
    born, ended = bench.take(fork(5), leader(5))
    assert (born.event, ended.event) == ("fork", "exit")
    for event in (born, ended):
        assert (event.exe, event.argv, event.uid) == ("/bin/sh", ["sh"], 7)
        assert {"exe", "argv", "uid", "id"} <= set(event.inferred)
        assert event.missing.keys() <= {"cpu_user_ns", "cpu_system_ns", "max_rss_bytes"}


def test_a_fork_is_told_when_the_hold_is_over():
    """
    f, hold over: and not before; the deadline says when.
    """
    bench = Bench()
    assert bench.take(fork(5, 0), now=99) == []
    assert bench.table.deadline_ns() == T0 + HOLD_NS
    assert kinds(bench.take(now=100)) == ["fork"]
    assert bench.table.deadline_ns() is None


def test_an_exec_after_the_hold_is_over_does_not_tell_the_fork_again():
    """
    f, hold over, x: both, each once.
    """
    bench = Bench()
    assert kinds(bench.take(fork(5, 0), now=100)) == ["fork"]
    (started,) = bench.take(execute(5, 150, details()), now=151)
    assert (started.event, started.forked) == ("exec", None)


def test_an_exec_chain_in_one_pid_is_one_process():
    """
    f x x e: two execs, one id, one exit with what the last one said.
    """
    bench = Bench()
    chain = bench.take(fork(5), execute(5, 2, details("/bin/a")), execute(5, 3, details("/bin/b")), leader(5, 4))
    assert kinds(chain) == ["exec", "exec", "exit"]
    assert [event.exe for event in chain] == ["/bin/a", "/bin/b", "/bin/b"]
    assert [event.forked for event in chain[:2]] == [True, None]
    assert len({event.id for event in chain}) == 1


def test_an_exec_of_an_unknown_pid_finds_its_parent_in_proc():
    """
    x (pid unknown): its fork was lost; the parent is what /proc says.
    """
    bench = Bench()
    (started,) = bench.take(execute(5, 2, details("/bin/a", start_ticks=123, ppid=SHELL)))
    assert (started.event, started.exe, started.ppid, started.parent.pid) == ("exec", "/bin/a", SHELL, SHELL)
    assert started.id == f"{BOOT}-5-123"
    assert started.forked is None


def test_an_unread_exec_of_an_unknown_pid_says_that_all_is_lost():
    """
    x (pid unknown, and gone): nothing is guessed, the id neither.
    """
    bench = Bench()
    (started,) = bench.take(execute(5))
    assert (started.exe, started.uid, started.parent) == (None, None, None)
    assert started.missing["id"] == LOST
    assert started.missing["uid"] == LOST
    assert started.missing["exe"] == EXITED


def test_a_second_fork_of_a_pid_ends_the_first():
    """
    f f (same pid): the exit was lost, the first one vanished, and the new one has another identity.
    """
    bench = Bench()
    first = bench.take(fork(5), execute(5, 2, details("/bin/old")))[0]
    found = bench.take(fork(5, 900), execute(5, 901, details("/bin/new")))
    assert [(event.event, event.exe) for event in found] == [("vanished", "/bin/old"), ("exec", "/bin/new")]
    assert found[0].id == first.id != found[1].id


def test_an_exit_of_an_unknown_pid_tells_what_it_can():
    """
    e (pid unknown): an exit with its status; the rest, its duration too, is null.
    """
    bench = Bench()
    (ended,) = bench.take(leader(5, 3, 9))
    assert (ended.event, ended.signal, ended.code, ended.exe) == ("exit", 9, None, None)
    assert ended.duration_ns is None
    assert ended.missing["duration_ns"] == LOST
    assert ended.missing["id"] == LOST


def test_an_exit_from_before_the_start_is_not_told():
    """
    What ended while we were opening the sources is no event of ours.
    """
    assert Bench().take(Thread(T0 - 1, 5, 5, False, 0)) == []


# Identity


def test_the_id_is_boot_pid_and_start_tick():
    """
    Where only the stamp of the fork is known, the tick is derived from it, and marked.
    """
    bench = Bench(hold_ns=0)
    (derived,) = bench.take(fork(5, 25))
    assert derived.id == f"{BOOT}-5-{ticks(25)}"
    assert "id" in derived.inferred
    (known,) = bench.take(fork(6, 25, start_ticks=4242))
    assert known.id == f"{BOOT}-6-4242"
    assert "id" not in known.inferred


def test_a_start_that_was_read_replaces_the_derived_one():
    """
    The stamp may be across a tick from the start: /proc is right, and it is still the same process.
    """
    bench = Bench()
    (started,) = bench.take(fork(5, 10), execute(5, 11, details(start_ticks=ticks(10) - 1), read_ns=at(12)))
    assert started.id == f"{BOOT}-5-{ticks(10) - 1}"
    assert started.exe == "/bin/x"
    assert started.forked is True
    assert "id" not in started.inferred


def test_details_of_another_process_under_the_pid_are_not_taken():
    """
    The pid was used again before /proc was read: what was read is somebody else's.
    """
    bench = Bench()
    (started,) = bench.take(fork(5, 10), execute(5, 11, details("/bin/other", start_ticks=9999), read_ns=at(5000)))
    assert started.exe is None
    assert started.missing["exe"] == EXITED
    assert started.id == f"{BOOT}-5-{ticks(10)}"


def test_pid_reuse_after_an_exit_gives_another_id():
    """
    Two processes with one pid are two processes.
    """
    bench = Bench()
    first = bench.take(fork(5, 10), execute(5, 11, details()), leader(5, 12))
    second = bench.take(fork(5, 500), execute(5, 501, details()), leader(5, 502))
    assert len({event.id for event in first}) == len({event.id for event in second}) == 1
    assert first[0].id != second[0].id


# Order and the hold


def test_a_held_fork_holds_back_what_came_after_it():
    """
    Events leave in the order of the kernel's time.
    """
    bench = Bench()
    assert bench.take(fork(5, 1), fork(6, 2), execute(6, 3, details("/bin/b"))) == []
    found = bench.take(execute(5, 4, details("/bin/a")))
    assert [(event.event, event.pid) for event in found] == [("exec", 6), ("exec", 5)]
    assert [event.time for event in found] == sorted(event.time for event in found)


def test_the_exit_of_an_ancestor_waits_for_the_fork_before_it():
    """
    The parent's exit is told after its child's fork, however late that is decided.
    """
    bench = Bench()
    assert bench.take(fork(5, 1), leader(SHELL, 2), now=3) == []
    assert [(event.event, event.pid) for event in bench.take(now=101)] == [("fork", 5), ("exit", SHELL)]


def test_no_hold_tells_each_fork_at_once():
    """
    hold_ns=0: fork and exec are two events.
    """
    bench = Bench(hold_ns=0)
    assert kinds(bench.take(fork(5))) == ["fork"]
    (started,) = bench.take(execute(5, 2, details()))
    assert (started.event, started.forked) == ("exec", None)


def test_without_execs_wanted_forks_do_not_wait():
    """
    A hold serves to join fork and exec: with only one of them there is nothing to wait for.
    """
    bench = Bench(kinds=("fork", "exit"))
    assert kinds(bench.take(fork(5))) == ["fork"]


def test_without_forks_wanted_the_exec_still_tells_the_birth():
    """
    `forked` says the same, whether fork events are shown or not.
    """
    bench = Bench(kinds=("exec",))
    found = bench.take(fork(5), execute(5, 2, details()), execute(5, 3, details()))
    assert [event.forked for event in found] == [True, None]


def test_too_much_behind_one_fork_decides_it_early():
    """
    What a fork holds back is bounded.
    """
    bench = Bench()
    found = bench.take(fork(5, 1), *(execute(SHELL, 2, details()) for _ in range(MAX_HELD_EVENTS)), now=2)
    assert len(found) == MAX_HELD_EVENTS + 1
    assert kinds(found[:2]) == ["fork", "exec"]


def test_the_end_tells_what_was_undecided():
    """
    drain() holds nothing back.
    """
    bench = Bench()
    assert bench.take(fork(5), fork(6)) == []
    assert kinds(bench.end()) == ["fork", "fork"]
    assert bench.table.deadline_ns() is None


@given(st.lists(st.tuples(st.sampled_from("fxe"), st.integers(2, 6), st.integers(0, 60)), max_size=40))
@settings(max_examples=200)
def test_whatever_happens_comes_out_once_in_order_and_joined(story: list[tuple[str, int, int]]):
    """
    Any history gives each exec and each exit once, in the order of time, and leaves only the living in the table.
    """
    bench = Bench()
    now, found, born = 0.0, [], set()
    told = {"x": 0, "e": 0}
    for what, pid, pause in story:
        now += 0.1 + pause
        if what == "f":
            found += bench.take(fork(pid, now), now=now)
            born.add(pid)
            continue
        told[what] += 1
        found += bench.take(execute(pid, now) if what == "x" else leader(pid, now), now=now)
        born = born | {pid} if what == "x" else born - {pid}
    found += bench.end()
    assert [event.time for event in found] == sorted(event.time for event in found)
    assert kinds(found).count("exec") == told["x"]
    assert kinds(found).count("exit") == told["e"]
    assert set(bench.table.processes) == born | {SHELL}


# Inheritance


def test_an_exec_that_nobody_could_read_keeps_what_exec_keeps():
    """
    cwd, uid and cgroup stay across exec and are deduced; exe and argv are replaced and thus unknown.
    """
    bench = Bench()
    (started,) = bench.take(fork(5), execute(5))
    assert (started.exe, started.argv, started.comm) == (None, None, None)
    assert {name: started.missing[name] for name in ("exe", "argv", "comm", "file")} == dict.fromkeys(
        ("exe", "argv", "comm", "file"), EXITED
    )
    assert (started.uid, started.cwd) == (7, "/")
    assert {"uid", "cwd"} <= set(started.inferred)
    assert not {"exe", "argv"} & set(started.inferred)


def test_the_user_is_the_latest_one_also_where_an_earlier_child_was_unread():
    """
    Parent setuid()s between two children that end before they can be read: the second has the new user.
    """
    bench = Bench()
    (before,) = bench.take(fork(5), execute(5))
    bench.take(leader(5), Changed(at(4), SHELL, "uid", real=1000, effective=1001))
    (after,) = bench.take(fork(6, 5), execute(6, 6))
    assert (before.uid, after.uid, after.euid) == (7, 1000, 1001)


def test_a_field_never_is_both_known_and_missing_or_inferred_and_null():
    """
    Whatever is joined: `missing` names nulls, `inferred` names values.
    """
    bench = Bench(kinds=KINDS)
    found = bench.take(
        fork(5, 1),
        execute(5, 2),
        Changed(at(3), 5, "comm", comm="renamed"),
        Changed(at(4), 5, "gid", real=3, effective=3),
        fork(6, 5, 5),
        leader(6, 6),
        execute(5, 7, details(None, missing={"exe": EXITED})),
        leader(5, 8),
        leader(9, 9),
    )
    assert len(found) == 8
    for event in found:
        assert all(getattr(event, name) is None for name in event.missing if name != "id")
        assert all(getattr(event, name) is not None for name in event.inferred)


def test_a_change_of_name_user_group_or_session_is_told_and_kept():
    """
    Each changes the process, and later events show it.
    """
    bench = Bench(kinds=KINDS)
    found = bench.take(
        Changed(at(1), SHELL, "comm", comm="new"),
        Changed(at(2), SHELL, "uid", real=1, effective=2),
        Changed(at(3), SHELL, "gid", real=3, effective=4),
        Changed(at(4), SHELL, "sid"),
        Changed(at(5), SHELL, "ptrace", tracer=77),
        Changed(at(6), SHELL, "coredump"),
        leader(SHELL, 7, 0x8B),
    )
    assert kinds(found) == ["comm", "uid", "gid", "sid", "ptrace", "coredump", "exit"]
    last = found[-1]
    assert (last.comm, last.uid, last.euid, last.gid, last.egid, last.session) == ("new", 1, 2, 3, 4, SHELL)
    assert (last.signal, last.core_dumped, last.code) == (11, True, None)
    assert found[4].tracer == 77


def test_a_change_does_not_reach_children_that_were_born_before():
    """
    Details are shared between parent and child, but what happens to one does not happen to the other.
    """
    bench = Bench(hold_ns=0, kinds=KINDS)
    bench.take(fork(5), Changed(at(2), SHELL, "comm", comm="new"))
    (ended,) = bench.take(leader(5, 3))
    assert ended.comm == "/bin/sh"


def test_ancestry_survives_the_ancestors():
    """
    A grandchild knows its grandparent, though both above it are dead.
    """
    bench = Bench(ancestors=10)
    bench.take(
        fork(5, 1),
        execute(5, 2, details("/bin/a")),
        fork(6, 3, 5),
        execute(6, 4, details("/bin/b")),
        leader(5, 5),
        leader(SHELL, 6),
    )
    (ended,) = bench.take(leader(6, 7))
    assert [(parent.pid, parent.exe) for parent in ended.ancestors] == [(5, "/bin/a"), (SHELL, "/bin/sh")]
    assert ended.parent == ended.ancestors[0]


def test_the_parent_is_the_one_that_forked_also_when_its_pid_is_used_again():
    """
    A parent is a process and not a number.
    """
    bench = Bench()
    bench.take(fork(5, 1), execute(5, 2, details("/bin/old")), fork(6, 3, 5), execute(6, 4, details("/bin/kid")))
    bench.take(leader(5, 5), fork(5, 700), execute(5, 701, details("/bin/new")))
    (ended,) = bench.take(leader(6, 800))
    assert (ended.parent.pid, ended.parent.exe) == (5, "/bin/old")


# Looking at a fork


def test_a_child_that_does_not_exec_is_looked_at_when_the_hold_is_over():
    """
    What was read is no longer inferred.
    """
    bench = Bench(look=lambda pid: details("/bin/sh", ["sh"], start_ticks=ticks(0), cwd="/elsewhere", comm="w"))
    (born,) = bench.take(fork(5, 0), now=100)
    assert (born.event, born.cwd, born.comm) == ("fork", "/elsewhere", "w")
    assert "id" not in born.inferred
    assert "cwd" not in born.inferred


def test_a_look_that_finds_another_process_is_not_used():
    """
    The child ended and its pid is used again: nothing of the other one gets into the event.
    """
    bench = Bench(look=lambda pid: details("/bin/evil", start_ticks=ticks(5000)))
    (born,) = bench.take(fork(5, 0), now=100)
    assert born.exe == "/bin/sh"
    assert "exe" in born.inferred


# Threads


def test_a_process_ends_with_its_last_thread():
    """
    Leader first, then the other: one exit, at the end of the other.
    """
    bench = Bench()
    bench.take(fork(5), execute(5, 2, details()), thread(5, 51, 3, born=True))
    assert bench.take(leader(5, 4)) == []
    assert 5 in bench.table.processes
    (ended,) = bench.take(thread(5, 51, 9, born=False, status=7 << 8))
    assert (ended.event, ended.code, ended.duration_ns) == ("exit", 7, 8 * MS)


def test_the_end_of_a_thread_is_not_the_end_of_its_process():
    """
    Other threads may end while the leader lives on.
    """
    bench = Bench()
    bench.take(fork(5), execute(5, 2, details()), thread(5, 51, 3, born=True))
    assert bench.take(thread(5, 51, 4, born=False)) == []
    assert kinds(bench.take(leader(5, 5))) == ["exit"]


def test_an_exec_from_a_thread_belongs_to_the_process():
    """
    The kernel tells the end of the leader, and then the exec of the group: one process, one exit, no doubt left.
    """
    bench = Bench(look=lambda pid: details(start_ticks=ticks(1), threads=1))
    bench.take(fork(5), execute(5, 2, details("/bin/a")), thread(5, 51, 3, born=True))
    (second,) = bench.take(leader(5, 4), execute(5, 5, details("/bin/b")), now=5)
    assert (second.event, second.exe, second.pid) == ("exec", "/bin/b", 5)
    assert bench.table.deadline_ns() is None
    assert bench.take(now=10_000) == []
    (ended,) = bench.take(leader(5, 10_001))
    assert (ended.exe, ended.id) == ("/bin/b", second.id)


def test_a_thread_that_was_there_at_the_start_is_counted():
    """
    The snapshot says how many threads there are, not which.
    """
    bench = Bench()
    bench.table.snapshot([Alive(T0, 8, details(threads=3, start_ticks=60))], T0, tell=False)
    assert bench.take(leader(8, 1), thread(8, 81, 2, born=False)) == []
    assert kinds(bench.take(thread(8, 82, 3, born=False))) == ["exit"]


def test_the_end_of_an_unknown_thread_is_not_counted():
    """
    A thread that another one's exec ended is told of later, under a number that is nobody's.
    """
    bench = Bench()
    bench.take(fork(5), execute(5, 2, details()), thread(5, 51, 3, born=True))
    assert bench.take(thread(5, 999, 4, born=False), leader(5, 5)) == []
    assert kinds(bench.take(thread(5, 51, 6, born=False))) == ["exit"]


def test_threads_of_unknown_processes_are_no_processes():
    """
    Births and ends of threads alone never make an event.
    """
    assert Bench().take(thread(5, 51, 1, born=True), thread(5, 51, 2, born=False)) == []


def test_a_leader_that_left_is_looked_after():
    """
    When the end of a thread was lost, a look finds that nobody is there.
    """
    alive = {5: details(start_ticks=ticks(1), threads=2)}
    bench = Bench(look=lambda pid: alive.get(pid, Details(missing={"exe": EXITED})))
    bench.take(fork(5), execute(5, 2, details()), thread(5, 51, 3, born=True), leader(5, 4, 6 << 8))
    assert bench.table.deadline_ns() == at(4) + HOLD_NS
    assert bench.take(now=104) == []  # it lives
    bench.take(thread(5, 52, 105, born=True), thread(5, 52, 106, born=False))
    alive.clear()
    (ended,) = bench.take(now=206)
    assert (ended.event, ended.code) == ("exit", 6)


# Exit


@pytest.mark.parametrize(
    ("status", "code", "signal", "core"),
    [(0, 0, None, False), (255 << 8, 255, None, False), (9, None, 9, False), (0x86, None, 6, True)],
)
def test_a_status_is_read_as_wait_gives_it(status: int, code: int | None, signal: int | None, core: bool):
    """
    Exit code, signal and core bit of wait(2).
    """
    (ended,) = Bench().take(Exit(at(1), SHELL, status))
    assert (ended.code, ended.signal, ended.core_dumped) == (code, signal, core)


def test_an_unknown_status_is_missing_and_not_zero():
    """
    A source that does not know how it ended says so.
    """
    (ended,) = Bench().take(Exit(at(1), SHELL))
    assert (ended.code, ended.signal, ended.core_dumped) == (None, None, None)
    assert {ended.missing[name] for name in ("code", "signal", "core_dumped")} == {NOT_REPORTED}


def test_what_it_used_comes_with_the_exit_or_before_it():
    """
    Usage that the exit brings, or that the kernel's account told before.
    """
    usage = Usage(cpu_user_ns=1, cpu_system_ns=2, max_rss_bytes=3, io_read_bytes=4, io_write_bytes=5)
    bench = Bench()
    found = bench.take(
        fork(5),
        execute(5, 2, details()),
        Exit(at(3), 5, 0, usage),
        fork(6, 4),
        execute(6, 5, details()),
        Accounted(at(6), 6, usage),
        leader(6, 6),
    )
    for event in found[1], found[3]:
        assert (event.cpu_user_ns, event.cpu_system_ns, event.max_rss_bytes) == (1, 2, 3)
        assert (event.io_read_bytes, event.io_write_bytes) == (4, 5)
        assert event.missing == {}


def test_an_end_that_nobody_saw_is_vanished():
    """
    Gone: known before, and not there any more.
    """
    (event,) = Bench().take(Gone(at(1), SHELL))
    assert (event.event, event.exe) == ("vanished", "/bin/sh")


def test_a_refused_exec_names_the_file_that_was_asked_for():
    """
    The rest is the process that asked, which lives on.
    """
    bench = Bench(kinds=KINDS)
    (event,) = bench.take(ExecFailed(at(1), SHELL, "/nope", 2))
    assert (event.event, event.file, event.errno, event.error, event.exe) == (
        "exec_failed",
        "/nope",
        2,
        "ENOENT",
        "/bin/sh",
    )
    assert SHELL in bench.table.processes


def test_kernel_threads_are_no_events():
    """
    Children of kthreadd are born and end all the time; they never are programs.
    """
    bench = Bench(kinds=KINDS)
    assert bench.take(fork(5, 1, ppid=2), leader(5, 2)) == []
    assert 5 not in bench.table.processes


# The start, losses and resync


def test_the_snapshot_tells_what_runs_when_asked():
    """
    `running`, with parents, whatever the order of the pids.
    """
    table = Table(boot=BOOT, maker=Maker("h", Clock(offset_ns=0)))
    alive = [
        Alive(T0, 5, details("/bin/kid", ppid=9, start_ticks=3)),
        Alive(T0, 9, details("/bin/old", ppid=0, start_ticks=2)),
    ]
    table.snapshot(alive, T0, tell=True)
    child, parent = table.flush(T0)
    assert isinstance(child, events.Running)
    assert isinstance(parent, events.Running)
    assert (child.via, child.id, child.parent and child.parent.exe) == ("snapshot", f"{BOOT}-5-3", "/bin/old")
    assert parent.parent is None


def test_a_process_born_between_open_and_snapshot_is_one_process():
    """
    Its fork is queued behind the snapshot that saw it: one id, and fork and exec are told.
    """
    bench = Bench()
    seen = details("/bin/a", start_ticks=ticks(1), ppid=SHELL)
    bench.table.snapshot([Alive(at(5), 5, seen)], T0, tell=False)
    started, ended = bench.take(fork(5, 1), execute(5, 2, details("/bin/a", start_ticks=ticks(1))), leader(5, 6))
    assert (started.event, started.forked, ended.event) == ("exec", True, "exit")
    assert started.id == ended.id == f"{BOOT}-5-{ticks(1)}"
    assert ended.duration_ns == 5 * MS


def test_a_loss_is_told_where_it_happened():
    """
    An event in the stream, with count, place and time.
    """
    bench = Bench()
    before, lost, after = bench.take(
        execute(SHELL, 1, details()),
        Lost(at(3), 0, "netlink_socket", 12, True, at(2), at(3)),
        execute(SHELL, 4, details()),
    )
    assert (before.event, after.event) == ("exec", "exec")
    assert (lost.event, lost.count, lost.exact, lost.where) == ("lost", 12, True, "netlink_socket")
    assert before.time < lost.since < lost.until < after.time
    assert bench.table.lost == 12


def test_a_resync_puts_the_table_right():
    """
    Who is gone vanished, who is new is running, who stayed stays what it was.
    """
    bench = Bench()
    kept = bench.take(fork(5), execute(5, 2, details("/bin/a")))[0]
    bench.take(fork(6, 3), execute(6, 4, details("/bin/b")))
    alive = [
        Alive(at(50), SHELL, bench.shell),
        Alive(at(50), 5, details("/bin/a", start_ticks=ticks(1))),
        Alive(at(50), 7, details("/bin/new", start_ticks=ticks(30), ppid=SHELL)),
    ]
    bench.table.resync(alive, at(50))
    found = bench.take()
    assert [(event.event, event.pid) for event in found] == [("vanished", 6), ("running", 7)]
    assert (found[1].via, found[1].parent.pid) == ("resync", SHELL)
    assert bench.take(leader(5, 60))[0].id == kept.id


def test_a_resync_forgives_a_start_that_was_only_derived():
    """
    A tick beside the true start is the same process.
    """
    bench = Bench(hold_ns=0)
    bench.take(fork(5, 10))
    alive = [Alive(at(50), SHELL, bench.shell), Alive(at(50), 5, details(start_ticks=ticks(10) - 1))]
    bench.table.resync(alive, at(50))
    assert bench.take() == []


def test_a_resync_does_not_end_what_was_born_after_its_look():
    """
    A process whose fork came in while /proc was being read is not in that reading.
    """
    bench = Bench(hold_ns=0)
    bench.take(fork(5, 60))
    bench.table.resync([Alive(at(50), SHELL, bench.shell)], at(50))
    assert bench.take() == []
    assert 5 in bench.table.processes


# Bounds


def storm(first: int, count: int, *, respawn: bool = False) -> Iterable[Sequence[Fact]]:
    """
    Processes that start and end one after the other; with `respawn` each is started by the one before.
    """
    pid = SHELL
    for n in range(count):
        parent, pid = (pid if respawn else SHELL), 1000 + (first + n) % 30_000
        ms = first + n
        ends = leader(parent if respawn else pid, ms + 0.2)
        yield fork(pid, ms, parent), execute(pid, ms + 0.1, details() if n % 2 else None), ends


@pytest.mark.parametrize("respawn", [False, True])
def test_a_hundred_thousand_processes_leave_no_growth(respawn: bool):
    """
    What is kept after many short lives is what was kept after few, also when each starts the next one for ever.
    """
    bench = Bench()

    def run(first: int, count: int) -> None:
        for facts in storm(first, count, respawn=respawn):
            for event in bench.take(*facts, now=first + count):
                assert isinstance(event, ProcessEvent)

    run(0, 5_000)
    gc.collect()
    before = sys.getallocatedblocks()
    run(5_000, 95_000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 2_000
    assert len(bench.table.processes) <= 4


def test_accounts_and_opens_of_nobody_are_bounded_or_dropped():
    """
    Facts that never meet their process do not pile up.
    """
    bench = Bench()
    for pid in range(40_000):
        bench.take(Accounted(at(1), 1000 + pid), Opened(at(1), 1000 + pid))
    assert len(bench.table.accounts) <= 16_384
    assert len(bench.table.processes) == 1


def test_the_code_of_the_last_thread_may_still_be_on_its_way():
    """
    A look that finds a process gone does not end it with the leader's 0 while the last thread's end may lie unread.
    """
    gone = Details(missing={"exe": "exited"})
    bench = Bench(look=lambda pid: gone, kinds=("exit",))
    bench.take(fork(5), Thread(at(2), 5, 6, True), leader(5, 3))
    assert bench.take(now=3 + HOLD_NS / MS) == []
    (ended,) = bench.take(Thread(at(4), 5, 6, False, 9 << 8), now=4 + HOLD_NS / MS)
    assert (ended.pid, ended.code) == (5, 9)


def test_an_end_that_stays_unread_has_no_code():
    """
    If nothing more is told, the process has ended, and how is not known.
    """
    bench = Bench(look=lambda pid: Details(missing={"exe": "exited"}), kinds=("exit",))
    bench.take(fork(5), Thread(at(2), 5, 6, True), leader(5, 3))
    bench.take(now=3 + HOLD_NS / MS)
    (ended,) = bench.take(now=4 + 2 * HOLD_NS / MS)
    assert (ended.pid, ended.code, ended.missing["code"]) == (5, None, "not_reported")
