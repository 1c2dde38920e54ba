"""
fanotify on the running kernel: the file that each exec opens, wherever it lies.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from procwatch.facts import Fact, Lost, Opened
from procwatch.sources.fanotify import Fanotify
from procwatch.table.opens import match
from tests.conftest import need
from tests.kernel.conftest import EMULATED

WAIT_S = 10
FLOOD = 1200 if EMULATED else 2500  # more than the soft limit of descriptors most often is, and than one read takes


@contextmanager
def listening(**options: bool) -> Iterator[Fanotify]:
    source = Fanotify(**options)
    problem = source.probe()
    need(problem is None, str(problem))
    source.open()
    try:
        source.read()
        yield source
    finally:
        source.close()


@pytest.fixture
def source() -> Iterator[Fanotify]:
    with listening() as source:
        yield source


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """
    Mounts a new tmpfs at each call, and unmounts all.
    """
    with ExitStack() as stack:

        def mount() -> Path:
            point = tmp_path / f"tmpfs{len(list(tmp_path.iterdir()))}"
            point.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "test", str(point)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(point)], check=True)
            return point

        yield mount


def spawn(*argv: str | Path) -> int:
    process = subprocess.Popen([str(arg) for arg in argv], stdout=subprocess.DEVNULL)
    process.wait()
    return process.pid


def opens(facts: list[Fact], pid: int) -> list[Opened]:
    return [fact for fact in facts if isinstance(fact, Opened) and fact.pid == pid]


def exes(facts: list[Fact], pid: int, execs: int = 1) -> list[str | None]:
    ran, _ = match(opens(facts, pid), execs)
    return [one.exe.path if one.exe is not None else None for one in ran]


def when_marked(source: Fanotify, program: Path) -> list[Fact]:
    """
    Run a program on a new filesystem until it is heard: the mark comes from a thread, soon, and nobody tells when.
    """
    for _ in range(1000):
        pid = spawn(program)
        facts = source.read()
        if opens(facts, pid):
            assert exes(facts, pid) == [str(program)]
            return facts
    pytest.fail(f"{program} was never heard")


class TestPaths:
    def test_short_lived_by_any_name(self, source: Fanotify, tiny: Path) -> None:
        """
        Absolute, relative and linked names all give the full path, long after the process has gone.
        """
        link = tiny.parent / "link"
        link.symlink_to("tiny")
        started = [subprocess.Popen([name], cwd=tiny.parent) for name in (str(tiny), "./tiny", str(link))]
        for process in started:
            process.wait()

        facts = source.read()

        assert [exes(facts, process.pid) for process in started] == [[str(tiny)]] * 3

    def test_dynamic_binary_and_identity(self, source: Fanotify) -> None:
        """
        The binary comes first, then its loader; device, inode and size are those of the file.
        """
        true = os.path.realpath(shutil.which("true") or "")
        pid = spawn(true)

        binary, loader = opens(source.read(), pid)

        status = os.stat(true)
        assert (binary.path, binary.dev, binary.inode, binary.size) == (
            true, status.st_dev, status.st_ino, status.st_size
        )  # fmt: skip
        assert binary.interpreter is not None
        assert os.path.realpath(binary.interpreter) == loader.path

    def test_script_chain(self, source: Fanotify, tiny: Path, tmp_path: Path) -> None:
        """
        A script whose interpreter is a script: first both, then the binary.
        """
        inner, outer = tmp_path / "inner", tmp_path / "outer"
        inner.write_text(f"#!{tiny}\n")
        outer.write_text(f"#!{inner} -x\n")
        for path in (inner, outer):
            path.chmod(0o755)
        pid = spawn(outer)

        found = opens(source.read(), pid)

        assert [fact.path for fact in found] == [str(outer), str(inner), str(tiny)]
        (ran,), _ = match(found, 1)
        assert ran.script is found[0]

    def test_deleted_and_strange_names(self, source: Fanotify, tiny: Path, tmp_path: Path) -> None:
        """
        A file deleted after its exec is told as such, one that is called so is not; bytes that are no text are kept.
        """
        strange = tmp_path / "caf\udcff (deleted)"
        shutil.copy(tiny, strange)
        pid = spawn(strange)
        (named,) = opens(source.read(), pid)
        pid = spawn(strange)
        strange.unlink()
        (deleted,) = opens(source.read(), pid)

        assert (named.path, named.deleted) == (str(strange), False)
        assert (deleted.path, deleted.deleted) == (str(strange), True)

    def test_failed_execs(self, source: Fanotify, tiny: Path) -> None:
        """
        An exec that failed with E2BIG may leave its open before that of the one that ran (since Linux 6.8 it does).
        """
        pid = os.fork()
        if pid == 0:
            try:
                os.execv("/bin/sh", ["x" * 100_000] * 100)
            except OSError:
                os.execv(tiny, ["tiny"])
            finally:
                os._exit(9)
        os.waitpid(pid, 0)

        found = opens(source.read(), pid)

        status = tiny.stat()
        (ran,), _ = match(found, 1, final=(status.st_dev, status.st_ino), ended=True)
        assert ran.exe is not None
        assert ran.exe.path == str(tiny)

    def test_script_without_its_interpreter_is_nobodys(self, source: Fanotify, tmp_path: Path) -> None:
        """
        What a process executes after such a script is not taken for the script's interpreter.
        """
        script = tmp_path / "lost.sh"
        script.write_text("#!/nowhere/at/all -x\n")
        script.chmod(0o755)
        go_on = f"import os\ntry: os.execv({str(script)!r}, ['x'])\nexcept OSError: os.execv('/bin/cat', ['cat'])"
        with subprocess.Popen([sys.executable, "-c", go_on], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            assert process.stdout.read(1) == b"x"  # so cat runs now
            found = opens(source.read(), process.pid)

        assert str(script) in [one.path for one in found]
        *_, last = match(found, 2)[0]
        assert last.exe is not None
        assert (last.exe.path, last.script) == (os.path.realpath("/bin/cat"), None)

    def test_second_open_of_a_file_is_swallowed(self, source: Fanotify, tiny: Path) -> None:
        """
        The kernel's queue holds a file once for each process: the fact that the rule is built on.
        """
        process = subprocess.Popen(["sh", "-c", f"exec sh -c 'exec {tiny}'"])
        process.wait()

        assert len(opens(source.read(), process.pid)) == 3

    def test_own_opens_are_not_told(self, source: Fanotify) -> None:
        """
        What this process itself executes is not of interest, what its children do is.
        """
        spawn("true")

        assert all(fact.pid != os.getpid() for fact in source.read())


class TestMounts:
    def test_mounted_later(self, source: Fanotify, tiny: Path, tmpfs: Callable[[], Path]) -> None:
        """
        A filesystem mounted after the start is heard, also when its device number was another's before.
        """
        for _ in range(2):
            program = tmpfs() / "tiny"
            shutil.copy(tiny, program)
            when_marked(source, program)

    def test_other_namespace(self, tiny: Path) -> None:
        """
        A filesystem that only another mount namespace has is heard, by the path inside.
        """
        script = 'mount -t tmpfs test /mnt && cp "$0" /mnt/tiny && echo && read go && /mnt/tiny && echo && read end'
        with subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, str(tiny)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as inside:
            assert inside.stdout is not None
            assert inside.stdin is not None
            need(inside.stdout.readline(), "needs unshare(1) and mount(8)")
            with listening() as source:  # finds the namespace by its process
                inside.stdin.write(b"\n")
                inside.stdin.flush()
                inside.stdout.readline()  # it has run, and the namespace still is

                assert "/mnt/tiny" in [fact.path for fact in source.read() if isinstance(fact, Opened)]

    def test_namespace_seen_later(self, source: Fanotify, tiny: Path) -> None:
        """
        A namespace that the source is told of is heard from then on, also what is mounted in it afterwards.
        """
        script = 'echo; read go; mount -t tmpfs test /mnt; cp "$0" /mnt/tiny; while read go; do /mnt/tiny; echo; done'
        with subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, str(tiny)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as inside:
            assert inside.stdout is not None
            assert inside.stdin is not None
            need(inside.stdout.readline(), "needs unshare(1) and mount(8)")
            source.seen(inside.pid, os.stat(f"/proc/{inside.pid}/ns/mnt").st_ino)
            inside.stdin.write(b"\n")
            for _ in range(1000):
                inside.stdin.write(b"\n")
                inside.stdin.flush()
                inside.stdout.readline()
                if any(fact.path == "/mnt/tiny" for fact in source.read() if isinstance(fact, Opened)):
                    return
        pytest.fail("/mnt/tiny was never heard")

    def test_chroot_shows_what_proc_shows(self, source: Fanotify, tmp_path: Path) -> None:
        """
        In a chroot the path is that of /proc/PID/exe: from the real root.
        """
        sleep = tmp_path / "sleep"
        source_code = "#include <unistd.h>\nint main(void){char c; return (int)read(0, &c, 1);}"
        command = ["gcc", "-static", "-o", str(sleep), "-x", "c", "-"]
        need(shutil.which("gcc"), "needs gcc")
        subprocess.run(command, input=source_code, text=True, check=True)
        source.read()
        with subprocess.Popen(["chroot", str(tmp_path), "/sleep"], stdin=subprocess.PIPE) as process:
            facts: list[Fact] = []
            while not any(fact.path == str(sleep) for fact in opens(facts, process.pid)):
                assert process.poll() is None
                facts += source.read()
            exe = os.readlink(f"/proc/{process.pid}/exe")
            while exe != str(sleep):  # opened, not yet executed
                exe = os.readlink(f"/proc/{process.pid}/exe")

    def test_overlay(self, source: Fanotify, tiny: Path, tmpfs: Callable[[], Path], tmp_path: Path) -> None:
        """
        overlayfs opens the layer's file as well: what is reported is the file of the overlay.
        """
        upper, lower, merged = tmpfs(), tmp_path / "lower", tmp_path / "merged"
        for path in (lower, merged, upper / "u", upper / "w"):
            path.mkdir()
        shutil.copy(tiny, lower / "tiny")
        layers = f"lowerdir={lower},upperdir={upper}/u,workdir={upper}/w"
        mounted = subprocess.run(
            ["mount", "-t", "overlay", "-o", layers, "test", str(merged)], stderr=subprocess.DEVNULL
        )
        need(mounted.returncode == 0, "needs overlayfs")
        try:
            facts = when_marked_overlay(source, merged / "tiny")
        finally:
            subprocess.run(["umount", "-l", str(merged)], check=True)

        assert [fact.over for fact in facts] == [False, True][: len(facts)]


# Before Linux 6.5 the open of the layer's file was not told.
OVERLAY_OPENS = 2 if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 5) else 1


def when_marked_overlay(source: Fanotify, program: Path) -> list[Opened]:
    for _ in range(1000):
        pid = spawn(program)
        found = opens(source.read(), pid)
        if len(found) == OVERLAY_OPENS:
            assert exes(list(found), pid) == [str(program)]
            return found
    pytest.fail(f"{program} was never heard")


class TestQueue:
    def test_overflow_is_told(self, tiny: Path) -> None:
        """
        With the kernel's own limit a flood ends in a loss, told where it happened, and then goes on.
        """
        with open("/proc/sys/fs/fanotify/max_queued_events") as file:
            limit = int(file.read())
        need(limit <= 20_000, "fs.fanotify.max_queued_events is too large to fill")
        with listening(unlimited=False) as source:
            flood(tiny, limit + 100)
            facts = source.read()
            spawn(tiny)
            after = source.read()

        assert sum(isinstance(fact, Lost) and fact.where == "fanotify_queue" for fact in facts) == 1
        assert str(tiny) in [fact.path for fact in after if isinstance(fact, Opened)]

    def test_flood_is_complete_and_closes_all(self, source: Fanotify, tiny: Path) -> None:
        """
        More events than descriptors are allowed: none is lost, none stays open.
        """
        before = set(os.listdir("/proc/self/fd"))
        flood(tiny, FLOOD)

        assert sum(isinstance(fact, Opened) and fact.path == str(tiny) for fact in source.read()) == FLOOD
        assert set(os.listdir("/proc/self/fd")) == before

    def test_alone_is_woken(self, tiny: Path) -> None:
        """
        Used alone it is readable when something was executed.
        """
        with listening(alone=True) as source:
            fd = source.fileno()
            assert fd is not None
            pid = spawn(tiny)

            assert select.select([fd], [], [], WAIT_S)[0]
            assert opens(source.read(), pid)

    def test_nobody_came(self, source: Fanotify, tiny: Path) -> None:
        """
        Events that nobody fetches make themselves heard, so that they do not keep files busy.
        """
        fd = source.fileno()
        assert fd is not None
        pid = spawn(tiny)

        assert select.select([fd], [], [], WAIT_S)[0]
        assert opens(source.read(), pid)
        assert not select.select([fd], [], [], 0)[0]


def flood(program: Path, count: int) -> None:
    """
    Executed from a process of its own, which is quicker than from this one.
    """
    code = "import os,sys\nfor _ in range(int(sys.argv[2])): os.waitpid(os.posix_spawn(sys.argv[1], ['x'], {}), 0)"
    subprocess.run([sys.executable, "-S", "-c", code, str(program), str(count)], check=True)


def test_closes_all(no_leaks: None) -> None:
    """
    Nothing stays open, and closing twice does no harm.
    """
    with listening() as source:
        source.read()
    source.close()

    assert source.read() == []
    assert source.stats().undecoded == 0
