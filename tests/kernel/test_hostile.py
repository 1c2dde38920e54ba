"""
Processes that lie, hide, race and crowd, on every backend: each line stays one valid line, and the table is right.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from procwatch import marked, storms
from procwatch.sources.select import LADDER, Options
from tests.conftest import need
from tests.kernel.test_loss import Agent, Line, agent

BACKENDS = tuple(LADDER)
LIBC = ctypes.CDLL(None, use_errno=True)
NASTY = b'n\n\x1b[31m\xff"\'\\ {"event":"stop"} (deleted)'
PR_SET_NAME = 15
PTRACE_TRACEME = 0


@pytest.fixture(scope="module")
def waits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A program that waits for its standard input: the slower sources can look at it in peace.
    """
    need(storms.program(), "no program for this machine")
    path = tmp_path_factory.mktemp("waits") / "waits"
    storms.write(str(path), storms.program() or b"")
    return path


@pytest.fixture(params=BACKENDS, scope="module")
def watching(request: pytest.FixtureRequest) -> Iterator[Agent]:
    """
    A running agent on each backend, one for all tests.
    """
    with agent(request.param) as running:
        yield running


def told(running: Agent, pid: int, event: str = "exec") -> Line:
    """
    The first line of this kind about a process.
    """
    return running.read_until(event, pid=pid)


def start(argv: list[str | bytes], **options: Any) -> subprocess.Popen[bytes]:
    """
    A process that waits on its standard input; its exec is over.
    """
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)


def test_names_with_everything(watching: Agent, waits: Path, tmp_path: Path):
    """
    A directory, a program and arguments with newlines, escapes, quotes, bytes that are no text: all of it comes whole.
    """
    directory = os.path.join(os.fsencode(tmp_path), NASTY)
    os.mkdir(directory)
    path = os.path.join(directory, NASTY)
    storms.write(os.fsdecode(path), storms.program() or b"")
    with start([path, NASTY, b"", b"\n"], cwd=directory) as process:
        line = told(watching, process.pid)
        process.communicate(b"x")

    def exact(field: str) -> Any:
        raw = line["raw"][field]
        return [base64.b64decode(one) for one in raw] if isinstance(raw, list) else base64.b64decode(raw)

    assert exact("exe") == exact("file") == path
    assert exact("cwd") == directory
    assert exact("argv") == [path, NASTY, b"", b"\n"]
    assert "\ufffd" in line["exe"]
    assert line["exe_deleted"] is False


def test_deleted_twice(watching: Agent, tmp_path: Path):
    """
    A program called "x (deleted)" is not taken for one that was removed, and one that was removed is.
    """
    path = tmp_path / "x (deleted)"
    storms.write(str(path), storms.program() or b"")
    with start([str(path)]) as process:
        line = told(watching, process.pid)
        process.communicate(b"x")

    assert (line["exe"], line["exe_deleted"]) == (str(path), False)


def test_long_arguments(watching: Agent, waits: Path):
    """
    Two megabytes of arguments: what is kept is their beginning, and said to be cut.
    """
    argv = [str(waits), *(str(number).rjust(100_000, "x") for number in range(18))]
    need(os.sysconf("SC_ARG_MAX") > 1_900_000, "arguments are limited to less here")
    with start(list(argv)) as process:
        line = told(watching, process.pid)
        process.communicate(b"x")

    shown = line["argv"]
    assert shown[0] == str(waits)
    assert shown == argv or line["argv_truncated"]
    assert all(one == given for one, given in zip(shown[:-1], argv, strict=False))


def test_no_arguments_at_all(watching: Agent, waits: Path, tmp_path: Path):
    """
    argc 0: the kernel makes it one empty argument (Linux 5.18), and older ones leave the list empty.
    """
    program = tmp_path / "empty.py"
    call = f"ctypes.CDLL(None).execve(os.fsencode({str(waits)!r}), empty, empty)"
    program.write_text(f"import ctypes, os; empty = (ctypes.c_char_p * 1)(); {call}")
    with start([sys.executable, str(program)]) as process:
        line = watching.read_until("exec", pid=process.pid, exe=str(waits))
        process.communicate(b"x")

    assert line["argv"] in ([""], [])


