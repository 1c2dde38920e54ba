"""
The scan, looking at real processes as they are born, execute programs and end.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from procwatch.facts import EXITED, PERMISSION, Details, Exec, Exit, Fact, Fork, Lost
from procwatch.sources import procfs
from procwatch.sources.scan import INITIAL_PID_NAMESPACE, Scan
from procwatch.table.identity import NS_PER_TICK
from tests.conftest import need
from tests.living import NOBODY, elsewhere, living, python

pytestmark = pytest.mark.usefixtures("no_leaks")
ROOT = os.geteuid() == 0
PIDFDS = [None, 0]  # as many as there are, and none at all


@pytest.fixture(params=PIDFDS, ids=["pidfds", "no pidfds"])
def scan(request: pytest.FixtureRequest) -> Iterator[Scan]:
    """
    An open scan, with descriptors that tell of ends and without.
    """
    source = Scan(max_pidfds=request.param)
    source.open()
    yield source
    source.close()


def until(source: Scan, done: Callable[[list[Fact]], bool], facts: list[Fact] | None = None) -> list[Fact]:
    """
    Look at the scan's own pace until the facts suffice; the timeout of all tests ends what never comes. As the watcher
    does, do not look while it says that there is nothing.
    """
    facts = [] if facts is None else facts
    while not done(facts):
        time.sleep(source.delay_s())
        facts += [] if source.quiet() else source.read()
    assert [fact.time_ns for fact in facts] == sorted(fact.time_ns for fact in facts)
    return facts


def of(pid: int, facts: Sequence[Fact]) -> list[Fact]:
    """
    The facts of one process.
    """
    return [fact for fact in facts if fact.pid == pid]


def saw(kind: type[Fact], pid: int) -> Callable[[list[Fact]], bool]:
    """
    Whether there is such a fact of a process.
    """
    return lambda facts: any(type(fact) is kind and fact.pid == pid for fact in facts)


def test_life_of_a_process(scan: Scan) -> None:
    """
    A process of our own is told of three times: born, with its program, and ended.
    """
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with living(["cat", "-"]) as process:
        facts = until(scan, saw(Exec, process.pid))
        start = procfs.read(process.pid).start_ticks
    until(scan, saw(Exit, process.pid), facts)
    fork, ran, ended = (fact for fact in of(process.pid, facts) if not (type(fact) is Exec and not fact.details))

    assert isinstance(fork, Fork)
    assert isinstance(ran, Exec)
    assert isinstance(ended, Exit)
    assert (fork.ppid, fork.start_ticks) == (os.getpid(), start)
    assert ended.start_ns == (start or 0) * NS_PER_TICK
    assert before - NS_PER_TICK <= fork.time_ns <= ran.time_ns <= ended.time_ns
    assert ran.details is not None
    assert (ran.details.argv, ran.details.missing) == (["cat", "-"], {})
    assert ran.read_ns == ran.time_ns


def test_exit_status() -> None:
    """
    The status is known while a process of ours is a zombie, with and without a pidfd.
    """
    for max_pidfds in PIDFDS:
        scan = Scan(max_pidfds=max_pidfds)
        scan.open()
        process = subprocess.Popen(["sh", "-c", "read x; exit 3"], stdin=subprocess.PIPE)
        facts = until(scan, saw(Exec, process.pid))
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        until(scan, saw(Exit, process.pid), facts)
        process.wait()
        scan.close()
        ended = of(process.pid, facts)[-1]

        assert isinstance(ended, Exit)
        assert os.waitstatus_to_exitcode(ended.status or 0) == 3


def test_exit_status_after_the_parent_has_waited() -> None:
    """
    From Linux 6.15 on a pidfd keeps the exit status, for everybody; before, it is unknown.
    """
    scan = Scan()
    scan.open()
    with living(["sh", "-c", "read x; echo $x; read x"]) as process:
        facts = until(scan, saw(Fork, process.pid))
    process.wait()
    until(scan, saw(Exit, process.pid), facts)
    scan.close()
    ended = of(process.pid, facts)[-1]

    assert isinstance(ended, Exit)
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert ended.status == (9 if version >= (6, 15) else None)


def test_those_who_lived_before(scan: Scan) -> None:
    """
    What was alive at open() is not born again, and its exec and its end are told.
    """
    other = Scan()
    with living(["sh", "-c", "read x; echo $x; read x; exec cat -"]) as process:
        other.open()
        facts = other.read()
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        until(other, saw(Exec, process.pid), facts)
    until(other, saw(Exit, process.pid), facts)
    other.close()
    ran = next(fact for fact in facts if fact.pid == process.pid)

    assert not any(type(fact) is Fork for fact in of(process.pid, facts))
    assert isinstance(ran, Exec)
    assert ran.details is not None
    assert ran.details.argv == ["cat", "-"]


def test_exec_in_the_same_process(scan: Scan) -> None:
    """
    Another program in a process that has executed one before is an exec of its own, even of the same program.
    """
    code = "read x; echo $x; read x; exec sh -c 'read x; exec cat'"
    with living(["sh", "-c", code]) as process:
        facts = until(scan, saw(Exec, process.pid))
        assert process.stdin is not None
        for _ in range(2):
            count = len(_programs(process.pid, facts))
            process.stdin.write(b"go\n")
            process.stdin.flush()
            until(scan, lambda facts, more=count: len(_programs(process.pid, facts)) > more, facts)  # type: ignore[misc]

    assert _programs(process.pid, facts) == [["sh", "-c", code], ["sh", "-c", "read x; exec cat"], ["cat"]]


def _programs(pid: int, facts: Sequence[Fact]) -> list[list[str] | None]:
    return [fact.details.argv for fact in facts if isinstance(fact, Exec) and fact.details and fact.pid == pid]


_FORK = """
import os, sys
def say(): print(sys.stdin.readline(), end="", flush=True)
if os.fork(): os.wait(); os._exit(0)
say(); sys.stdin.readline()
os.execvp("cat", ["cat", "-"])
"""


def test_fork_that_executes_late(scan: Scan) -> None:
    """
    A child that runs its parent's program is a fork with that program's details, until it executes its own.
    """
    with living([sys.executable, "-c", _FORK]) as process:
        facts = until(scan, lambda facts: bool(_children(process.pid, facts)))
        child = _children(process.pid, facts)[0]
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        until(scan, saw(Exec, child.pid), facts)
        os.kill(child.pid, 9)
    until(scan, saw(Exit, child.pid), facts)

    assert child.details is not None
    assert (child.details.argv or [])[:2] == [sys.executable, "-c"]
    assert _programs(child.pid, facts) == [["cat", "-"]]


def _children(pid: int, facts: Sequence[Fact]) -> list[Fork]:
    return [fact for fact in facts if isinstance(fact, Fork) and fact.ppid == pid]


_RENAME = """
import ctypes, sys
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
with open("/proc/self/mem", "r+b", buffering=0) as memory:
    memory.seek(int(fields[45]))
    memory.write(b"another")
