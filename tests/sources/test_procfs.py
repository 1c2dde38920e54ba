"""
Reading /proc of real processes: of ours and of others', ended ones, and some that wish us ill.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from procwatch.facts import EXITED, KERNEL_THREAD, PERMISSION, Details
from procwatch.sources import procfs
from tests.conftest import need
from tests.living import NOBODY, elsewhere, living, python

pytestmark = pytest.mark.usefixtures("no_leaks")
CAT = os.path.realpath(shutil.which("cat") or "/bin/cat")
ROOT = os.geteuid() == 0


def check(details: Details) -> Details:
    """
    Every field that is null has its reason, and none that is set.
    """
    for name in procfs.FIELDS:
        assert (getattr(details, name) is None) == (name in details.missing), name
    assert details.exe is None or details.exe.startswith("/")
    return details


def test_living_process() -> None:
    """
    Everything is read of a process of our own.
    """
    with living(["cat", "-", "", ""], cwd="/usr") as process:
        details = check(procfs.read(process.pid))

    assert details.missing == {}
    assert (details.exe, details.exe_deleted, details.exe_memfd) == (CAT, False, False)
    assert details.argv == ["cat", "-", "", ""]
    assert not details.argv_truncated
    assert os.path.realpath(details.file or "") == CAT
    assert details.script is None
    assert (details.comm, details.cwd, details.ppid) == ("cat", "/usr", os.getpid())
    assert (details.uid, details.euid, details.gid, details.egid) == (
        os.getuid(), os.geteuid(), os.getgid(), os.getegid(),
    )  # fmt: skip
    assert details.session == os.getsid(0)
    assert details.threads == 1
    info = os.stat(CAT)
    assert (details.exe_dev, details.exe_inode, details.exe_size) == (info.st_dev, info.st_ino, info.st_size)


def test_without_file() -> None:
    """
    Who does not ask for the name as given to execve gets neither it nor a reason.
    """
    details = procfs.read(os.getpid(), with_file=False)

    assert details.file is None
    assert details.missing == {}


def test_terminal() -> None:
    """
    A process with a controlling terminal has its name below /dev.
    """
    master, slave = os.openpty()
    name = os.ttyname(slave).removeprefix("/dev/")
    code = f"import os, fcntl, termios; os.setsid(); fcntl.ioctl(os.open('/dev/{name}', os.O_RDWR), termios.TIOCSCTTY)"
    try:
        with python(code) as process:
            details = check(procfs.read(process.pid))
    finally:
        os.close(master)
        os.close(slave)

    assert details.tty == name
    assert details.session == process.pid


def test_gone() -> None:
    """
    A process that is gone has one reason for all fields, and a pid that cannot be is gone as well.
    """
    process = subprocess.Popen(["true"])
    process.wait()
    for pid in (process.pid, 1 << 22, 1 << 70):
        details = check(procfs.read(pid))

        assert set(details.missing.values()) == {EXITED}
        assert set(details.missing) == set(procfs.FIELDS)


def test_zombie() -> None:
    """
    A zombie has lost its memory, and still tells who it was, for whom, and how it ended.
    """
    process = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    details = check(procfs.read(process.pid))
    status = procfs.exit_status(process.pid, details.start_ticks or 0)
    alive = [fact.pid for fact in procfs.snapshot()]
    process.wait()

    assert {details.missing.get(name) for name in ("exe", "argv", "cwd", "file")} == {EXITED}
    assert (details.comm, details.ppid, details.uid) == ("sh", os.getpid(), os.getuid())
    assert os.waitstatus_to_exitcode(status or 0) == 3
    assert process.pid not in alive
    assert os.getpid() in alive


def test_exit_status_of_the_living() -> None:
    """
    A process that lives has no exit status, and neither has one that took its number.
    """
    assert procfs.exit_status(os.getpid(), procfs.read(os.getpid()).start_ticks or 0) is None


def test_kernel_thread() -> None:
    """
    A kernel thread has no program, and says that it is one.
    """
    stat = procfs.stat(2)
    need(stat and stat.kernel_thread, "no kernel threads in this pid namespace")
    for details in [procfs.read(2), *([elsewhere(lambda: procfs.read(2), uid=NOBODY)] if ROOT else [])]:
        check(details)

        assert {name for name, why in details.missing.items() if why == KERNEL_THREAD} == {
            "exe", "exe_deleted", "argv", "cwd", "file",
        }  # fmt: skip
        assert details.comm == "kthreadd"
        assert details.uid == 0


def test_another_users_process_as_root() -> None:
    """
    Root reads everything of anybody.
    """
    need(ROOT, "needs root")
    with living(["cat"], user=NOBODY, group=NOBODY, extra_groups=[]) as process:
        details = check(procfs.read(process.pid))

    assert details.missing == {}
    assert (details.exe, details.argv, details.uid, details.egid) == (CAT, ["cat"], NOBODY, NOBODY)


def test_roots_process_as_another_user() -> None:
    """
    Without privileges argv of others can be read, and exe, cwd and file say "permission".
    """
    need(ROOT, "needs root")
    with living(["cat", "-"]) as process:
        details = check(elsewhere(lambda: procfs.read(process.pid), uid=NOBODY))

    assert details.missing == dict.fromkeys(("exe", "exe_deleted", "cwd", "file"), PERMISSION)
    assert (details.argv, details.comm, details.uid, details.ppid) == (["cat", "-"], "cat", 0, os.getpid())


def test_zombie_of_another_user() -> None:
    """
    The exit code of another user's zombie is withheld, and not taken for 0.
    """
    need(ROOT, "needs root")
    process = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    start = procfs.read(process.pid).start_ticks or 0
    details, status = elsewhere(lambda: (procfs.read(process.pid), procfs.exit_status(process.pid, start)), uid=NOBODY)
    process.wait()

    assert status is None
    assert check(details).missing["argv"] == EXITED


@pytest.mark.parametrize("hidepid", ["1", "2", "4"])
def test_hidepid(hidepid: str) -> None:
    """
    Where /proc hides others' processes they are "permission", not "exited", and it is noticed.
    """
    need(ROOT, "needs root")
    process = subprocess.Popen(["true"])
    process.wait()

    def look() -> tuple[bool, Details, Details, Details]:
        return procfs.hidden(), procfs.read(1), procfs.read(os.getpid()), procfs.read(process.pid)

    hidden, other, own, gone = elsewhere(look, uid=NOBODY, hidepid=hidepid)

    assert hidden
    assert set(check(other).missing.values()) == {PERMISSION}
    assert own.argv
    assert set(gone.missing.values()) == {EXITED}
    assert not elsewhere(procfs.hidden, uid=NOBODY)
    assert not procfs.hidden()


def test_deleted(tmp_path: Path) -> None:
    """
    A removed executable keeps its path, without the kernel's suffix; so does a removed working directory.
    """
    program, place = tmp_path / "cat", tmp_path / "place"
    shutil.copy(CAT, program)
    place.mkdir()
    with living([str(program)], cwd=place) as process:
        program.unlink()
        place.rmdir()
        details = check(procfs.read(process.pid))

    assert (details.exe, details.exe_deleted, details.exe_memfd) == (str(program), True, False)
    assert details.cwd == str(place)
    assert details.exe_inode


def test_removed_with_a_link_left(tmp_path: Path) -> None:
    """
    An executable whose name was removed is deleted, though the file lives on under another.
    """
    program = tmp_path / "cat"
    shutil.copy(CAT, program)
    os.link(program, tmp_path / "other")
    with living([str(program)]) as process:
        program.unlink()
        details = check(procfs.read(process.pid))

    assert (details.exe, details.exe_deleted) == (str(program), True)


def test_called_deleted(tmp_path: Path) -> None:
    """
    A file and a directory that are called so are not taken for removed ones.
    """
    place = tmp_path / "place (deleted)"
    place.mkdir()
    program = place / "cat (deleted)"
    shutil.copy(CAT, program)
    with living([str(program)], cwd=place) as process:
        before = check(procfs.read(process.pid))
        program.unlink()
        after = check(procfs.read(process.pid))

    assert (before.exe, before.exe_deleted, before.cwd) == (str(program), False, str(place))
    assert (after.exe, after.exe_deleted) == (str(program), True)


def test_memfd() -> None:
    """
    A program in anonymous memory has the name of that, and counts as deleted, as the kernel says.
    """
    fd = os.memfd_create("hello (deleted)", 0)
    try:
        os.write(fd, Path(CAT).read_bytes())
        with living(["cat"], executable=f"/proc/self/fd/{fd}", pass_fds=[fd]) as process:
            details = check(procfs.read(process.pid))
    finally:
        os.close(fd)

    assert (details.exe, details.exe_deleted, details.exe_memfd) == ("/memfd:hello (deleted)", True, True)


def test_chroot(tmp_path: Path) -> None:
    """
    A process in another root directory has the paths that the host sees.
    """
    need(ROOT, "needs root")
    with python(f"import os; os.chroot({str(tmp_path)!r}); os.chdir('/')") as process:
        details = check(procfs.read(process.pid))

    assert details.cwd == str(tmp_path)
    assert details.exe == os.path.realpath(sys.executable)


def test_long_command_line() -> None:
    """
    A command line of many pages is read whole.
    """
    arguments = [f"{number}" * 1000 for number in range(60)]
    with living(["sh", "-c", "exec cat", *arguments]) as process:
        assert procfs.read(process.pid).argv == ["cat"]
    with living(["sh", "-c", "read x; echo $x; read x", *arguments]) as process:
        details = check(procfs.read(process.pid))

    assert (details.argv or [])[3:] == arguments
    assert not details.argv_truncated


def test_endless_command_line() -> None:
    """
    Of more than 128 KiB the first are kept, and it says so.
    """
    arguments = ["é" * 30_000] * 3
    with living(["sh", "-c", "read x; echo $x; read x", *arguments]) as process:
        details = check(procfs.read(process.pid))

    assert details.argv_truncated
    argv = details.argv or []
    assert argv[3:5] == arguments[:2]
    assert len("\0".join(argv).encode("utf-8", "surrogateescape")) == procfs.MAX_CMDLINE


def test_empty_name() -> None:
    """
    One empty argument is not the same as none.
    """
    with living([""], executable=CAT) as process:
        assert check(procfs.read(process.pid)).argv == [""]


@pytest.mark.parametrize("name", [b"a) R 1 (b", b"new\nline", b"\xff\xfe", b") Z 1 1"])
def test_comm(tmp_path: Path, name: bytes) -> None:
    """
    A name that looks like the rest of the line, or like nothing at all, is a name.
    """
    program = os.fsencode(tmp_path) + b"/" + name
    shutil.copy(os.fsencode(CAT), program)
    with living([program]) as process:
        details = check(procfs.read(process.pid))

    assert (details.comm or "").encode("utf-8", "surrogateescape") == name[:15]
    assert (details.exe or "").encode("utf-8", "surrogateescape") == program
    assert details.ppid == os.getpid()


def test_script(tmp_path: Path) -> None:
    """
    A script is known by its file, by an absolute path, and exe is the interpreter.
    """
    script = tmp_path / "a-rather-long-script-name"
    script.write_text("#!/bin/sh -e\nread x; echo $x; read x\n")
    script.chmod(0o755)
    with living([f"./{script.name}", "argument"], cwd=tmp_path) as process:
        details = check(procfs.read(process.pid))

    assert details.script == str(script)
    assert details.file == f"./{script.name}"
    assert details.exe == os.path.realpath("/bin/sh")
    assert details.argv == ["/bin/sh", "-e", f"./{script.name}", "argument"]


def test_no_script(tmp_path: Path) -> None:
    """
    A script that an interpreter was told to read was not executed itself.
    """
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nread x; echo $x; read x\n")
    with living(["sh", str(script)], cwd=tmp_path) as process:
        assert check(procfs.read(process.pid)).script is None


_FORGE = """
import ctypes, os, struct, sys
name = sys.argv[1].encode()
ctypes.CDLL(None).prctl(15, os.path.basename(name)[:15], 0, 0, 0)
with open("/proc/self/auxv", "rb") as file:
    address = dict(struct.iter_unpack("=QQ", file.read()))[31]
