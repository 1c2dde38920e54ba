"""
One case on every backend: real processes, and the same events of them.

What a backend cannot know it must call missing; nothing here accepts a wrong value from any of them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from procwatch import tune
from procwatch.events import raw_of
from procwatch.sources import procfs
from tests.kernel.conftest import EMULATED, Watch

SLEEP = os.path.realpath(shutil.which("sleep") or "/bin/sleep")
SH = os.path.realpath("/bin/sh")
# An emulated machine takes ten times as long, to look at a process as for all else.
SHORT, BRIEF, PAUSE, MANY = ("1.0", "0.3", "0.5", 30) if EMULATED else ("0.03", "0.05", "0.2", 300)
pytestmark = pytest.mark.usefixtures("no_leaks")


def no_loss(watch: Watch) -> bool:
    """
    Nothing was lost; the scan's losses are an upper bound that other programs' threads move, too.
    """
    return not watch.collector.of("lost") or watch.backend == "scan"


def known(watch: Watch, event: Any, field: str, value: object) -> bool:
    """
    Whether a field is what it must be; only the scan, before Linux 6.15, may miss how a process ended.
    """
    if watch.backend == "scan" and field in event.missing:
        return True
    return bool(getattr(event, field) == value)


async def test_a_short_life_is_told_whole(watch: Watch, tmp_path: Path):
    """
    One exec and one exit, joined, with everything that the process was.
    """
    argv = ["sleep", "0.3", "0.00", "0.01"]
    started, ended = await watch.run(argv, cwd=tmp_path)
    for event in started, ended:
        assert (event.exe, event.argv, event.argv_truncated) == (SLEEP, argv, False)
        assert (event.comm, event.cwd, event.exe_deleted) == ("sleep", str(tmp_path), False)
        assert (event.uid, event.gid, event.euid, event.egid) == (os.getuid(), os.getgid(), os.geteuid(), os.getegid())
        assert event.session == os.getsid(0)
        assert (event.ppid, event.parent.pid, event.parent.comm) == (os.getpid(), os.getpid(), own("comm"))
        assert (event.script, event.cgroup) == (None, procfs.read(os.getpid()).cgroup)
        assert event.id == started.id
        assert all(getattr(event, field) is None for field in event.missing)
    assert (started.event, started.forked) == ("exec", True)
    assert ended.event == "exit"
    assert known(watch, ended, "code", 0)
    assert ended.time_ns - ended.duration_ns <= started.time_ns <= ended.time_ns
    assert ended.duration_ns >= 50_000_000
    assert abs(started.time_ns - time.time_ns()) < 60_000_000_000
    assert no_loss(watch)


def own(field: str) -> Any:
    """
    What /proc says of this program.
    """
    return getattr(procfs.read(os.getpid()), field)


@pytest.mark.parametrize("ticks_apart", [0, 1])
async def test_the_id_is_what_a_reader_of_proc_would_say(watch: Watch, ticks_apart: int):
    """
    Boot id, pid and start tick: the same in the event and in /proc.
    """
    time.sleep(ticks_apart * 0.005)  # elsewhere in the tick
    with subprocess.Popen([SLEEP, "100"]) as process:
        started = await watch.wait(lambda event: event.event == "exec" and getattr(event, "pid", 0) == process.pid)
        stat = procfs.stat(process.pid)
        assert stat is not None
        assert started.id == f"{procfs.boot_id()[:8]}-{process.pid}-{stat.start_ticks}"
        assert "id" not in started.inferred
        assert watch.watcher.processes[process.pid].id == started.id
        assert started.process().pid == process.pid
        process.kill()
        await watch.events_of(process.pid, process.wait)
    assert started.process() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
async def test_death_by_signal(watch: Watch, number: int):
    """
    The signal, and no exit code.
    """
    with subprocess.Popen([SLEEP, "100"]) as process:
        await watch.wait(lambda event: event.event == "exec" and getattr(event, "pid", 0) == process.pid)
        process.send_signal(number)
        *_, ended = await watch.events_of(process.pid, process.wait)
    assert known(watch, ended, "signal", int(number))
    assert ended.code is None


async def test_exit_codes(watch: Watch):
    """
    Code and not wait status.
    """
    *_, ended = await watch.run(["sh", "-c", f"sleep {BRIEF}; exit 42"])
    assert known(watch, ended, "code", 42)
    assert ended.signal is None


async def test_a_relative_path_is_told_absolute(watch: Watch, tmp_path: Path):
    """
    `cd /x && ./y`: the executable's true path, with links resolved, and the name as it was given.
    """
    shutil.copy(SLEEP, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    started, _ = await watch.run(["./link", "0.3"], cwd=tmp_path)
    assert (started.exe, started.argv, started.cwd) == (str(tmp_path / "real"), ["./link", "0.3"], str(tmp_path))
    assert started.file == "./link"


async def test_a_script_and_its_interpreter(watch: Watch, tmp_path: Path):
    """
    exe is what the kernel ran, script is what was asked for.
    """
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nread x\n")
    script.chmod(0o755)
    with subprocess.Popen(["./script", "a b"], cwd=tmp_path, stdin=subprocess.PIPE) as process:
        started = await watch.wait(lambda event: event.event == "exec" and getattr(event, "pid", 0) == process.pid)
        process.communicate()
        await watch.events_of(process.pid, process.wait)
    assert (started.exe, started.argv) == (SH, ["/bin/sh", "./script", "a b"])
    assert started.script == str(script)
    assert started.comm == "script"


async def test_a_deleted_executable(watch: Watch, tmp_path: Path):
    """
    Its last path, without the kernel's " (deleted)", and that it is.
    """
    copy = tmp_path / "copy"
    shutil.copy(SLEEP, copy)
    commands = 'exec 3<"$1"; rm "$1"; exec /proc/self/fd/3 0.2'
    *_, ended = await watch.run(["sh", "-c", commands, "sh", copy])
    assert (ended.exe, ended.exe_deleted) == (str(copy), True)
    assert ended.argv[1:] == ["0.2"]


_IN_MEMORY = """
import os, sys
for number in range(5):
    fd = os.memfd_create("hidden")
    os.write(fd, open(sys.argv[1], "rb").read())
    child = os.fork()
    if not child:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.execve(fd, ["innocent"], {})
    os.waitpid(child, 0)
