"""
Load the shipped BPF programs with nothing but the bpf(2) system call.

The blob holds a small BPF program that creates the maps and loads the others: the kernel runs it, relocating every
field access against its own BTF on the way (a "light skeleton"). Layout of the blob: docs/ebpf.md. Layout of the
context that the loader program gets: libbpf's skel_internal.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress
from typing import Any

from msgspec import Struct

MAGIC = b"pwbpf\x00\x01\x00"

# enum bpf_cmd, enum bpf_map_type, enum bpf_prog_type in include/uapi/linux/bpf.h
MAP_CREATE, MAP_UPDATE_ELEM, PROG_LOAD, PROG_RUN, OBJ_GET_INFO_BY_FD, RAW_TRACEPOINT_OPEN = 0, 2, 5, 10, 15, 17
MAP_TYPE_ARRAY, PROG_TYPE_SYSCALL, F_SLEEPABLE = 2, 31, 1 << 4

# x86_64 has numbers of its own, all newer machines share one table: include/uapi/asm-generic/unistd.h
_SYS_BPF, _SYS_MEMBARRIER = (321, 324) if os.uname().machine == "x86_64" else (280, 283)
_LOG_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class Blob(Struct, frozen=True):
    """
    What the build made: names in the order of the loader's context, the loader program and its data.
    """

    maps: list[str]
    programs: list[str]
    instructions: bytes
    data: bytes


class Loaded(Struct, frozen=True):
    """
    Descriptors of what the kernel now holds, by name.
    """

    maps: dict[str, int]
    programs: dict[str, int]

    def close(self) -> None:
        """
        Give them back.
        """
        for fd in (*self.maps.values(), *self.programs.values()):
            with suppress(OSError):  # closed by somebody else
                os.close(fd)


class LoadError(OSError):
    """
    The kernel did not take the programs: `step` says at which of the system calls, `log` has the verifier's words.
    """

    def __init__(self, code: int, step: str, log: str = "") -> None:
        super().__init__(code, f"{step}: {os.strerror(code)}")
        self.step = step
        self.log = log


def parse_blob(blob: bytes) -> Blob:
    """
    Take the blob apart.
    """
    assert blob.startswith(MAGIC), "not a procwatch BPF blob"
    maps, programs, names_size, instructions, data = struct.unpack_from("<5I", blob, len(MAGIC))
    at = len(MAGIC) + 20
    names = blob[at : at + names_size].decode().split("\0")
    at += names_size
    assert len(blob) == at + instructions + data
    return Blob(names[:maps], names[maps : maps + programs], blob[at : at + instructions], blob[at + instructions :])


def bpf(command: int, attributes: bytes, step: str) -> tuple[int, bytes]:
    """
    The system call: its result, and the attributes as the kernel left them.

    Raises:
        LoadError: With the errno, and `step` for the reader.
    """
    attr = ctypes.create_string_buffer(attributes, len(attributes))
    result = _syscall(_SYS_BPF, command, attr, len(attributes))
    if result < 0:
        raise LoadError(ctypes.get_errno(), step)
    return result, attr.raw


def create_array(value_bytes: int) -> int:
    """
    An ARRAY map of one entry. Also the cheapest way to learn whether we may use BPF at all.
    """
    return bpf(MAP_CREATE, struct.pack("<4I56x", MAP_TYPE_ARRAY, 4, value_bytes, 1), "create a map")[0]


def attach(program: int, tracepoint: str | None = None) -> int:
    """
    Run `program` at its raw tracepoint until the returned descriptor is closed.

    Args:
        program: Its descriptor.
        tracepoint: Where; None for a program whose types say it ("tp_btf").
    """
    name = ctypes.create_string_buffer(tracepoint.encode()) if tracepoint else None
    at = ctypes.addressof(name) if name else 0
    return bpf(RAW_TRACEPOINT_OPEN, struct.pack("<QII", at, program, 0), f"attach {tracepoint or 'a program'}")[0]


def missed(program: int) -> int:
    """
    How often the kernel did not run a program because it was still at work on that CPU: `recursion_misses`, the last
    field that we ask for of struct bpf_prog_info.
    """
    info = ctypes.create_string_buffer(216)
    bpf(OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", program, len(info), _address(info)), "ask about a program")
    return int.from_bytes(info.raw[208:], "little")


def membarrier(command: int) -> None:
    """
    membarrier(2): every command is a full barrier for the thread that calls it.
    """
    _syscall(_SYS_MEMBARRIER, command, 0, 0)


def load(blob: Blob, *, entries: dict[str, int], contents: dict[str, bytes]) -> Loaded:
    """
    Load all programs.

    Args:
        entries: `max_entries` for maps that are not to have the size of the source.
        contents: First contents, for the map of the settings.

    Raises:
        LoadError: Nothing stays loaded.
    """
    try:
        return _load(blob, entries, contents, log_level=0)
    except LoadError as error:
        if error.step != "verify":
            raise
    # Once more, for the verifier's words: a log that is always asked for costs a megabyte and some milliseconds.
    return _load(blob, entries, contents, log_level=1)


def _load(blob: Blob, entries: dict[str, int], contents: dict[str, bytes], log_level: int) -> Loaded:
    log = ctypes.create_string_buffer(_LOG_BYTES if log_level else 1)
    keep: list[Any] = []  # what the context points to
    descriptors = b""
    for name in blob.maps:
        first = ctypes.create_string_buffer(contents[name], len(contents[name])) if name in contents else None
        keep.append(first)
        descriptors += struct.pack("<iIQ", 0, entries.get(name, 0), ctypes.addressof(first) if first else 0)
    size = 24 + len(descriptors) + 4 * len(blob.programs)
    head = struct.pack("<IIIIQ", size, 0, log_level, _LOG_BYTES if log_level else 0, _address(log) if log_level else 0)
    context = ctypes.create_string_buffer(head + descriptors + bytes(4 * len(blob.programs)), size)
    try:
        _run_loader(blob, context)
    except LoadError as error:
        error.log = log.value.decode("utf-8", "replace")
        raise
    fds = [struct.unpack_from("<i", context, 24 + 16 * index)[0] for index in range(len(blob.maps))]
    programs = struct.unpack_from(f"<{len(blob.programs)}i", context, 24 + len(descriptors))
    return Loaded(dict(zip(blob.maps, fds, strict=True)), dict(zip(blob.programs, programs, strict=True)))


def _run_loader(blob: Blob, context: ctypes.Array[ctypes.c_char]) -> None:
    key, data = ctypes.c_uint32(0), ctypes.create_string_buffer(blob.data, len(blob.data))
    instructions = ctypes.create_string_buffer(blob.instructions, len(blob.instructions))
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    array = create_array(len(blob.data))
    program = -1
    try:
        element = struct.pack("<I4xQQQ", array, ctypes.addressof(key), _address(data), 0)
        bpf(MAP_UPDATE_ELEM, element, "fill a map")
        arrays = ctypes.c_int(array)
        # From here to the end of fd_array nothing else is set: no type information, no attach point.
        load = struct.pack(
            "<IIQQ20xI16s56xQ",
            *(PROG_TYPE_SYSCALL, len(blob.instructions) // 8, _address(instructions), _address(licence)),
            *(F_SLEEPABLE, b"procwatch_load", ctypes.addressof(arrays)),
        )
        program = bpf(PROG_LOAD, load, "load the loader")[0]
        run = struct.pack("<I36xI4xQ16x", program, len(context), _address(context))
        result = struct.unpack_from("<i", bpf(PROG_RUN, run, "run the loader")[1], 4)[0]
        if result < 0:
            raise LoadError(-result, "verify")
    finally:
        os.close(array)
        if program >= 0:
            os.close(program)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)
