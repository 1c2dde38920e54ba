"""
What an ordinary user sees, and what watching costs while nothing happens: the real command, as it is run.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import pytest

import procwatch
from procwatch.cli import main
from tests.conftest import need

NOBODY = 65534
SLEEP = os.path.realpath(shutil.which("sleep") or "/bin/sleep")
ROUNDS = (1, 2, 3)

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def as_nobody(*arguments: str) -> Iterator[tuple[int, TextIO]]:
    """
    `procwatch ARGUMENTS` in a forked child without privileges: its pid and its output.

    Not a new interpreter: nobody may be unable to read where this one is installed.
    """
    for module in pkgutil.walk_packages(procwatch.__path__, "procwatch."):
        if not module.name.endswith(("__main__", ".build")):
            importlib.import_module(module.name)
    codecs.lookup("ascii")  # what is loaded only when it is first needed
    importlib.import_module("pyroute2.netlink.generic")
    importlib.import_module("concurrent.futures.thread")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.closerange(3, 1024)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.argv = ["procwatch", *arguments]
        code = 99
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 99
        except BaseException:  # noqa: BLE001, RUF100 - shown, and the test fails for want of output
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as output:
        try:
            yield child, output
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("backend", ["auto", "scan"])
def test_an_ordinary_user_sees_others_arguments_and_all_of_its_own(backend: str):
    """
    Processes of root: argv, and exe null with its reason; processes of one's own: everything.
    """
    need(os.geteuid() == 0, "needs root, to become nobody")
    with as_nobody("watch", "--backend", backend, "--format", "json") as (pid, output):
        ready = json.loads(output.readline())
        if backend == "auto":
            assert {"name", "reason", "remedy"} == set(ready["skipped"][0])
        # The agent is a fork of this whole test run, with its tracing: slow enough to miss one of them.
        for number in ROUNDS:
            subprocess.run(["sleep", "0.5", f"0.01{number}"], check=True)
            subprocess.run(["sleep", "0.5", f"0.02{number}"], check=True, user=NOBODY, group=NOBODY, extra_groups=[])
        os.kill(pid, signal.SIGINT)
        found: list[dict[str, Any]] = [json.loads(line) for line in output]
        assert found[-1]["event"] == "stop"

    def told(kind: int, number: int) -> list[dict[str, Any]]:
        return [event for event in found if event.get("argv") == ["sleep", "0.5", f"0.0{kind}{number}"]]

    whole = [n for n in ROUNDS if len(told(1, n)) == len(told(2, n)) == 2]
    assert whole, [(event["event"], event.get("argv")) for event in found]
    roots, mine = told(1, whole[0]), told(2, whole[0])
    assert [event["event"] for event in roots] == [event["event"] for event in mine] == ["exec", "exit"]
    for event in roots:
        assert (event["exe"], event["missing"]["exe"], event["uid"], event["comm"]) == (None, "permission", 0, "sleep")
    for event in mine:
        assert (event["exe"], event["uid"], event["cwd"]) == (SLEEP, NOBODY, os.getcwd())
        assert "exe" not in event["missing"]


def test_netlink_never_wakes_up_by_itself():
    """
    Under strace: each wait that ends by its time-out follows an event; on an idle host there is none.
    """
    need(shutil.which("strace"), "needs strace")
    command = [sys.executable, "-m", "procwatch", "watch", "--backend", "netlink", "--format", "json", "--for", "3"]
    trace = ["strace", "-f", "-o", "/dev/stderr", "-e", "trace=epoll_wait,epoll_pwait,poll,select,pselect6,nanosleep"]
    done = subprocess.run([*trace, *command], capture_output=True, text=True, timeout=50)
    if "netlink: " in done.stderr or "ptrace" in done.stderr:
        need(False, done.stderr.splitlines()[0])
    waits = [line for line in done.stderr.splitlines() if re.search(r"epoll_p?wait\(", line)]
    ended = [line for line in waits if line.endswith("= 0") and ", 0) " not in line]  # a wait of 0 is none
    told = [line for line in waits if line.endswith(("= 1", "= 2", "= 3"))]
    assert "nanosleep" not in done.stderr
    assert waits
    assert len(ended) <= 3 * len(told) + 2