"""


async def test_programs_in_memory(watch: Watch, tiny: Path):
    """
    Also those of 150 µs, which no file system tells of: that they were in memory always, their name if it can be known.
    """
    sources = watch.watcher.ready.sources
    parent = (await watch.run([sys.executable, "-c", _IN_MEMORY, tiny]))[0].pid
    lives: list[Any] = [event for event in watch.collector.events if getattr(event, "ppid", 0) == parent]
    told = {event.exe for event in lives if event.event == "exec"}
    assert told <= {"/memfd:hidden", os.path.realpath(sys.executable), None}
    if not {"ebpf", "taskstats"} & set(sources):
        return  # nobody else knows of a program that nobody could read
    assert [event.event for event in lives] == ["exec", "exit"] * 5
    for event in lives:
        assert (event.exe_memfd, event.exe_deleted) == (True, True)
        assert event.exe in ("/memfd:hidden", None)
        assert (event.exe is None) == ("exe" in event.missing)
        known = "ebpf" in sources or event.argv is not None
        # The kernel makes the name of a file that is executed by its descriptor the comm since 6.14.
        assert event.exe is not None or not (known or comm_tells())
        assert event.exe is None or known != ("exe" in event.inferred)


def comm_tells() -> bool:
    """
    Whether the comm of a program in memory is the name of its file.
    """
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (6, 14)


async def test_an_exec_chain_is_one_process(watch: Watch):
    """
    sh, then env, then sleep in one pid: one id, one exit, and each program told.
    """
    found = await watch.run(["sh", "-c", "sleep 0.2; exec sh -c 'sleep 0.4; exec sleep 0.3'"])
    assert len({event.id for event in found}) == 1
    assert [event.event for event in found] == ["exec", "exec", "exec", "exit"]
    assert [event.exe for event in found] == [SH, SH, SLEEP, SLEEP]
    assert [event.forked for event in found[:3]] == [True, None, None]


async def test_an_exec_by_a_thread_belongs_to_its_process(watch: Watch, threads: Path):
    """
    The thread becomes the process: no end between, the same id, one exit.
    """
    first, second, ended = await watch.run([threads, "0", SLEEP, "0.3"])
    assert [event.event for event in (first, second, ended)] == ["exec", "exec", "exit"]
    assert (first.exe, second.exe, ended.exe) == (str(threads), SLEEP, SLEEP)
    assert first.id == second.id == ended.id
    assert second.argv == [SLEEP, "0.3"]
    assert known(watch, ended, "code", 0)
    assert ended.duration_ns >= 400_000_000


async def test_a_process_outlives_its_first_thread(watch: Watch, threads: Path):
    """
    Its end is the end of the last thread, and that one's code.
    """
    started, ended = await watch.run([threads, "7"])
    assert (started.event, ended.event) == ("exec", "exit")
    assert ended.duration_ns >= 100_000_000
    assert known(watch, ended, "code", 7)
    assert ended.argv == [str(threads), "7"]


async def test_a_child_that_never_executes(watch: Watch):
    """
    A fork, with the program of the parent.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        os._exit(5)
    try:
        born = await watch.wait(lambda event: event.event == "fork" and getattr(event, "pid", 0) == child)
    finally:
        os.write(writer, b"x")
        os.close(reader)
        os.close(writer)
    _, ended = await watch.events_of(child, lambda: os.waitpid(child, 0))
    for event in born, ended:
        assert (event.exe, event.argv, event.ppid) == (own("exe"), own("argv"), os.getpid())
        assert event.id == born.id
        assert all(getattr(event, field) is not None for field in event.inferred)
    assert known(watch, ended, "code", 5)


