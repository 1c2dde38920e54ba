"""
eBPF on this kernel: real processes, read back from the ring, compared with what /proc and wait(2) say.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from procwatch import events
from procwatch.clock import Clock
from procwatch.errors import ConfigError, SourceUnavailable
from procwatch.facts import Details, Exec, ExecFailed, Exit, Fact, Fork, Lost
from procwatch.sources import ebpf, procfs
from procwatch.sources.ebpf import Ebpf, loader, ring
from procwatch.table.draft import Maker
from procwatch.table.identity import NS_PER_TICK
from procwatch.table.table import Table
from procwatch.wire import bpf_event
from tests.conftest import need
from tests.kernel.conftest import times
from tests.living import NOBODY, elsewhere, living

F = TypeVar("F", bound=Fact)
LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def opened(**options: Any) -> Iterator[Ebpf]:
    """
    A source that listens; a kernel without the means skips the test.
    """
    source = Ebpf(**options)
    reason = source.probe()
    need(reason is None, str(reason))
    source.open()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def source() -> Iterator[Ebpf]:
    """
    A source with its defaults.
    """
    with opened() as source:
        yield source


def until(source: Ebpf, done: Callable[[list[Fact]], bool]) -> list[Fact]:
    """
    Read until what was read is enough.
    """
    facts: list[Fact] = []
    fd = source.fileno()
    assert fd is not None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not done(facts):
        assert poll.poll(20_000), f"nothing more came after {facts}"
        facts += source.read()
    return facts


def of(facts: list[Fact], kind: type[F], pid: int) -> list[F]:
    """
    Facts of one kind about one process.
    """
    return [fact for fact in facts if isinstance(fact, kind) and fact.pid == pid]


def life(source: Ebpf, pid: int) -> list[Fact]:
    """
    All facts about a process up to its end.
    """
    return [fact for fact in until(source, lambda facts: bool(of(facts, Exit, pid))) if fact.pid == pid]


def run(source: Ebpf, argv: Any, **options: Any) -> Details:
    """
    Run a program to its end; details of its last exec.
    """
    with subprocess.Popen(argv, **options) as process:
        pass
    return last_exec(source, process.pid)


def last_exec(source: Ebpf, pid: int) -> Details:
    """
    Details of the last exec of a process that has ended.
    """
    return whole(of(life(source, pid), Exec, pid)[-1])


def whole(fact: Exec) -> Details:
    """
    Details of an exec: those that it shares with others, and its own.
    """
    assert fact.details is not None
    assert fact.start_ns is not None
    return replace(
        fact.details,
        ppid=fact.ppid,
        start_ticks=fact.start_ns // NS_PER_TICK,
        argv=fact.argv,
        argv_truncated=fact.argv_truncated,
        ns_pid=fact.ns_pid,
        missing=fact.details.missing | ({"argv": fact.argv_missing} if fact.argv_missing else {}),
    )


def timeless(event: events.Event) -> events.Event:
    """
    An event without what two sources that listen at the same time cannot agree on to the nanosecond.
    """
    measured = ("time", "duration_ns", "cpu_user_ns", "cpu_system_ns", "max_rss_bytes")
    return replace(event, **{name: None for name in measured if hasattr(event, name)})


def child(work: Callable[[], object]) -> tuple[int, int]:
    """
    Pid and wait status of a forked child that did `work`.
    """
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(99)
    return pid, os.waitpid(pid, 0)[1]


def compiled(path: Path, code: str) -> Path:
    """
    A C program.
    """
    need(shutil.which("gcc"), "needs gcc")
    subprocess.run(["gcc", "-pthread", "-o", path, "-x", "c", "-"], input=code, text=True, check=True)
    return path


def root() -> None:
    """
    Go on only as root.
    """
    need(os.geteuid() == 0, "needs root")


class TestExec:
    def test_agrees_with_proc(self, source: Ebpf, tmp_path: Path):
        """
        Every field that /proc has, too, is the same there.
        """
        with living(["cat"], cwd=tmp_path) as process:
            expected = procfs.read(process.pid)
            namespaces = {
                name: os.stat(f"/proc/{process.pid}/ns/{name}").st_ino
                for name in ("pid", "mnt", "user", "net", "uts", "ipc", "cgroup", "time")
            }
        details = last_exec(source, process.pid)

        for field in expected.__struct_fields__:
            value = getattr(expected, field)
            if value is not None and field not in ("missing", "inferred", "file", "threads"):
                assert (field, getattr(details, field)) == (field, value)
        assert details.missing == {}
        assert details.namespaces == namespaces
        assert details.ns_pid == process.pid
        assert details.file == shutil.which("cat")
        assert details.privileges is None

    def test_relative_path(self, source: Ebpf, tiny: Path):
        """
        exe is absolute, and file is what was given.
        """
        details = run(source, ["./tiny"], cwd=tiny.parent)

        assert (details.exe, details.file, details.cwd) == (str(tiny), "./tiny", str(tiny.parent))

    def test_through_symlink(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        Symlinks in the name are resolved.
        """
        (tmp_path / "link").symlink_to(tiny)

        assert run(source, [tmp_path / "link"]).exe == str(tiny)

    def test_deep(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        A path of 90 components is whole; one of more than 4096 bytes is missing, as /proc would refuse it too.
        """
        deep = tmp_path.joinpath(*["x" * 30] * 90)
        deep.mkdir(parents=True)
        shutil.copy(tiny, deep / "tiny")
        assert run(source, ["./tiny"], cwd=deep).exe == str(deep / "tiny")

        def work() -> None:
            os.chdir(deep)
            for _ in range(10):
                os.mkdir("y" * 255)
                os.chdir("y" * 255)
            shutil.copy(tiny, "tiny")
            os.execv("./tiny", ["tiny"])

        details = last_exec(source, child(work)[0])
        assert (details.exe, details.cwd) == (None, None)
        assert details.missing == {"exe": "too_long", "cwd": "too_long"}
        assert (details.file, details.argv) == ("./tiny", ["tiny"])

    @pytest.mark.parametrize(("size", "whole"), [(3840, True), (3841, True), (4095, True), (4096, False)])
    def test_longest(self, source: Ebpf, tiny: Path, tmp_path: Path, size: int, whole: bool):
        """
        What /proc can tell is told: 4095 bytes.
        """
        directory = size - len("/tiny")
        names = ["x" * 200] * ((directory - len(str(tmp_path)) - 2) // 201 - 1)
        rest = directory - len(str(tmp_path)) - 201 * len(names) - 2
        names += ["y" * (rest // 2), "z" * (rest - rest // 2)]

        def work() -> None:
            os.chdir(tmp_path)
            for name in names:
                os.mkdir(name)
                os.chdir(name)
            shutil.copy(tiny, "tiny")
            os.execv("./tiny", ["tiny"])

        details = last_exec(source, child(work)[0])
        path = "/".join([str(tmp_path), *names, "tiny"])
        assert len(path) == size
        assert details.exe == (path if whole else None)
        assert details.cwd == path.removesuffix("/tiny")

    def test_across_mounts(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        A path goes on above the root of its file system.
        """
        root()
        script = """
            mount -t tmpfs x "$1" && mkdir "$1/a" && mount -t tmpfs y "$1/a" && cp "$2" "$1/a/t" &&
            cd "$1/a" && exec ./t
        """
        details = run(source, ["unshare", "-m", "sh", "-c", script, "sh", tmp_path, tiny])

        assert (details.exe, details.cwd) == (f"{tmp_path}/a/t", f"{tmp_path}/a")

    def test_in_container(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        Where the root was pivoted away, paths are those inside, as /proc shows them; a chroot is crossed.
        """
        root()
        script = """
            mount -t tmpfs x "$1" && mkdir "$1/old" && cp "$2" "$1/t" && cd "$1" && pivot_root . old && exec /t
        """
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), str(tiny)]
        process = subprocess.run(command, capture_output=True, check=False)
        need(process.returncode == 0, f"cannot pivot the root here: {process.stderr!r}")
        details = run(source, command)

        assert (details.exe, details.cwd, details.file) == ("/t", "/", "/t")
        assert run(source, ["/tiny"], preexec_fn=lambda: os.chroot(tiny.parent)).exe == str(tiny)

    def test_script(self, source: Ebpf, tmp_path: Path):
        """
        exe is the interpreter, and script says which file it runs.
        """
        script = tmp_path / "sub" / "script"
        script.parent.mkdir()
        script.write_text("#!/bin/sh -e\n:\n")
        script.chmod(0o755)
        details = run(source, ["../sub/script", "x"], cwd=script.parent)

        assert details.exe == os.path.realpath("/bin/sh")
        assert (details.script, details.file) == (str(script), "../sub/script")
        assert details.argv == ["/bin/sh", "-e", "../sub/script", "x"]

    def test_memfd(self, source: Ebpf, tiny: Path):
        """
        A file in memory only is said to be one.
        """
        fd = os.memfd_create("hidden one")
        os.write(fd, tiny.read_bytes())
        details = run(source, [f"/proc/self/fd/{fd}"], pass_fds=[fd])
        os.close(fd)

        assert (details.exe, details.exe_memfd, details.exe_deleted) == ("/memfd:hidden one", True, True)

    def test_not_in_memory(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        A file that was moved out of the mount by which it was opened, to a name that a memory file would have.
        """
        root()
        script = """
            mount -t tmpfs x "$1" && mkdir "$1/sub" "$1/bound" && cp "$2" "$1/sub/tiny" &&
            mount --bind "$1/sub" "$1/bound" && exec 3<"$1/bound/tiny" && mv "$1/sub/tiny" "$1/memfd:evil" &&
            exec /proc/self/fd/3
        """
        details = run(source, ["unshare", "-m", "sh", "-c", script, "sh", tmp_path, tiny])

        assert (details.exe, details.exe_memfd, details.exe_deleted) == ("/memfd:evil", False, False)

    def test_deleted_file_by_descriptor(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        A file that has no name any more is told with the one that it had.
        """
        copy = Path(shutil.copy(tiny, tmp_path / "gone"))
        fd = os.open(copy, os.O_RDONLY)
        copy.unlink()
        pid, _ = child(lambda: os.execve(fd, ["x"], {}))
        os.close(fd)
        details = last_exec(source, pid)

        assert (details.exe, details.exe_memfd, details.exe_deleted) == (str(copy), False, True)
        assert details.file == f"/dev/fd/{fd}"

    def test_relative_to_directory(self, source: Ebpf, tiny: Path):
        """
        execveat(2) with the descriptor of a directory.
        """
        numbers = {"x86_64": 322, "aarch64": 281}
        need(os.uname().machine in numbers, "no number for execveat")
        directory = os.open(tiny.parent, os.O_RDONLY)

        def work() -> None:
            argv = (ctypes.c_char_p * 2)(b"x", None)
            LIBC.syscall(numbers[os.uname().machine], directory, b"tiny", argv, None, 0)

        pid, _ = child(work)
        os.close(directory)
        assert last_exec(source, pid).exe == str(tiny)

    def test_by_other_thread(self, source: Ebpf, tiny: Path):
        """
        An exec by a thread that is not the leader belongs to the process, and does not end it.
        """
        code = "import os, sys, threading, time\nthreading.Thread(target=os.execv, args=(sys.argv[1], ['x'])).start()\n"
        with subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)", tiny]) as process:
            pass
        facts = life(source, process.pid)

        assert [type(fact) for fact in facts] == [Fork, Exec, Exec, Exit]
        first, second = of(facts, Exec, process.pid)
        assert whole(second).exe == str(tiny)
        assert first.start_ns == second.start_ns
        assert (first.first, second.first) == (True, False)

    def test_chain(self, source: Ebpf, tiny: Path):
        """
        Execs one after another in one process keep its start time.
        """
        with subprocess.Popen(["sh", "-c", 'exec sh -c "exec $0"', tiny]) as process:
            pass
        execs = of(life(source, process.pid), Exec, process.pid)

        assert [whole(fact).exe for fact in execs][1:] == [os.path.realpath("/bin/sh"), str(tiny)]
        assert len({fact.start_ns for fact in execs}) == 1
        assert [fact.first for fact in execs] == [True, False, False]

    @pytest.mark.parametrize(
        "argv",
        [
            [b"x", b"", b"two words", b"new\nline", b"\x1b[2J", b"", b""],
            [b"\xff\xfe\xc3", b"\xf0\x9f\x90\x8d", b"\xed\xa0\x80"],
            [b""],
            [b"x", b"y" * 5000, b"z" * 8191, b""],
            [b"forged name", b"-c"],
        ],
    )
    def test_argv_is_exact(self, source: Ebpf, tiny: Path, argv: list[bytes]):
        """
        Arguments arrive byte for byte.
        """
        details = run(source, argv, executable=tiny)

        assert details.argv is not None
        assert [os.fsencode(argument) for argument in details.argv] == argv
        assert not details.argv_truncated

    def test_no_argv(self, source: Ebpf, tiny: Path):
        """
        Without any argument the kernel adds an empty one (since 5.18).
        """
        pid, _ = child(lambda: LIBC.execve(os.fsencode(tiny), (ctypes.c_char_p * 1)(None), None))

        assert last_exec(source, pid).argv == [""]

    def test_long_argument(self, tiny: Path):
        """
        An argument of 90 kB is whole when the limit allows.
        """
        with opened(argv_limit=128 << 10) as source:
            details = run(source, ["x", "y" * 90_000, "z"], executable=tiny)

        assert details.argv == ["x", "y" * 90_000, "z"]
        assert not details.argv_truncated

    @pytest.mark.parametrize("limit", [0, 1, 5, 8192, 8193, 20_000])
    def test_argv_limit(self, tiny: Path, limit: int):
        """
        Exactly as much as the limit says arrives, and is marked as cut.
        """
        argv = ["x", "y" * 30_000]
        with opened(argv_limit=limit) as source:
            details = run(source, argv, executable=tiny)

        assert details.argv is not None
        assert "\0".join(details.argv) == "\0".join(argv)[:limit].rstrip("\0")
        assert details.argv_truncated

    def test_terminal(self, source: Ebpf):
        """
        The controlling terminal and the session.
        """
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv("/bin/true", ["true"])
        # TIOCGPTN: os.ptsname() is of Python 3.13
        (number,) = struct.unpack("I", fcntl.ioctl(terminal, 0x80045430, bytes(4)))
        os.waitpid(pid, 0)
        os.close(terminal)
        details = last_exec(source, pid)

        assert (details.tty, details.session) == (f"pts/{number}", pid)

    def test_user(self, source: Ebpf, tiny: Path):
        """
        Real and effective ids after privileges were given up.
        """
        root()

        def work() -> None:
            os.setresgid(1234, 5, 5)
            os.setresuid(4321, NOBODY, NOBODY)
            os.execv("/bin/true", ["true"])

        details = last_exec(source, child(work)[0])
        assert (details.uid, details.gid, details.euid, details.egid) == (4321, 1234, NOBODY, 5)

    def test_pid_namespace(self, source: Ebpf, tiny: Path):
        """
        The pid that the process has within its own namespace.
        """
        root()
        with subprocess.Popen(["unshare", "--pid", "--fork", tiny]) as process:
            pass
        facts = until(source, lambda facts: bool(of(facts, Exit, process.pid)))
        (details,) = [whole(fact) for fact in facts if isinstance(fact, Exec) and fact.ppid == process.pid]

        assert (details.exe, details.ns_pid) == (str(tiny), 1)
        assert details.namespaces is not None
        assert details.namespaces["pid"] != os.stat("/proc/self/ns/pid").st_ino

    def test_setuid_file(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        What the file's mode gave is named; root gains nothing by it.
        """
        root()
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o011)
        program = Path(shutil.copy(tiny, tmp_path / "su"))
        program.chmod(0o6755)
        details = run(source, [program], user=NOBODY, group=NOBODY, extra_groups=[])

        assert (details.uid, details.euid, details.privileges) == (NOBODY, 0, ["setuid", "setgid"])
        assert run(source, [program]).privileges is None
        assert run(source, [tiny], user=NOBODY).privileges is None

    def test_file_capabilities(self, source: Ebpf, tiny: Path, tmp_path: Path):
        """
        What the file's capabilities gave is named.
        """
        root()
        for parent in [tmp_path, *tmp_path.parents[:3]]:
            parent.chmod(parent.stat().st_mode | 0o011)
        program = Path(shutil.copy(tiny, tmp_path / "ping"))
        # struct vfs_ns_cap_data, version 2 with the effective bit: CAP_NET_RAW permitted
        try:
            os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
        except OSError as error:
            need(False, f"the file system of {tmp_path} has no file capabilities: {error}")
        details = run(source, [program], user=NOBODY, group=NOBODY, extra_groups=[])

        assert (details.euid, details.privileges) == (NOBODY, ["capabilities"])


class TestExit:
    @pytest.mark.parametrize("how", ["exit 77", "kill -SEGV $$", "kill -KILL $$", "kill -TERM $$", "exit 0"])
    def test_status(self, source: Ebpf, how: str):
        """
        The status is what wait(2) gives, core flag and all.
        """
        pid, status = child(lambda: os.execv("/bin/sh", ["sh", "-c", how]))
        (end,) = of(life(source, pid), Exit, pid)

        assert end.status == status
        assert end.comm == "sh"
        assert end.ppid == os.getpid()

    @pytest.mark.parametrize("last", ["exit(9)", "pthread_exit(0)", "kill(getpid(), SIGTERM), pause()"])
    def test_after_leader(self, source: Ebpf, tmp_path: Path, last: str):
        """
        A process whose first thread ends early ends with its last thread, with the code of wait(2).
        """
        program = compiled(
            tmp_path / "late",
            "#include <pthread.h>\n#include <signal.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
            f"void *late(void *x) {{ usleep(20000); {last}; return x; }}\n"
            "int main(void) { pthread_t t; pthread_create(&t, 0, late, 0); pthread_exit(0); }\n",
        )
        pid, status = child(lambda: os.execv(program, ["late"]))
        facts = life(source, pid)

        assert [type(fact) for fact in facts] == [Fork, Exec, Exit]
        assert of(facts, Exit, pid)[0].status == status
        assert facts[2].time_ns - facts[1].time_ns >= 20_000_000

    def test_once(self, source: Ebpf, tmp_path: Path):
        """
        Many threads that end at the same moment are one end.
        """
        program = compiled(
            tmp_path / "many",
            "#include <pthread.h>\n#include <unistd.h>\n"
            "static void *wait_(void *x) { pause(); return x; }\n"
            "int main(void) { pthread_t t; for (int i = 0; i < 30; i++) pthread_create(&t, 0, wait_, 0); return 3; }\n",
        )
        pids = []
        for _ in range(times(50)):
            with subprocess.Popen([program]) as process:
                pids.append(process.pid)
        facts = until(source, lambda facts: bool(of(facts, Exit, pids[-1])))

        for pid in pids:
            assert [type(fact) for fact in facts if fact.pid == pid] == [Fork, Exec, Exit]
            assert of(facts, Exit, pid)[0].status == 3 << 8

    def test_cpu_time(self, source: Ebpf, tmp_path: Path):
        """
        CPU time of all threads is near what wait4(2) gives.
        """
        program = compiled(
            tmp_path / "busy",
            "#include <pthread.h>\n#include <time.h>\n"
            "static void *spin(void *x) { while (clock() < 300 * (CLOCKS_PER_SEC / 1000)); return x; }\n"
            "int main(void) { pthread_t t; pthread_create(&t, 0, spin, 0); spin(0); pthread_join(t, 0); return 0; }\n",
        )
        pid = os.posix_spawn(program, ["busy"], {})
        _, _, usage = os.wait4(pid, 0)
        (end,) = of(life(source, pid), Exit, pid)

        assert end.usage is not None
        assert end.usage.cpu_user_ns is not None
        assert end.usage.cpu_system_ns is not None
        used = (end.usage.cpu_user_ns + end.usage.cpu_system_ns) / 1e9
        assert used == pytest.approx(usage.ru_utime + usage.ru_stime, abs=0.05)

    def test_peak_memory(self, source: Ebpf, tmp_path: Path):
        """
        Peak memory is this program's own, and not that of what ran in the process before its exec.
        """
        program = compiled(
            tmp_path / "big",
            "#include <stdlib.h>\n#include <string.h>\n"
            "int main(void) { char *p = malloc(64 << 20); memset(p, 1, 64 << 20); free(p); return 0; }\n",
        )
        with subprocess.Popen(["sh", "-c", '"$0"; exit 0', program]) as shell:
            pass
        facts = until(source, lambda facts: bool(of(facts, Exit, shell.pid)))
        (end,) = [fact for fact in facts if isinstance(fact, Exit) and fact.ppid == shell.pid]

        assert end.usage is not None
        assert end.usage.max_rss_bytes is not None
        assert 64 << 20 <= end.usage.max_rss_bytes <= 72 << 20

    def test_short_life_has_used_cpu(self, source: Ebpf, tiny: Path):
        """
        A process that no tick of the clock has hit has used some CPU nevertheless.
        """
        with subprocess.Popen([tiny]) as process:
            pass
        (end,) = of(life(source, process.pid), Exit, process.pid)

        assert end.usage is not None
        assert end.usage.cpu_user_ns is not None
        assert end.usage.cpu_system_ns is not None
        assert end.start_ns is not None
        assert 0 < end.usage.cpu_user_ns + end.usage.cpu_system_ns <= end.time_ns - end.start_ns


class TestFork:
    def test_child_without_exec(self, source: Ebpf):
        """
        A fork has its parent and its start; its details are the parent's, so it carries none.
        """
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(reader, 1)
            os._exit(0)
        stat = procfs.stat(pid)
        os.write(writer, b"x")
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        fork, end = life(source, pid)

        assert stat is not None
        assert isinstance(fork, Fork)
        assert isinstance(end, Exit)
        assert (fork.ppid, fork.start_ticks, fork.cgroup, fork.details) == (os.getpid(), stat.start_ticks, None, None)
        assert end.start_ns is not None
        assert end.start_ns // NS_PER_TICK == fork.start_ticks

    def test_no_threads(self, source: Ebpf):
        """
        Threads are no processes: neither their start nor their end is told.
        """
        code = "import threading\nfor _ in range(5):\n t = threading.Thread(target=int); t.start(); t.join()\n"
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            pass
        facts = until(source, lambda facts: bool(of(facts, Exit, process.pid)))

        assert [type(fact) for fact in facts if process.pid in (fact.pid, getattr(fact, "ppid", 0))] == [
            Fork,
            Exec,
            Exit,
        ]

    def test_off(self, tiny: Path):
        """
        Without forks there are none.
        """
        with opened(forks=False) as source:
            with subprocess.Popen([tiny]) as process:
                pass
            assert [type(fact) for fact in life(source, process.pid)] == [Exec, Exit]

    def test_few(self, tiny: Path, tmp_path: Path):
        """
        Without every fork the execs and exits are told as with all of them, also of copies that fork themselves, that
        live on while their parent becomes another program, and that outlive it.
        """
        os.mkfifo(tmp_path / "first")
        os.mkfifo(tmp_path / "second")
        script = """
            ("$0"; ("$0"; (exit 5)); exit 6)
            (read line <first; exit 7) &
            ( (read line <second; exit 8) & )
            exec sh -c 'echo >first; wait; (exit 9); echo >second; exit 10'
        """

        def ended(facts: list[Fact]) -> bool:
            return {8 << 8, 10 << 8} <= {fact.status for fact in facts if isinstance(fact, Exit)}

        with opened() as every, opened(every_fork=False) as few:
            tables = [Table(boot="b", maker=Maker("host", Clock()), kinds=("exec", "exit")) for _ in (every, few)]
            for table in tables:
                table.snapshot(procfs.snapshot(), Clock.now_ns(), tell=False)
            with subprocess.Popen(["sh", "-c", script, tiny], cwd=tmp_path, start_new_session=True) as process:
                pass
            told, births = [], []
            for source, table in zip((every, few), tables, strict=True):
                facts = until(source, ended)
                table.apply(facts)
                found = [event for event in table.drain() if getattr(event, "session", 0) == process.pid]
                told.append([timeless(event) for event in found])
                forks = {fact.pid for fact in facts if isinstance(fact, Fork) and fact.ppid == process.pid}
                births.append(len(forks))
            counted = few.kernel_counts()["fork"]

        assert told[0] == told[1]
        assert {event.code for event in told[0] if isinstance(event, events.Exit)} == {0, 5, 6, 7, 8, 9, 10}
        assert births == [4, 3]
        assert counted >= 9

    def test_time_order(self, source: Ebpf, tiny: Path):
        """
        Facts come in the order of the kernel's time, forks before execs before exits of a process.
        """
        script = 'for i in 1 2 3 4 5 6 7 8; do "$0" & "$0" & wait; done'
        with subprocess.Popen(["sh", "-c", script, tiny]) as process:
            pass
        facts = until(source, lambda facts: bool(of(facts, Exit, process.pid)))

        children = {fact.pid for fact in facts if isinstance(fact, Fork) and fact.ppid == process.pid}
        assert len(children) == 16
        for pid in children:
            assert [type(fact) for fact in facts if fact.pid == pid] == [Fork, Exec, Exit]
        times = [fact.time_ns for fact in facts]
        assert times == sorted(times)


def cgroup_directory(hierarchy: str) -> Path:
    """
    Where a cgroup hierarchy is mounted: "cgroup2", or a v1 controller.
    """
    root()
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _, place, kind, options, *_ = line.split()
            if kind == hierarchy or (kind == "cgroup" and hierarchy in options.split(",")):
                return Path(place)
    need(hierarchy == "", f"no cgroup hierarchy {hierarchy} is mounted")
    raise AssertionError


class TestCgroup:
    @pytest.mark.parametrize("hierarchy", ["cgroup2", "name=systemd", "pids", "freezer"])
    def test_path(self, source: Ebpf, tiny: Path, hierarchy: str):
        """
        The path is right although the cgroup is removed before anybody reads it.
        """
        try:
            mounted = cgroup_directory(hierarchy)
        except (pytest.fail.Exception, pytest.skip.Exception):
            if hierarchy == "cgroup2":
                raise
            pytest.skip(f"no {hierarchy} hierarchy here")
        outer = mounted / f"procwatch-{os.getpid()}"
        inner = outer / "b c"
        inner.mkdir(parents=True)
        os_exec = lambda: (inner.joinpath("cgroup.procs").write_text("0"), os.execv(tiny, ["tiny"]))  # noqa: E731
        pid, status = child(os_exec)
        inner.rmdir()
        outer.rmdir()
        details = last_exec(source, pid)

        assert status == 0
        if hierarchy in ("cgroup2", "name=systemd"):  # others give way to them
            assert details.cgroup == f"/{outer.name}/b c"
        else:
            assert details.cgroup is not None
            assert details.cgroup.startswith("/")

    def test_fork_into_another(self, source: Ebpf):
        """
        A child that clone3(2) puts into another cgroup says so.
        """
        directory = cgroup_directory("cgroup2") / f"procwatch-{os.getpid()}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY)
        # struct clone_args up to `cgroup`; CLONE_INTO_CGROUP is 1 << 33
        arguments = struct.pack("<11Q", 1 << 33, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, fd)
        buffer = ctypes.create_string_buffer(arguments, len(arguments))
        pid = LIBC.syscall(435, buffer, len(arguments))
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(fd)
        directory.rmdir()
        (fork,) = of(life(source, pid), Fork, pid)

        assert fork.cgroup == f"/{directory.name}"


def accounted(facts: list[Fact], kind: str) -> int:
    """
    How many events of a kind were told, as such or as lost.
    """
    told = sum(type(fact).__name__.lower() == kind for fact in facts)
    return told + sum(fact.kinds.get(kind, 0) for fact in facts if isinstance(fact, Lost))


class TestLoss:
    def test_is_counted_exactly(self, tiny: Path):
        """
        What the ring had no room for is counted by kind, after what it held: nothing is missing in the sum.
        """
        with opened(buffer_bytes=4096) as source:
            for _ in range(200):
                subprocess.run([tiny], check=True)
            facts = source.read()
            first = facts[-1]
            assert isinstance(first, Lost)
            assert first.count == sum(first.kinds.values()) > 300
            assert (first.where, first.exact) == ("ring_buffer", True)
            assert all(fact.time_ns <= first.time_ns == first.until_ns for fact in facts)

            # The host goes on while we count: at some moment nothing happens between the two looks.
            for _ in range(1000):
                facts += source.read()
                seen = source.kernel_counts()
                if all(accounted(facts, kind) == seen[kind] for kind in ("exec", "fork", "exit")):
                    break
            for kind in ("exec", "fork", "exit"):
                assert (kind, accounted(facts, kind)) == (kind, seen[kind])
            lost = sum(fact.count for fact in facts if isinstance(fact, Lost))
            assert lost == source.stats().lost

    def test_skipped_program(self, source: Ebpf, tiny: Path, monkeypatch: pytest.MonkeyPatch):
        """
        What the kernel says that it skipped is lost, too; on this kernel it skips nothing.
        """
        run(source, [tiny])
        assert source.stats().lost == 0
        monkeypatch.setattr(ebpf, "LOOK_NS", 0)
        source._look_ns = 0
        exits = source._program_fds[bpf_event.EXIT]
        monkeypatch.setattr(loader, "missed", lambda program: 3 if program == exits else 0)
        subprocess.run([tiny], check=True)
        (lost,) = [fact for fact in until(source, lambda facts: source.stats().lost > 0) if isinstance(fact, Lost)]

        assert (lost.count, lost.kinds) == (3, {"exit": 3})

    def test_more_behind_a_loss(self, source: Ebpf, tiny: Path, monkeypatch: pytest.MonkeyPatch):
        """
        A loss is told though records came while it was found.
        """
        losses = iter([Lost(1, 0, "ring_buffer", 3, True, 0, 1)])

        def newly_lost(counters: object) -> Lost | None:
            subprocess.run([tiny], check=True)
            return next(losses, None)

        monkeypatch.setattr(source, "_newly_lost", newly_lost)
        subprocess.run([tiny], check=True)

        assert [fact.count for fact in source.read() if isinstance(fact, Lost)] == [3]

    def test_lost_part_of_arguments(self, tiny: Path):
        """
        Arguments of which a part was dropped are not told at all.
        """
        with opened(buffer_bytes=16384, argv_limit=128 << 10) as source:
            pid, _ = child(lambda: os.execv(tiny, ["x", "y" * 30_000]))
            facts = source.read()

        for fact in of(facts, Exec, pid):
            assert (fact.argv, fact.argv_missing, fact.argv_truncated) == (None, "lost", False)

    def test_nothing_twice(self, source: Ebpf, tiny: Path):
        """
        A loss is told once, and a quiet ring gives nothing.
        """
        subprocess.run([tiny], check=True)
        while source.read():
            pass
        assert source.stats().lost == 0
        assert source.stats().undecoded == 0


class TestOptions:
    def test_mute(self, tiny: Path):
        """
        Nothing is said of a muted process; of its children, everything.
        """
        reader, writer = os.pipe()
        muted = os.fork()
        if muted == 0:
            os.read(reader, 1)
            subprocess.run([tiny], check=True)
            os._exit(0)
        with opened(mute_pid=muted) as source:
            os.write(writer, b"x")
            os.waitpid(muted, 0)
            subprocess.run([tiny], check=True)
            facts = until(source, lambda facts: any(isinstance(f, Exit) and f.ppid == os.getpid() for f in facts))
        os.close(reader)
        os.close(writer)

        assert [fact for fact in facts if fact.pid == muted] == []
        assert [type(fact) for fact in facts if getattr(fact, "ppid", 0) == muted] == [Fork, Exec, Exit]

    def test_failed_execs(self, tmp_path: Path):
        """
        An exec that failed is told with its name and errno, when it was asked for.
        """
        (tmp_path / "data").write_text("no program")
        (tmp_path / "data").chmod(0o755)
        names = [str(tmp_path / "nowhere"), str(tmp_path / "data"), str(tmp_path)]
        numbers = [2, 8, 13]
        with opened(exec_failed=True) as source:
            for name in names:
                pid, _ = child(lambda name=name: os.execv(name, ["x"]))  # type: ignore[misc]
                (failed,) = of(life(source, pid), ExecFailed, pid)
                assert failed.file == name
                assert failed.errno == numbers[names.index(name)]
        with opened() as source:
            pid, _ = child(lambda: os.execv(names[0], ["x"]))
            assert of(life(source, pid), ExecFailed, pid) == []

    def test_without_ordered_loads(self, source: Ebpf, tiny: Path, monkeypatch: pytest.MonkeyPatch):
        """
        The way for machines that reorder loads reads the same.
        """
        monkeypatch.setattr(source._ring, "_ordered", False)
        for _ in range(20):
            assert run(source, [tiny, "x"]).argv == [str(tiny), "x"]

    @pytest.mark.parametrize("options", [{"buffer_bytes": 100}, {"buffer_bytes": 1 << 40}, {"argv_limit": -1}])
    def test_impossible(self, options: dict[str, int]):
        """
        Sizes that cannot be are refused at once.
        """
        with pytest.raises(ConfigError, match="choose"):
            Ebpf(**options)  # type: ignore[arg-type]


class TestLoading:
    def test_leaves_nothing_open(self, no_leaks: None):
        """
        Neither opening, closing twice nor a failure leaves a descriptor.
        """
        with opened() as source:
            source.read()
            assert source.fileno() is not None
        source.close()
        assert source.fileno() is None
        with opened(argv_limit=5):
            pass

    def test_can_be_opened_again(self, source: Ebpf, tiny: Path):
        """
        A closed source can be opened again, and two do not disturb each other.
        """
        with opened() as other:
            pid, _ = child(lambda: os.execv(tiny, ["x"]))
            assert len(life(source, pid)) == len(life(other, pid)) == 3
        other.open()
        assert run(other, [tiny]).exe == str(tiny)
        other.close()

    def test_verifier_speaks(self, no_leaks: None, monkeypatch: pytest.MonkeyPatch):
        """
        When the kernel refuses the programs, its reason is at hand.
        """
        with opened():
            pass
        # A tracepoint that does not exist: the programs load, and cannot be attached.
        monkeypatch.setattr(Ebpf, "_programs", lambda self: [("on_exec_failed", "no_such_point")])
        with pytest.raises(SourceUnavailable, match="attach no_such_point"):
            Ebpf().open()
        # A loader program that ends at once with an error.
        real = loader.parse_blob
        wrong = struct.pack("<BBhi", 0xB7, 0, 0, -22) + struct.pack("<BBhi", 0x95, 0, 0, 0)
        monkeypatch.setattr(loader, "parse_blob", lambda blob: loader.Blob([], [], wrong, real(blob).data))
        with pytest.raises(SourceUnavailable, match="refused the programs") as caught:
            Ebpf().open()
        assert isinstance(caught.value.__cause__, loader.LoadError)

    def test_with_two_capabilities(self):
        """
        CAP_BPF and CAP_PERFMON are enough for an ordinary user.
        """
        root()

        def work() -> list[str] | None:
            PR_SET_KEEPCAPS, version = 8, 0x20080522  # noqa: N806
            LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            both = 1 << (38 - 32) | 1 << (39 - 32)  # of the second word of each set
            assert LIBC.capset(struct.pack("<II", version, 0), struct.pack("<6I", 0, 0, 0, both, both, 0)) == 0
            with opened() as source:
                return run(source, ["/bin/true", "y"]).argv

        assert elsewhere(work) == ["/bin/true", "y"]

    def test_says_what_is_missing(self):
        """
        Without capabilities the reason names them.
        """
        root()
        reason = elsewhere(lambda: str(Ebpf().probe()), uid=NOBODY)

        assert reason == "ebpf: CAP_BPF and CAP_PERFMON missing: run as root or grant them"


def test_ring_goes_round(tiny: Path):
    """
    Records that go over the end of the ring are whole.
    """
    with opened(buffer_bytes=32 << 10) as source:
        for number in range(200):
            assert run(source, [str(number)], executable=tiny).argv == [str(number)]


def test_counters_read_only(source: Ebpf):
    """
    The counts are the kernel side's: we cannot write them.
    """
    assert isinstance(source._counters, ring.Counters)
    with pytest.raises(TypeError):
        source._counters._words[0] = 1
