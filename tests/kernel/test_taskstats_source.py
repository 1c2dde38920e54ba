"""
taskstats on the running kernel: what each process had used, and what it ran.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from procwatch.facts import Accounted, Fact, Lost
from procwatch.sources.taskstats import Taskstats
from tests.conftest import need
from tests.kernel.conftest import EMULATED

TICK_NS = 10_000_000  # the slowest clock tick there is, CONFIG_HZ=100
WAIT_S = 10


@contextmanager
def listening(alone: bool = False, buffer_bytes: int = 32 << 20) -> Iterator[Taskstats]:
    source = Taskstats(alone=alone, buffer_bytes=buffer_bytes)
    problem = source.probe()
    need(problem is None, str(problem))
    source.open()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def source() -> Iterator[Taskstats]:
    with listening() as source:
        yield source


def account(source: Taskstats, pid: int) -> Accounted:
    """
    The one record of a process that has been waited for.
    """
    (found,) = [fact for fact in source.read() if isinstance(fact, Accounted) and fact.pid == pid]
    return found


def wait(pid: int) -> tuple[int, resource.struct_rusage]:
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def compiled(tmp_path: Path, code: str) -> Path:
    need(shutil.which("gcc"), "needs gcc")
    program = tmp_path / "program"
    subprocess.run(["gcc", "-pthread", "-o", str(program), "-x", "c", "-"], input=code, text=True, check=True)
    return program


THREADS = """
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
static void burn(void) {
    struct timespec now;
    do clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now); while (now.tv_nsec < 60000000);
}
static void *first(void *_) { burn(); return 0; }
static void *last(void *thread) { pthread_join(*(pthread_t *)thread, 0); burn(); exit(9); }
int main(int argc, char **argv) {
    static pthread_t a, b, self;
    memset(malloc(30 << 20), 1, 30 << 20);
    self = pthread_self();
    pthread_create(&a, 0, first, 0);
    pthread_join(a, 0);
    if (argc > 1) { pthread_create(&b, 0, last, &self); pthread_exit(0); }
    burn();
    return 3;
}
"""


class TestAccount:
    def test_who_and_what(self, source: Taskstats) -> None:
        """
        Parent, user, group, name, exit status, and the executable's device and inode.
        """
        true = Path(shutil.which("true") or "")
        process = subprocess.Popen([true], user=65534, group=65533)
        process.wait()

        found = account(source, process.pid)

        status = true.stat()
        assert (found.ppid, found.uid, found.gid, found.comm) == (os.getpid(), 65534, 65533, "true")
        need(found.exe_inode is not None, "taskstats older than version 12")
        assert (found.exe_dev, found.exe_inode, found.status) == (status.st_dev, status.st_ino, 0)

    @pytest.mark.parametrize("script", ["exit 7", "kill -TERM $$", "kill -SEGV $$"])
    def test_status_is_that_of_wait(self, source: Taskstats, script: str) -> None:
        """
        An exit code, a signal.
        """
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"ulimit -c 0; {script}"], {})
        status, _ = wait(pid)

        assert account(source, pid).status in (status, None)

    @pytest.mark.parametrize("arguments", [[], ["leader first"]])
    def test_threads_are_summed(self, source: Taskstats, tmp_path: Path, arguments: list[str]) -> None:
        """
        A process with threads is told once, when the last is dead, with the usage of all: as wait4 has it, to the tick.
        """
        program = compiled(tmp_path, THREADS)
        pid = os.posix_spawn(program, ["program", *arguments], {})
        status, usage = wait(pid)

        found = account(source, pid)

        need(found.status is not None, "taskstats older than version 12")
        assert found.status == status == (9 if arguments else 3) << 8
        assert found.usage.cpu_user_ns is not None
        assert found.usage.cpu_system_ns is not None
        ours = found.usage.cpu_user_ns + found.usage.cpu_system_ns
        late = (usage.ru_utime + usage.ru_stime) * 1e9 - ours
        assert late >= -3 * TICK_NS  # three threads, a tick each
        assert late <= 3 * TICK_NS or EMULATED  # such a machine misses ticks
        assert found.usage.max_rss_bytes is not None
        assert 30 << 20 < found.usage.max_rss_bytes < 60 << 20

    def test_bytes_written(self, source: Taskstats, tmp_path: Path) -> None:
        """
        What was written to storage counts.
        """
        command = ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=64k", "count=16", "conv=fsync", "status=none"]
        process = subprocess.Popen(command)
        process.wait()

        found = account(source, process.pid)

        need(os.path.exists("/proc/self/io"), "no CONFIG_TASK_IO_ACCOUNTING")
        need(os.major(tmp_path.stat().st_dev), "the temporary directory is not on a disk")
        assert found.usage.io_write_bytes is not None
        assert found.usage.io_write_bytes >= 1 << 20

    def test_elapsed(self, source: Taskstats) -> None:
        """
        The time from start to end is not longer than what the parent saw.
        """
        before = os.times().elapsed
        process = subprocess.Popen(["true"])
        process.wait()
        seen = os.times().elapsed - before

        found = account(source, process.pid)

        assert found.elapsed_ns is not None
        assert 0 < found.elapsed_ns <= (seen + 0.02) * 1e9  # times(2) counts hundredths

    def test_strange_comm(self, source: Taskstats, tiny: Path) -> None:
        """
        A name that is not UTF-8 keeps its bytes.
        """
        strange = tiny.parent / "caf\udcff"
        shutil.copy(tiny, strange)
        pid = os.posix_spawn(strange, ["x"], {})
        wait(pid)

        assert account(source, pid).comm == "caf\udcff"


class TestSocket:
    def test_loss_is_counted(self, tiny: Path) -> None:
        """
        What a small buffer had no room for is told, to the record.
        """
        with listening(buffer_bytes=4096) as source:
            for _ in range(100):
                wait(os.posix_spawn(tiny, ["tiny"], {}))
            facts: list[Fact] = source.read()
            wait(os.posix_spawn(tiny, ["tiny"], {}))
            after = source.read()

        lost = sum(fact.count for fact in facts if isinstance(fact, Lost))
        mine = sum(isinstance(fact, Accounted) and fact.ppid == os.getpid() for fact in facts)
        assert mine < 100 <= mine + lost
        assert source.stats().lost == lost
        assert "tiny" in [fact.comm for fact in after if isinstance(fact, Accounted)]

    def test_alone_is_woken(self, tiny: Path) -> None:
        """
        Used alone it is readable when something has ended.
        """
        with listening(alone=True) as source:
            fd = source.fileno()
            assert fd is not None
            pid = os.posix_spawn(tiny, ["tiny"], {})
            wait(pid)

            assert select.select([fd], [], [], WAIT_S)[0]
            assert account(source, pid).comm == "tiny"

    def test_without_privileges(self) -> None:
        """
        Without CAP_NET_ADMIN it says what it needs.
        """
        need(os.geteuid() == 0, "needs to be root, to become somebody else")
        Taskstats().probe()  # imports what the other user may not be able to read
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(65534, 65534, 65534)
                os.write(write, str(Taskstats().probe()).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with open(read, "rb") as pipe:
            assert pipe.read() == b"taskstats: needs CAP_NET_ADMIN: run as root"

    def test_in_another_pid_namespace(self) -> None:
        """
        In a pid namespace of its own it says where to run.
        """
        code = "from procwatch.sources.taskstats import Taskstats as T; print(T().probe())"
        command = ["unshare", "-pf", sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True)
        need("unshare" not in result.stderr, "needs unshare(1)")

        assert "only the initial user and pid namespaces" in result.stdout


def test_closes_all(no_leaks: None) -> None:
    """
    Nothing stays open, and closing twice does no harm.
    """
    with listening() as source:
        source.read()
    source.close()

    assert source.read() == []
    assert source.stats().undecoded == 0
