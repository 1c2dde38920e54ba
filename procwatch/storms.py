"""
Programs and processes to try sources with: the shortest life that a process can have, one after the other.

No binary is shipped: a static program of some 150 bytes is written where it is needed.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Wait for a byte on standard input (or its end), then exit(0). The stack is the buffer.
_CODE = {
    # xor eax,eax; xor edi,edi; mov rsi,rsp; mov edx,1; syscall;  mov eax,60; xor edi,edi; syscall
    "x86_64": (62, bytes.fromhex("31c0 31ff 4889e6 ba01000000 0f05 b83c000000 31ff 0f05")),
    # mov x0,#0; mov x1,sp; mov x2,#1; mov x8,#63; svc #0;  mov x0,#0; mov x8,#93; svc #0
    "aarch64": (183, struct.pack("<8I", 0xD2800000, 0x910003E1, 0xD2800022, 0xD28007E8, 0xD4000001, 0xD2800000,
                                 0xD2800BA8, 0xD4000001)),
}  # fmt: skip
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr, elf(5)
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_BASE = 0x400000
_EXECUTABLE, _CURRENT, _LOAD, _READ_EXECUTE = 2, 1, 1, 5


def program() -> bytes | None:
    """
    A static ELF program that ends as soon as its standard input gives anything or ends; None: not for this machine.
    """
    machine, code = _CODE.get(os.uname().machine, (0, b""))
    if not machine:
        return None
    head = _HEADER.size + _SEGMENT.size
    identity = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
    header = _HEADER.pack(
        *(identity, _EXECUTABLE, machine, _CURRENT, _BASE + head, _HEADER.size, 0, 0),
        *(_HEADER.size, _SEGMENT.size, 1, 0, 0, 0),
    )
    size = head + len(code)
    return header + _SEGMENT.pack(_LOAD, _READ_EXECUTE, 0, _BASE, _BASE, size, size, 4096) + code


@contextmanager
def installed() -> Iterator[str]:
    """
    Path of such a program, in a directory of its own; where it cannot run, of `cat`, which does the same.
    """
    with tempfile.TemporaryDirectory(prefix="procwatch-") as directory:
        os.chmod(directory, 0o755)  # noqa: S103  other users look at it, too
        path = os.path.join(os.path.realpath(directory), "tiny")
        write(path, program() or b"")
        if _runs(path):
            yield path
        else:
            yield os.path.realpath(shutil.which("cat") or "/bin/cat")


def write(path: str, data: bytes) -> None:
    """
    An executable file.
    """
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, 0o755)  # noqa: S103


def _runs(path: str) -> bool:
    """
    Another machine, or a directory that is mounted noexec.
    """
    try:
        return os.waitpid(spawn(path, [path]), 0)[1] == 0
    except OSError:
        return False


def spawn(path: str, argv: list[str]) -> int:
    """
    A process that has nothing to wait for; its pid. (posix_spawn does not copy our memory: fork would cost more than
    the child's whole life.)
    """
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    return os.posix_spawn(path, argv, {}, file_actions=actions)


def storm(path: str, count: int, mark: str) -> float:
    """
    Run a program so often, one after the other, each with `mark` and its number as arguments; seconds that it took.
    """
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    run, wait = os.posix_spawn, os.waitpid
    begin = time.perf_counter()
    for number in range(count):
        wait(run(path, [path, mark, str(number)], {}, file_actions=actions), 0)
    return time.perf_counter() - begin


if __name__ == "__main__":
    # In a process of its own, so that what is measured shares neither interpreter nor lock with who measures. Each line
    # on standard input is a number of processes; each answer the time that they took.
    _, _path, _mark = sys.argv
    for _line in sys.stdin:
        print(storm(_path, int(_line), _mark), flush=True)