async def test_a_child_that_ends_at_once_is_told(watch: Watch):
    """
    A fork that no exec and no look followed; too quick for the scan, which counts it.
    """
    child = os.fork()
    if child == 0:
        os._exit(6)
    os.waitpid(child, 0)
    if watch.backend == "scan":
        await watch.wait(lambda event: event.event == "lost" or getattr(event, "pid", 0) == child)
        return
    born, ended = await watch.events_of(child)
    assert (born.event, ended.event, ended.code) == ("fork", "exit", 6)
    assert born.exe == own("exe")
    assert born.id == ended.id


async def test_ancestry_survives_the_ancestors(watch: Watch):
    """
    A process knows all above it, though those between are dead when it ends.
    """
    inner = f"sleep {PAUSE}; sleep 1.25 & sleep {PAUSE}"
    with subprocess.Popen(["sh", "-c", f"sh -c 'sh -c \"{inner}\"; :'; :"]) as process:
        await asyncio.to_thread(process.wait)
        last = await watch.wait(lambda event: event.event == "exit" and getattr(event, "argv", 0) == ["sleep", "1.25"])
    assert [ancestor.pid for ancestor in last.ancestors][2:4] == [process.pid, os.getpid()]
    assert [ancestor.exe for ancestor in last.ancestors][:4] == [SH, SH, SH, own("exe")]
    assert last.parent == last.ancestors[0]


async def test_who_waits_for_its_parent_has_ended_once(watch: Watch):
    """
    A zombie is told once, however often it is looked at.
    """
    with subprocess.Popen([SLEEP, "0.3"]) as zombie:
        await asyncio.to_thread(os.waitid, os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        for _ in range(3):
            await watch.run([SLEEP, "0.6"])
        found = await watch.events_of(zombie.pid, zombie.wait)
    assert [event.event for event in found] == ["exec", "exit"]


async def test_arguments_are_bytes(watch: Watch):
    """
    What is not UTF-8 is there to the byte; empty arguments and newlines too.
    """
    argv = [b"sh", b"-c", f"sleep {BRIEF} # \n".encode(), b"\xff\xfe", b"", b"\x1b[31m", "größe".encode()]
    started, _ = await watch.run(argv)
    assert [os.fsencode(argument) for argument in started.argv] == argv
    assert "argv" in raw_of(started)


async def test_a_long_command_line(watch: Watch):
    """
    Longer than a page: whole, or as far as it goes and called truncated.
    """
    argv = ["sh", "-c", f"sleep {BRIEF}", *(f"argument-{n}" for n in range(2000))]
    started, _ = await watch.run(argv)
    if started.argv_truncated:
        assert argv[: len(started.argv) - 1] == started.argv[:-1]
    else:
        assert started.argv == argv


async def test_three_hundred_short_lives(watch: Watch):
    """
    300 children that live 30 ms: each exec with its absolute executable and all arguments, each exit joined.
    """
    if watch.backend == "scan":
        pytest.skip("the scan cannot promise it")
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, tune.PROMPT)  # as the program does
    try:
        # Ten at a time, so that it is a test of the watcher, and not of the scheduler; by a shell, for this interpreter
        # lets its own threads wait while it starts a process.
        tens = " ".join(str(ten) for ten in range(10, 10 + MANY // 10))
        lives = f'for ten in {tens}; do for one in 0 1 2 3 4 5 6 7 8 9; do sleep "{SHORT}$ten$one" & done; wait; done'
        await watch.run(["nice", "-n", "10", "sh", "-c", lives])
        await watch.run(["sleep", "0"])
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, priority)
    wanted = {("sleep", f"{SHORT}{number}") for number in range(100, 100 + MANY)}
    execs = [event for event in watch.collector.of("exec") if event.argv and tuple(event.argv) in wanted]
    assert {tuple(event.argv) for event in execs} == wanted
    assert {event.exe for event in execs} == {SLEEP}
    assert len(execs) == MANY
    exits = {event.id: event for event in watch.collector.of("exit")}
    for started in execs:
        ended = exits[started.id]
        assert (ended.argv, ended.exe, ended.code, ended.signal) == (started.argv, SLEEP, 0, None)
        assert ended.duration_ns >= 30_000_000
    assert no_loss(watch)


async def test_events_come_in_the_order_of_their_time(watch: Watch):
    """
    Also those that waited for something.
    """
    await watch.run(["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.01 & (:) & done; wait"])
    times = [event.time_ns for event in watch.collector.events]
    assert times == sorted(times)
