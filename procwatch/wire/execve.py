"""
Decode the system call that a held exec is in, from /proc/TID/syscall (proc_pid_syscall in fs/proc/base.c).

A task that fanotify holds while it opens a file to execute is in execve or execveat, so that the number tells them
apart, and 32-bit callers from 64-bit ones: no other call of these numbers opens files so.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from procwatch.errors import DecodeError

_EXECVE: Final = (0, 1)  # positions of the name and of argv among the arguments
_EXECVEAT: Final = (1, 2)
_X32: Final = 0x40000000

# machine -> number -> (positions, bytes of a pointer)
CALLS: Final[dict[str, dict[int, tuple[tuple[int, int], int]]]] = {
    "x86_64": {
        59: (_EXECVE, 8),
        322: (_EXECVEAT, 8),
        11: (_EXECVE, 4),
        358: (_EXECVEAT, 4),
        _X32 + 520: (_EXECVE, 4),
        _X32 + 545: (_EXECVEAT, 4),
    },
    "aarch64": {221: (_EXECVE, 8), 281: (_EXECVEAT, 8), 11: (_EXECVE, 4), 387: (_EXECVEAT, 4)},
}


class Call(NamedTuple):
    """
    An exec about to happen: where its arguments are in the caller's memory.
    """

    name: int  # address of the path
    argv: int  # address of the array of pointers
    directory: int | None  # execveat's descriptor, AT_FDCWD is negative
    pointer: int  # bytes of a pointer


def decode(data: bytes, machine: str) -> Call | None:
    """
    The call, or None while the task is still running, and for calls that are no exec.

    Raises:
        DecodeError: Not the text of that file.
    """
    fields = data.split()
    if fields in ([b"running"], []) or fields[0] == b"-1":
        return None
    try:
        number, *arguments = [int(field, 0) for field in fields]
    except ValueError as error:
        raise DecodeError(f"syscall: {data[:80]!r} is not a call") from error
    if len(arguments) < 6:
        raise DecodeError(f"syscall: {len(arguments)} arguments are too few")
    known = CALLS.get(machine, {}).get(number)
    if known is None:
        return None
    (name, argv), pointer = known
    limit = (1 << 8 * pointer) - 1
    directory = None
    if name:
        directory = arguments[0] & 0xFFFFFFFF
        directory -= (directory & 0x80000000) << 1
    return Call(arguments[name] & limit, arguments[argv] & limit, directory, pointer)