ctypes.CDLL(None).prctl(15, b"another", 0, 0, 0)
"""


def test_setproctitle_is_no_exec(scan: Scan) -> None:
    """
    A process that writes over its arguments and its name has executed nothing.
    """
    code = "import sys; print(sys.stdin.readline(), end='', flush=True); sys.stdin.readline()" + _RENAME
    with living([sys.executable, "-c", code + "print(flush=True); sys.stdin.readline()"]) as process:
        facts = until(scan, saw(Exec, process.pid))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        assert procfs.read(process.pid).comm == "another"
        last = _due(scan, process.pid)
        until(scan, lambda facts: _due(scan, process.pid) != last, facts)

    assert len(_programs(process.pid, facts)) == 1


def _due(scan: Scan, pid: int) -> int:
    """
    When a process is looked at next: changes when it was.
    """
    return next(due for due, number, _ in scan._due if number == pid)


def test_threads_are_no_processes(scan: Scan) -> None:
    """
    Threads are born under numbers of their own, and are not told of.
    """
    code = "import threading as t\nfor _ in range(20): t.Thread(target=t.Event().wait, daemon=True).start()"
    with python(code) as process:
        facts = until(scan, saw(Exec, process.pid))
        tids = {int(name) for name in os.listdir(f"/proc/{process.pid}/task")} - {process.pid}
        with living(["cat"]) as marker:
            until(scan, saw(Exec, marker.pid), facts)

    assert len(tids) == 20
    assert not tids & {fact.pid for fact in facts}


def test_losses_are_counted() -> None:
    """
    What lived and ended between two looks is told as lost, once, as an upper bound.
    """
    need(os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE, "needs the initial pid namespace")
    scan = Scan()
    scan.open()
    pids = [subprocess.Popen(["true"]) for _ in range(50)]
    for process in pids:
        process.wait()
    facts = scan.read(final=True)
    scan.close()
    lost = [fact for fact in facts if isinstance(fact, Lost)]

    assert not {process.pid for process in pids} & {fact.pid for fact in facts}
    assert len(lost) == 1
    assert lost[0].count >= 50
    assert not lost[0].exact
    assert lost[0].where == "scan"
    assert lost[0].since_ns < lost[0].until_ns
    assert scan.stats().lost == lost[0].count


def test_nothing_is_lost_of_what_was_seen(scan: Scan) -> None:
    """
    What was seen alive is not counted as lost, however many looks there are.
    """
    facts: list[Fact] = []
    for _ in range(10):
        with living(["cat"]) as process:
            until(scan, saw(Exec, process.pid), facts)
    facts += scan.read(final=True)
    births = scan._seen
    lost = sum(fact.count for fact in facts if isinstance(fact, Lost))

    assert births >= 10
    if scan._counts_births:
        assert lost <= procfs.born() - scan._births_at_open - births


def test_as_an_ordinary_user() -> None:
    """
    Processes of root that live 100 ms are seen by any user, with argv, and exe says "permission"; or they are lost.
    """
    need(ROOT, "needs root")
    many = 20
    code = f"read x; for i in $(seq {many}); do sleep 0.1 0.00$i & done; wait; echo; read x"
    with subprocess.Popen(["sh", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        stdin, stdout = shell.stdin.fileno(), shell.stdout.fileno()

        def watch() -> list[Fact]:
            source = Scan()
            source.open()
            os.write(stdin, b"go\n")
            facts = until(source, lambda _: bool(select.select([stdout], [], [], 0)[0]))

            def ended(facts: list[Fact]) -> bool:
                exits = {fact.pid for fact in facts if isinstance(fact, Exit)}
                return _sleeps(facts).keys() <= exits

            facts += source.read(final=True)
            until(source, ended, facts)
            source.close()
            return facts

        facts = elsewhere(watch, uid=NOBODY)
    seen = _sleeps(facts)
    children = {fact.pid for fact in facts if isinstance(fact, Fork) and fact.ppid == shell.pid}
    lost = sum(fact.count for fact in facts if isinstance(fact, Lost))

    assert seen
    if os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE:
        assert lost + len(children) >= many
    for pid, details in seen.items():
        assert details.missing["exe"] in (PERMISSION, EXITED)
        assert details.uid == 0
        kinds = [type(fact) for fact in of(pid, facts)]
        assert (kinds[0], kinds[-1]) == (Fork, Exit)


def _sleeps(facts: Sequence[Fact]) -> dict[int, Details]:
    """
    Those that ran "sleep 0.1 0.00N".
    """
    found = {fact.pid: fact.details for fact in facts if isinstance(fact, Exec)}
    return {pid: details for pid, details in found.items() if details and (details.argv or [])[:2] == ["sleep", "0.1"]}


def test_numbers_that_are_used_again() -> None:
    """
    Where numbers wrap and one is used again, the old process ends before the new one is born.
    """
    need(ROOT, "needs root")

    def watch(max_pidfds: int | None) -> tuple[int, list[Fact]]:
        source = Scan(max_pidfds=max_pidfds)
        Path("/proc/sys/kernel/ns_last_pid").write_text("400")  # beyond those that are not used again
        old = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        tick = procfs.read(old).start_ticks or 0
        source.open()
        os.kill(old, 9)
        os.waitpid(old, 0)
        while time.clock_gettime_ns(time.CLOCK_BOOTTIME) // NS_PER_TICK <= tick:
            os.sched_yield()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(old - 2))
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        new = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        assert new == old
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)  # the last pid is another one than before
        facts = until(source, saw(Fork, new))
        source.close()
        return new, facts

    for max_pidfds in PIDFDS:
        pid, facts = elsewhere(lambda limit=max_pidfds: watch(limit), pid_namespace=True)  # type: ignore[misc]
        kinds = [type(fact) for fact in of(pid, facts)]

        assert kinds[:2] == [Exit, Fork]
