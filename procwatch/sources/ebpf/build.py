"""
Make the blob that the wheel ships from the C source: developers only, needs clang and bpftool.

    python -m procwatch.sources.ebpf.build OUTPUT

`bpftool gen skeleton -L` writes a C header that holds the loader program, its data, and the order of maps and
programs. We take those four things out of it, so that loading needs no C at all. Layout of the blob: docs/ebpf.md.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = "procwatch.bpf.c"
MAGIC = b"pwbpf\x00\x01\x00"  # last but one: version of the layout

# No absolute path may reach the debug information, or each checkout would give other bytes.
CFLAGS = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
CFLAGS += ["-fdebug-compilation-dir=.", "-no-canonical-prefixes"]

_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})|\\([0-7]{1,3})|\\(.)|([^\\])", re.DOTALL)
_SIMPLE = {b"n": 10, b"t": 9, b"r": 13, b"\\": 92, b'"': 34, b"a": 7, b"b": 8, b"f": 12, b"v": 11}


def c_string(literal: bytes) -> bytes:
    """
    The bytes of a C string literal, without its quotes.

    >>> c_string(b"a\\\\x00\\\\0\\\\n")
    b'a\\x00\\x00\\n'
    """
    out = bytearray()
    for hexadecimal, octal, simple, plain in _ESCAPE.findall(literal.replace(b"\\\n", b"")):
        out.append(
            int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else _SIMPLE[simple] if simple else plain[0]
        )
    return bytes(out)


def literal(skeleton: bytes, field: bytes) -> bytes:
    """
    The literal that the skeleton assigns to `field`, checked against the size which stands before it.
    """
    size = int(re.search(rb"opts\.%s_sz = (\d+);" % field, skeleton)[1])  # type: ignore[index]
    found = re.search(rb'opts\.%s = \(void \*\)"((?:[^"\\]|\\.)*)";' % field, skeleton, re.DOTALL)
    data = c_string(found[1])  # type: ignore[index]
    assert len(data) == size, (field, len(data), size)
    return data


def descriptors(skeleton: bytes, kind: bytes) -> list[bytes]:
    """
    Names of the maps or programs, in the order of the loader's context.
    """
    return re.findall(rb"struct bpf_%s_desc (\w+);" % kind, skeleton)


def pack(skeleton: bytes) -> bytes:
    """
    The blob of a light skeleton.
    """
    maps, programs = descriptors(skeleton, b"map"), descriptors(skeleton, b"prog")
    instructions, data = literal(skeleton, b"insns"), literal(skeleton, b"data")
    names = b"".join(name + b"\0" for name in maps + programs)
    header = struct.pack("<5I", len(maps), len(programs), len(names), len(instructions), len(data))
    return MAGIC + header + names + instructions + data


def build() -> bytes:
    """
    Compile the source and pack it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = os.path.join(scratch, "procwatch.o")
        subprocess.run(["clang", *CFLAGS, "-c", SOURCE, "-o", target], cwd=HERE, check=True)
        skeleton = subprocess.run(["bpftool", "gen", "skeleton", "-L", target], check=True, capture_output=True).stdout
    return pack(skeleton)


def main() -> None:
    """
    Write the blob to the file named on the command line.
    """
    blob = build()
    with open(sys.argv[1], "wb") as file:
        file.write(blob)


if __name__ == "__main__":
    main()
