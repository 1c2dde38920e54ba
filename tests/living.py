"""
Real processes for tests to look at, and tests' own code run as somebody else.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
NOBODY = 65534
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1
MS_REC_PRIVATE = 0x4000 | 0x40000


@contextmanager
def living(argv: Sequence[str | bytes], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """
    A process that echoes a line (so that its exec is over for sure) and lives until the end of the block.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, **options) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"x\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def python(code: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """
    A Python program that has run `code` and then waits, echoing; see `living()`.
    """
    echo = "import sys; print(sys.stdin.readline(), end='', flush=True); sys.stdin.read()"
    with living([sys.executable, "-c", f"{code}\n{echo}", *args]) as process:
        yield process


def elsewhere(
    work: Callable[[], T],
    *,
    uid: int | None = None,
    hidepid: str | None = None,
    pid_namespace: bool = False,
    foreign_proc: bool = False,
) -> T:
    """
    What `work` returns in a forked child: as another user, with another /proc, as pid 1 of a new namespace, or as
    that with the old namespace's /proc.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        result: object
        try:
            _end_with_parent()
            if pid_namespace or foreign_proc:
                _in_new_namespace()
            if hidepid is not None or pid_namespace:
                _own_proc(hidepid or "0")
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            result = (True, work())
        except BaseException:  # noqa: BLE001, RUF100 - the parent raises it
            result = (False, traceback.format_exc())
        with open(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            data = pipe.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    good, value = pickle.loads(data)  # written by ourselves
    assert good, value
    return value  # type: ignore[no-any-return]


def _in_new_namespace() -> None:
    """
    Go on as pid 1; the process that was ours only waits.
    """
    if ctypes.CDLL(None).unshare(CLONE_NEWPID):
        raise OSError("no new pid namespace")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    _end_with_parent()


def _end_with_parent() -> None:
    """
    So that a test which is given up leaves nothing running.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _own_proc(hidepid: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        lambda: libc.unshare(CLONE_NEWNS),
        lambda: libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None),
        lambda: libc.mount(b"proc", b"/proc", b"proc", 0, f"hidepid={hidepid}".encode()),
    ):
        if call():
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
