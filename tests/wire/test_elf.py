"""
The kind of a file from its bytes.
"""

from __future__ import annotations

import os
import struct
import sys

from hypothesis import given
from hypothesis import strategies as st

from procwatch.wire import elf

LOADER = b"/lib64/ld-linux-x86-64.so.2\0"


def binary(*, wide: bool = True, order: str = "<", machine: int = 62, kind: int = 3, loader: bytes = LOADER) -> bytes:
    """
    An ELF header, a PT_LOAD and, unless `loader` is empty, a PT_INTERP, and then the loader's name.
    """
    size, start = (56, 64) if wide else (32, 52)
    count = 2 if loader else 1
    name_at = start + size * count
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    rest = (kind, machine, 1, 0, start, 0, 0, start, size, count)
    header = struct.pack(order + ("HHIQQQIHHH" if wide else "HHIIIIIHHH"), *rest).ljust(start - 16, b"\0")
    headers = b""
    for p_type, offset, length in [(1, 0, 10), (3, name_at, len(loader))][:count]:
        if wide:
            headers += struct.pack(order + "IIQQQQQQ", p_type, 4, offset, 0, 0, length, length, 1)
        else:
            headers += struct.pack(order + "IIIIIIII", p_type, offset, 0, 0, length, length, 4, 1)
    return ident + header + headers + loader


def interpreter(data: bytes) -> str | None:
    head = elf.head(data)
    at, size = elf.headers_range(head)
    at, size = elf.interpreter_range(head, data[at : at + size])
    return elf.name(data[at : at + size])


class TestElf:
    def test_interpreter(self) -> None:
        """
        PT_INTERP is found in 64 and 32 bits and both byte orders.
        """
        for wide in (True, False):
            for order in "<>":
                assert LOADER[:-1].decode() == interpreter(binary(wide=wide, order=order))

    def test_static(self) -> None:
        """
        A binary without PT_INTERP has no interpreter.
        """
        assert interpreter(binary(loader=b"")) is None

    def test_own_python(self) -> None:
        """
        The running interpreter is an ELF binary of this machine.
        """
        with open(sys.executable, "rb") as file:
            assert elf.head(file.read(elf.FIRST_BYTES), elf.MACHINES.get(os.uname().machine)).kind == "elf"

    def test_foreign_machine_is_other(self) -> None:
        """
        What this machine cannot run itself is left to binfmt_misc.
        """
        machines = elf.MACHINES["x86_64"]

        assert elf.head(binary(wide=False, machine=3), machines).kind == "elf"
        assert elf.head(binary(machine=183), machines).kind == "other"

    def test_object_file_is_other(self) -> None:
        """
        An object file (ET_REL) cannot be executed.
        """
        assert elf.head(binary(kind=1)) == elf.OTHER


class TestScript:
    def test_interpreter_of_the_line(self) -> None:
        """
        The first word after `#!`, with blanks before it, is the interpreter.
        """
        assert elf.Head("script", "/bin/sh") == elf.head(b"#! \t/bin/sh -e\nexit\n")
        assert elf.Head("script", "/usr/bin/env") == elf.head(b"#!/usr/bin/env\tpython3")

    def test_empty_line(self) -> None:
        """
        `#!` alone names nothing.
        """
        assert elf.Head("script", None) == elf.head(b"#!\n")


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"\x7fELF\2\1\1" + bytes(9) + b"\3\0" + tail))
def test_any_bytes(data: bytes) -> None:
    """
    Whatever the file holds, it has a kind, and pieces within 64 KiB.
    """
    head = elf.head(data)
    at, size = elf.headers_range(head)
    _, length = elf.interpreter_range(head, data[at : at + size])
    elf.name(data)

    assert head.kind in {"elf", "script", "other"}
    assert size <= elf.MAX_HEADERS
    assert length <= elf.MAX_NAME