def test_deep_directory(watching: Agent, tmp_path: Path):
    """
    A program 4000 bytes deep is told by its path, or by the reason why not; never by a wrong or relative one.
    """
    here = os.getcwd()
    deep = str(tmp_path)
    try:
        os.chdir(deep)
        while len(deep) < 3800:
            name = "d" * 200
            os.mkdir(name)
            os.chdir(name)
            deep = f"{deep}/{name}"
        storms.write("deep", storms.program() or b"")
        process = start(["./deep"])
    finally:
        os.chdir(here)
    with process:
        line = told(watching, process.pid)
        process.communicate(b"x")

    assert line["exe"] == f"{deep}/deep" or (line["exe"] is None and "exe" in line["missing"])
    assert line["cwd"] == deep or "cwd" in line["missing"]


def test_forged_names(watching: Agent, waits: Path):
    """
    A process that writes a stat line and a JSON line into its own comm, and other arguments over its own, is itself.
    """
    code = (
        "import sys; open('/proc/self/comm','wb').write(b') R 1 (x\\n'); print(flush=True); sys.stdin.readline();"
        'import os; os.execv(sys.argv[1], [b\'\\n{"event":"stop"}\'])'
    )
    with start([sys.executable, "-c", code, str(waits)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        line = watching.read_until("exec", pid=process.pid, exe=str(waits))
        process.communicate(b"x")
    end = told(watching, process.pid, "exit")

    assert (line["ppid"], end["id"]) == (os.getpid(), line["id"])
    assert line["argv"] == ['\n{"event":"stop"}']
    assert end["code"] in (0, None)


def test_many_execs_in_one_life(watching: Agent, waits: Path, tmp_path: Path):
    """
    A process that executes program after program is one process with one id, and ends once.
    """
    script = tmp_path / "chain.sh"
    storms.write(str(script), f'#!/bin/sh\n[ "$1" = 0 ] && exec "{waits}"\nexec "$0" $(($1 - 1))\n'.encode())
    with start([str(script), "25"]) as process:
        process.communicate()
    end = told(watching, process.pid, "exit")
    mine = [line for line in watching.lines if line.get("pid") == process.pid]

    assert {line["id"] for line in mine} == {end["id"]}
    assert [line["event"] for line in mine].count("exit") == 1
    assert all(line["exe"] is None or line["exe"].startswith("/") for line in mine)


def test_traced_and_stopped(watching: Agent):
    """
    A process that is traced and stopped is told like any other, and its end as it was.
    """
    pid = os.fork()
    if pid == 0:
        LIBC.ptrace(PTRACE_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(7)
    os.waitpid(pid, os.WUNTRACED)
    time.sleep(0.15)  # longer than a fork is held for its exec
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end = told(watching, pid, "exit")

    assert end["signal"] in (signal.SIGKILL, None)
    assert end["code"] is None


def test_zombies(watching: Agent):
    """
    A child that nobody waits for has ended all the same, once.
    """
    pids = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.2)
            os._exit(3)
        pids.append(pid)
    ends: list[Line] = []
    while {line["pid"] for line in ends} != set(pids):
        line = watching.read_until("exit")
        if line["pid"] in pids:
            ends.append(line)
    for pid in pids:
        os.waitpid(pid, 0)

    assert len(ends) == len(pids)
    assert {line["code"] for line in ends} <= {3, None}


def test_leader_ends_first(watching: Agent, waits: Path):
    """
    A process whose first thread ends while another goes on and executes a program is one process all along.
    """
    code = (
        "import ctypes, os, sys, threading, time\n"
        "def work():\n"
        "    time.sleep(0.15); os.execv(sys.argv[1], [sys.argv[1], 'from a thread'])\n"
        "threading.Thread(target=work).start()\n"
        "ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)\n"
    )
    with start([sys.executable, "-c", code, str(waits)]) as process:
        line = watching.read_until("exec", pid=process.pid, exe=str(waits))
        process.communicate(b"x")
    end = told(watching, process.pid, "exit")

    assert (end["id"], end["exe"]) == (line["id"], str(waits))
    assert line["argv"] == [str(waits), "from a thread"]


def test_pids_used_again(tiny: Path):
    """
    With so few numbers that each is used again within a second, no life is taken for another.
    """
    need(os.geteuid() == 0, "only root limits the numbers")
    backend = "ebpf" if not LADDER["ebpf"][0][1](Options()).probe() else "netlink"
    code = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from procwatch import storms
from procwatch.sources import libc
open('/proc/sys/kernel/pid_max', 'w').write('400')
storms.storm({str(tiny)!r}, 2000, 'again')
"""
    with agent(backend) as running:
        inside = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code], check=False)
        running.finish()
    need(inside.returncode == 0, "pid_max is not of the pid namespace (Linux 6.14)")
    mine = [line for line in running.lines if (line.get("argv") or [""])[0] == str(tiny)]
    ids = [line["id"] for line in mine if line["event"] == "exec"]

    assert len(ids) == 2000
    assert len({line["pid"] for line in mine}) <= 2000
    assert all(line["event"] != "vanished" for line in mine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_bomb(backend: str):
    """
    Processes that fork until their cgroup lets them no more: all are told with their ends, or counted as lost.
    """
    with marked.fresh_cgroup() as cgroup, agent(backend) as running:
        limit = os.path.join(cgroup or "", "pids.max")
        need(cgroup and os.path.exists(limit), "no cgroup with a limit of processes")
        Path(limit).write_text("200")
        bomb = f'echo $$ >"{cgroup}/cgroup.procs"; b() {{ b | b & }}; b 2>/dev/null; sleep 0.5'
        with subprocess.Popen(["sh", "-c", bomb], stderr=subprocess.DEVNULL) as process:
            told(running, process.pid, "exit")
            while pids := Path(cgroup or "", "cgroup.procs").read_text().split():
                for pid in pids:
                    _kill(int(pid))
        stop = running.finish()

    mine = running.lines
    if backend != "scan":  # that comes too late for the arguments of most: theirs are their parent's
        mine = [line for line in mine if bomb in (line.get("argv") or ())]
    ended = {line["id"] for line in mine if line["event"] in ("exit", "vanished")}
    born = {line["id"] for line in mine if line["event"] in ("fork", "exec")}
    assert len(ended) + stop["lost"] >= 100
    assert backend == "scan" or born <= ended


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def test_crowd_at_the_start(waits: Path):
    """
    With thousands of processes alive already, the agent begins, knows each, and tells each end once.
    """
    count = 2000
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0)]
    pids = {os.posix_spawn(str(waits), ["crowd"], {}, file_actions=actions) for _ in range(count)}
    os.close(reader)
    try:
        with agent("scan" if os.geteuid() else "netlink", "--initial") as running:
            seen: set[int] = set()
            while not pids <= seen:
                line = running.read_until("running")
                seen.add(line["pid"])
            os.close(writer)
            for pid in pids:
                os.waitpid(pid, 0)
            ends: list[int] = []
            while not pids <= set(ends):
                ends.append(running.read_until("exit")["pid"])
    finally:
        for pid in pids:
            _kill(pid)

    assert len([pid for pid in ends if pid in pids]) == count


@pytest.mark.parametrize("form", ["json", "console"])
def test_output_is_one_line_each(form: str, tmp_path: Path):
    """
    Whatever a process calls itself, a line of output is one event, and the console shows no control character.
    """
    backend = "netlink" if LADDER["netlink"][0][1](Options()).probe() is None else "scan"
    command = [sys.executable, "-m", "procwatch", "watch", "--backend", backend, "--format", form]
    output = tmp_path / "out"
    path = os.path.join(os.fsencode(tmp_path), NASTY.replace(b"/", b""))
    storms.write(os.fsdecode(path), storms.program() or b"")
    with subprocess.Popen([*command, "--output", str(output)]) as process:
        _await(lambda: output.exists() and output.stat().st_size > 0)
        with start([path, NASTY]) as nasty:
            _await(lambda: b"event" in output.read_bytes() and str(nasty.pid).encode() in output.read_bytes())
            nasty.communicate(b"x")
        process.terminate()
    data = output.read_bytes()

    if form == "json":
        assert all(json.loads(line)["event"] for line in data.splitlines())
    assert not any(byte < 32 and byte != 10 for byte in data)
    assert data.decode()


def _await(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
