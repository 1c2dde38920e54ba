"""
The C library's functions that Python does not offer, with OSError in place of errno.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

FAN_CLOEXEC: Final = 0x1
FAN_NONBLOCK: Final = 0x2
FAN_CLASS_NOTIF: Final = 0x0
FAN_CLASS_CONTENT: Final = 0x4
FAN_UNLIMITED_QUEUE: Final = 0x10
FAN_UNLIMITED_MARKS: Final = 0x20
FAN_REPORT_TID: Final = 0x100
FAN_MARK_ADD: Final = 0x1
FAN_MARK_FILESYSTEM: Final = 0x100
AT_FDCWD: Final = -100
OVERLAYFS_SUPER_MAGIC: Final = 0x794C7630

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_Vector),
    ctypes.c_ulong,
    ctypes.POINTER(_Vector),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fanotify_init(flags: int, event_flags: int) -> int:
    """
    A new fanotify group's descriptor, fanotify_init(2).
    """
    return _check(_libc.fanotify_init(flags, event_flags))


def fanotify_mark(group: int, flags: int, mask: int, path: str) -> None:
    """
    Add or change a mark, fanotify_mark(2).
    """
    _check(_libc.fanotify_mark(group, flags, mask, AT_FDCWD, os.fsencode(path)))


def filesystem_magic(fd: int) -> int:
    """
    f_type of the filesystem that an open file is on, fstatfs(2).
    """
    buffer = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; its first word is f_type
    _check(_libc.fstatfs(fd, buffer))
    return int(buffer[0]) & 0xFFFFFFFF


def process_vm_read(pid: int, ranges: list[tuple[int, int]]) -> list[bytes]:
    """
    Memory of another process or thread, process_vm_readv(2).

    Args:
        pid: Its number.
        ranges: Address and length of each piece, at most 1024. None may reach over the end of a page, for the kernel
            stops at the first that cannot be read.

    Returns:
        The pieces, those after a failure empty.
    """
    size = sum(length for _, length in ranges)
    buffer = (ctypes.c_char * size)()
    local = _Vector(ctypes.addressof(buffer), size)
    remote = (_Vector * len(ranges))()
    for vector, (address, length) in zip(remote, ranges, strict=True):
        vector.base, vector.length = address, length
    count = _check(_libc.process_vm_readv(pid, ctypes.byref(local), 1, remote, len(ranges), 0))
    data, pieces, at = buffer.raw[:count], [], 0
    for _, length in ranges:
        pieces.append(data[at : at + length])
        at += length
    return pieces
