"""
What kind of program a file is, from its bytes: elf(5), and `#!` (fs/binfmt_script.c).

The file is read in up to three pieces: the first bytes (`head`), the program headers that they point to
(`interpreter_range`), and the name of the interpreter in them. In nearly every binary all lie in the first page.
"""

from __future__ import annotations

import struct
from typing import Final

from msgspec import Struct

PT_INTERP: Final = 3
ET_EXEC: Final = 2
ET_DYN: Final = 3
FIRST_BYTES: Final = 4096
# The kernel takes 64 KiB of program headers (load_elf_phdrs in fs/binfmt_elf.c) and PATH_MAX of interpreter name.
MAX_HEADERS: Final = 65536
MAX_NAME: Final = 4096
# BINPRM_BUF_SIZE (include/uapi/linux/binfmts.h): the kernel looks no further for the end of the `#!` line.
SCRIPT_LINE: Final = 256

# e_machine that run under the kernel of each uname machine: its own, and that of its compatible 32-bit programs.
MACHINES: Final[dict[str, frozenset[int]]] = {
    "x86_64": frozenset({62, 3}),
    "aarch64": frozenset({183, 40}),
    "riscv64": frozenset({243}),
    "ppc64le": frozenset({21, 20}),
    "s390x": frozenset({22}),
}


class Head(Struct, frozen=True):
    """
    The kind of a file: "elf", "script" or "other".

    `interpreter` is the path on a `#!` line. Of an ELF file `headers` tells where the program headers are (offset,
    size of one, number), and `order` and `wide` how to read them.
    """

    kind: str
    interpreter: str | None = None
    headers: tuple[int, int, int] = (0, 0, 0)
    order: str = "<"
    wide: bool = True


OTHER: Final = Head("other")


def head(first: bytes, machines: frozenset[int] | None = None) -> Head:
    """
    Tell the kind from the first bytes.

    An ELF file for another machine is "other": the kernel never runs it, though a binfmt_misc interpreter may.

    Args:
        first: FIRST_BYTES of the file, or all of a shorter one.
        machines: The e_machine numbers that run here; None: any.
    """
    if first[:2] == b"#!":
        return Head("script", script_line(first)[0])
    if first[:4] != b"\x7fELF" or len(first) < 6:
        return OTHER
    wide = first[4] == 2
    order = ">" if first[5] == 2 else "<"
    try:
        if wide:
            kind, machine, _, _, offset, _, _, _, size, count = struct.unpack_from(order + "HHIQQQIHHH", first, 16)
        else:
            kind, machine, _, _, offset, _, _, _, size, count = struct.unpack_from(order + "HHIIIIIHHH", first, 16)
    except struct.error:
        return OTHER
    if kind not in (ET_EXEC, ET_DYN) or (machines is not None and machine not in machines):
        return OTHER
    return Head("elf", None, (offset, size, count), order, wide)


def script_line(first: bytes) -> tuple[str | None, str | None]:
    """
    The interpreter on the `#!` line, and the one argument that the rest of the line is.
    """
    line = first[2:SCRIPT_LINE].split(b"\n", 1)[0].split(b"\0", 1)[0].strip(b" \t")
    at = min((line.find(blank) for blank in (b" ", b"\t") if blank in line), default=len(line))
    return _text(line[:at]), _text(line[at:].strip(b" \t"))


def _text(data: bytes) -> str | None:
    return data.decode("utf-8", "surrogateescape") or None


def headers_range(elf: Head) -> tuple[int, int]:
    """
    Offset and length in bytes of the program headers; (0, 0) where the kernel would refuse them.
    """
    offset, size, count = elf.headers
    if size != (56 if elf.wide else 32) or not 0 < size * count <= MAX_HEADERS or offset >= 1 << 62:
        return 0, 0
    return offset, size * count


def interpreter_range(elf: Head, headers: bytes) -> tuple[int, int]:
    """
    Offset and length of the interpreter's name (PT_INTERP); (0, 0) for a static binary.
    """
    size = elf.headers[1] or 1
    for at in range(0, len(headers) - size + 1, size):
        try:
            if elf.wide:
                kind, _, offset, _, _, length = struct.unpack_from(elf.order + "IIQQQQ", headers, at)
            else:
                kind, offset, _, _, length = struct.unpack_from(elf.order + "IIIII", headers, at)
        except struct.error:
            break
        if kind == PT_INTERP:
            return (offset, length) if 2 <= length <= MAX_NAME and offset < 1 << 62 else (0, 0)
    return 0, 0


def name(text: bytes) -> str | None:
    """
    The interpreter's path from its bytes, which end with a NUL.
    """
    return _text(text.split(b"\0", 1)[0])