with open("/proc/self/mem", "r+b", buffering=0) as memory:
    memory.seek(address)
    memory.write(name + bytes(1))
"""


def test_forged_script(tmp_path: Path) -> None:
    """
    A process that gives itself out as a FIFO or a device makes us open neither: that could block, or do worse.
    """
    need(struct.calcsize("P") == 8, "needs a 64-bit machine")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    python_link = tmp_path / ("p" * 40)  # room for the forged name
    python_link.symlink_to(sys.executable)
    echo = "\nprint(sys.stdin.readline(), end='', flush=True); sys.stdin.read()"
    with living([str(python_link), "-c", _FORGE + echo, str(fifo)]) as process:
        details = check(procfs.read(process.pid))

    assert details.file == str(fifo)
    assert (details.argv or [])[3] == str(fifo)
    assert details.script is None


# mov eax, 3 (read); ebx, 0; ecx, esp; edx, 1; int 0x80; test eax, eax; jle exit; mov eax, 4; mov ebx, 1; int 0x80; loop
_ECHO_I386 = bytes.fromhex(
    "b803000000 31db 89e1 ba01000000 cd80 85c0 7e0e b804000000 bb01000000 cd80 ebde b801000000 cd80"
)


def test_32_bit_process(tmp_path: Path) -> None:
    """
    The name as given to execve is found in the memory of a 32-bit process, too.
    """
    need(os.uname().machine == "x86_64", "needs x86_64")
    base, size = 0x08048000, 84 + len(_ECHO_I386)
    program = tmp_path / "echo32"
    program.write_bytes(
        struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        + struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 5, 4096)
        + _ECHO_I386
    )
    program.chmod(0o755)
    try:
        with living([str(program), "argument"]) as process:
            details = check(procfs.read(process.pid))
    except OSError:
        need(False, "this kernel does not run 32-bit programs")

    assert (details.file, details.exe, details.argv) == (str(program), str(program), [str(program), "argument"])


_LEAVE = """
import ctypes, sys, threading
def stay():
    print(sys.stdin.readline(), end="", flush=True)
    sys.stdin.read()
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(ctypes.c_long({exit}), ctypes.c_long(0))
"""


def test_leader_has_left() -> None:
    """
    A process whose first thread has ended lives on: the others tell of it.
    """
    number = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    need(number, "the number of exit(2) on this machine is not known")
    with living([sys.executable, "-c", _LEAVE.format(exit=number)]) as process:
        while (state := procfs.stat(process.pid)) is not None and state.state != "Z":
            os.sched_yield()  # the timeout of all tests ends what never comes
        details = check(procfs.read(process.pid))

    assert state is not None
    assert not state.ended
    assert details.missing == {}
    assert details.exe == os.path.realpath(sys.executable)
    assert details.start_ticks == state.start_ticks


def test_thread() -> None:
    """
    A thread is told from a process by its exit signal.
    """
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        stat = procfs.stat(thread.native_id or 0)
        assert stat is not None
        assert stat.exit_signal == -1
        assert thread.native_id not in procfs.pids()
    finally:
        stop.set()
        thread.join()
    own = procfs.stat(os.getpid())
    assert own is not None
    assert own.exit_signal == signal.SIGCHLD


def test_nested_pid_namespace() -> None:
    """
    A process in a pid namespace of its own has its number there, too.
    """
    need(ROOT and shutil.which("unshare"), "needs root and unshare")
    with living(["unshare", "--pid", "--fork", "--kill-child", "cat"]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        details = check(procfs.read(int(children[0])))

    assert details.ns_pid == 1
    assert procfs.read(os.getpid()).ns_pid is None


def test_reads_while_programs_change() -> None:
    """
    exe and argv are always of one program, however often the process executes another.
    """
    need(shutil.which("bash") and shutil.which("dash"), "needs bash and dash")
    code = '[ $1 -gt 0 ] || exit 0; n=dash; [ $(($1 % 2)) = 0 ] && n=bash; exec $n -c "$0" "$0" $(($1 - 1))'
    process = subprocess.Popen(["dash", "-c", code, code, "200"])
    while process.poll() is None:
        details = check(procfs.read(process.pid))
        if details.exe and details.argv and details.exe.endswith("sh"):  # argv[0] is exe's name, unless torn
            assert os.path.basename(details.exe) == details.argv[0]


def test_boot_id() -> None:
    """
    The boot id is a UUID.
    """
    assert [len(part) for part in procfs.boot_id().split("-")] == [8, 4, 4, 4, 12]
