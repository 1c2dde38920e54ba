"""
Hold mode on the running kernel. Only execs from a tmpfs of the test's own are held: a mistake stops nothing else.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from procwatch.facts import NOT_REPORTED, Details, Fact, Lost, Opened
from procwatch.sources.hold import Hold
from tests.conftest import need
from tests.kernel.conftest import times

LONGEST_S = 3.0  # that an exec may wait, whatever happens
DEADLINE_S = 0.4  # less than the watchdog waits, and enough for an emulated machine to read arguments


@pytest.fixture
def place(tmp_path: Path, tiny: Path) -> Iterator[Path]:
    """
    A tmpfs with the program "tiny".
    """
    need(os.geteuid() == 0, "mounting needs root")
    point = tmp_path / "held"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "test", str(point)], check=True)
    try:
        shutil.copy(tiny, point)
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


@contextmanager
def holding(place: Path, deadline_s: float = DEADLINE_S) -> Iterator[Hold]:
    source = Hold(only=str(place), deadline_s=deadline_s)
    problem = source.probe()
    need(problem is None, str(problem))
    source.open()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def source(place: Path) -> Iterator[Hold]:
    with holding(place) as source:
        yield source


def opens(facts: list[Fact]) -> list[Opened]:
    return [fact for fact in facts if isinstance(fact, Opened)]


def details(source: Hold) -> Details:
    (fact,) = opens(source.read())
    assert fact.held is not None
    return fact.held


def spawn(*argv: str | Path, cwd: Path | None = None) -> float:
    """
    Run to the end.

    Returns:
        Seconds that it took.
    """
    before = time.monotonic()
    subprocess.run([str(arg) for arg in argv], cwd=cwd, check=True)
    return time.monotonic() - before


def holder_of(source: Hold) -> int:
    assert source._process is not None
    return source._process.pid


def watchdog_of(holder: int) -> int:
    with open(f"/proc/{holder}/task/{holder}/children") as file:
        return int(file.read())


class TestDetails:
    def test_arguments_and_place(self, source: Hold, place: Path) -> None:
        """
        Of a process that lives 100 µs: name as given, arguments, directory, cgroup, parent, ids.
        """
        long = "x" * 9000
        process = subprocess.Popen(["./tiny", "", "caf\udcff", long], cwd=place, user=65534, group=65533)
        process.wait()

        (fact,) = opens(source.read())

        held = fact.held
        assert (fact.pid, fact.path) == (process.pid, str(place / "tiny"))
        assert held is not None
        assert (held.file, held.argv, held.cwd) == ("./tiny", ["./tiny", "", "caf\udcff", long], str(place))
        assert (held.ppid, held.uid, held.gid) == (os.getpid(), 65534, 65533)
        assert held.cgroup is not None
        assert held.missing == {}

    def test_every_one_of_a_storm(self, source: Hold, place: Path) -> None:
        """
        Each of many short lives is told with its own arguments.
        """
        count = times(500)
        code = (
            f"import os,sys\nfor n in range({count}): os.waitpid(os.posix_spawn(sys.argv[1], ['t', str(n)], {{}}), 0)"
        )
        spawn(sys.executable, "-S", "-c", code, place / "tiny")

        found = [fact.held for fact in opens(source.read())]

        assert [held.argv for held in found if held is not None] == [["t", str(n)] for n in range(count)]

    def test_execveat(self, source: Hold, place: Path) -> None:
        """
        An exec by descriptor has the name that the kernel makes up for it.
        """
        fd = os.open(place / "tiny", os.O_PATH)
        pid = os.fork()
        if pid == 0:
            os.execve(fd, ["by fd"], {})
        os.waitpid(pid, 0)
        os.close(fd)

        held = details(source)

        assert held.argv == ["by fd"]
        assert held.file in (f"/dev/fd/{fd}", f"/proc/self/fd/{fd}")  # fexecve(3) where libc has no execveat

    def test_script(self, source: Hold, place: Path) -> None:
        """
        For the interpreter the arguments are those that the kernel makes of the `#!` line.
        """
        script = place / "run.sh"
        script.write_text(f"#!{place}/tiny -x y \n")
        script.chmod(0o755)
        spawn("./run.sh", "arg", cwd=place)

        first, second = opens(source.read())

        assert [first.path, second.path] == [str(script), str(place / "tiny")]
        assert second.held is not None
        assert second.held.argv == [f"{place}/tiny", "-x y", "./run.sh", "arg"]
        assert (second.held.script, second.held.file) == (str(script), "./run.sh")

    def test_script_with_no_time(self, place: Path) -> None:
        """
        However short the deadline, what is told of a script's interpreter is right or missing.
        """
        script = place / "run.sh"
        script.write_text(f"#!{place}/tiny -x\n")
        script.chmod(0o755)
        with holding(place, deadline_s=0.0002) as source:
            for _ in range(times(100)):
                spawn("./run.sh", "arg", cwd=place)
            found = [fact.held for fact in opens(source.read()) if fact.path == str(place / "tiny")]

        told = {tuple(held.argv) for held in found if held is not None and held.argv is not None}
        assert told <= {(f"{place}/tiny", "-x", "./run.sh", "arg")}
        assert found

    def test_from_another_thread(self, source: Hold, place: Path) -> None:
        """
        An exec by a thread that is not the first is its process's.
        """
        code = (
            "import os,sys,threading\n"
            "t = threading.Thread(target=os.execv, args=(sys.argv[1], ['thread']))\n"
            "t.start(); t.join()"
        )
        process = subprocess.Popen([sys.executable, "-S", "-c", code, str(place / "tiny")])
        process.wait()

        (fact,) = opens(source.read())

        assert fact.pid == process.pid
        assert fact.held is not None
        assert fact.held.argv == ["thread"]

    def test_many_arguments(self, source: Hold, place: Path) -> None:
        """
        More arguments than one read takes, over many pages.
        """
        arguments = [str(n) * 3 for n in range(3000)]
        spawn(place / "tiny", *arguments)

        assert details(source).argv == [str(place / "tiny"), *arguments]


class TestNobodyWaits:
    def test_agent_stopped_and_killed(self, place: Path) -> None:
        """
        With the agent under SIGSTOP execs go on; when it is killed, holding ends.
        """
        code = (
            "import sys, signal\n"
            "from procwatch.sources.hold import Hold\n"
            "hold = Hold(only=sys.argv[1]); hold.open()\n"
            "print(hold._process.pid, flush=True); signal.pause()"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            line = agent.stdout.readline()
            need(line, "hold mode cannot be used here")
            holder = os.pidfd_open(int(line))
            agent.send_signal(signal.SIGSTOP)
            assert spawn(place / "tiny") < LONGEST_S

            agent.kill()
            assert wait_for_end(holder)
            assert spawn(place / "tiny") < LONGEST_S

    def test_holder_stopped(self, source: Hold, place: Path) -> None:
        """
        When the holder itself is stopped, the watchdog lets all go, and the paths go on.
        """
        holder = os.pidfd_open(holder_of(source))
        os.kill(holder_of(source), signal.SIGSTOP)
        os.waitid(os.P_PIDFD, holder, os.WSTOPPED | os.WNOWAIT)  # until then its threads may answer

        assert spawn(place / "tiny") < LONGEST_S

        assert wait_for_end(holder)
        first = source.read()
        assert [fact.where for fact in first if isinstance(fact, Lost)] == ["hold"]
        spawn(place / "tiny")
        assert str(place / "tiny") in [fact.path for fact in opens(source.read())]

    def test_watchdog_killed(self, source: Hold, place: Path) -> None:
        """
        Without a watchdog nothing is held.
        """
        holder = os.pidfd_open(holder_of(source))
        os.kill(watchdog_of(holder_of(source)), signal.SIGKILL)

        assert wait_for_end(holder)
        assert spawn(place / "tiny") < LONGEST_S

    def test_memory_that_never_answers(self, source: Hold, place: Path) -> None:
        """
        An exec whose arguments cannot be read goes on after the deadline, and so do all others.
        """
        if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 8):
            pytest.skip("before Linux 6.8 the kernel copies the arguments, and hangs itself, before it opens the file")
        program = place.parent / "hang"
        need(shutil.which("gcc"), "needs gcc")
        subprocess.run(["gcc", "-o", str(program), "-x", "c", "-"], input=HANG, text=True, check=True)
        with subprocess.Popen([program, place / "tiny"], stdout=subprocess.PIPE) as hanging:
            assert hanging.stdout is not None
            need(hanging.stdout.readline(), "needs userfaultfd(2)")
            facts = opens(source.read())
            while not facts:
                facts = opens(source.read())
            assert spawn(place / "tiny") < LONGEST_S
            hanging.kill()

        held = facts[0].held
        assert held is not None
        assert (held.argv, held.missing) == (None, {"file": NOT_REPORTED, "argv": NOT_REPORTED})
        assert (facts[0].pid, held.cwd) == (hanging.pid, os.getcwd())

    def test_own_children(self, source: Hold, place: Path) -> None:
        """
        The process that listens may itself start programs, without reading meanwhile.
        """
        for _ in range(50):
            assert spawn(place / "tiny") < LONGEST_S
        assert os.waitpid(os.posix_spawn(place / "tiny", ["x"], {}), 0)[1] == 0

        assert len(opens(source.read())) == 51


HANG = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) return 1;
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register all = {.range = {(uintptr_t)page, 4096}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_REGISTER, &all)) return 1;
    char *arguments[] = {argv[1], page, 0};
    if (write(1, "\\n", 1) != 1) return 1;
    execv(argv[1], arguments);
    return 1;
}
"""


def wait_for_end(pidfd: int) -> bool:
    """
    Wait for the end of a process that is not our child, and close its pidfd.
    """
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


def test_closes_all(place: Path, no_leaks: None) -> None:
    """
    Nothing stays open or alive, and closing twice does no harm.
    """
    with holding(place) as source:
        holder = holder_of(source)
        watchdog = os.pidfd_open(watchdog_of(holder))
    source.close()

    assert wait_for_end(watchdog)
    assert source.read() == []
