"""
The C library's functions that Python does not offer, with OSError in place of errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
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

# MSG_TRUNC: tell the true length of what was cut.
_TAKE: Final = socket.MSG_DONTWAIT | socket.MSG_TRUNC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """
    struct mmsghdr, of which a 64-bit machine's C library has this layout.
    """

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vectors_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_long),  # an int, and the padding of struct msghdr
        ("length", ctypes.c_uint),
    )


_libc.recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
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


def memory_device() -> int:
    """
    st_dev of files in memory, memfd_create(2): a filesystem of the kernel's own, that is mounted nowhere. -1, which
    none has, if that cannot be known: forbidden by seccomp, or no descriptor left.
    """
    try:
        memory = os.memfd_create("procwatch", os.MFD_CLOEXEC)
    except OSError:
        return -1
    try:
        return os.fstat(memory).st_dev
    finally:
        os.close(memory)


def filesystem_magic(fd: int) -> int:
    """
    f_type of the filesystem that an open file is on, fstatfs(2).
    """
    buffer = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; its first word is f_type
    _check(_libc.fstatfs(fd, buffer))
    return int(buffer[0]) & 0xFFFFFFFF


class Datagrams:
    """
    Takes many datagrams with one system call, recvmmsg(2): a third of the cost of one call for each.

    Args:
        slot_bytes: Room for each; what is longer is cut.
        slots: How many at once.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self._slot_bytes = slot_bytes
        self._slots = slots
        room = (ctypes.c_char * (slot_bytes * slots))()
        self._vectors = (_Vector * slots)()
        self._messages = (_Message * slots)()
        for at, (vector, message) in enumerate(zip(self._vectors, self._messages, strict=True)):
            vector.base, vector.length = ctypes.addressof(room) + at * slot_bytes, slot_bytes
            message.vectors, message.vectors_count = ctypes.addressof(vector), 1
        self._address = ctypes.addressof(self._messages)
        self._room = memoryview(room).cast("B")
        words = memoryview(self._messages).cast("B").cast("I")
        self._lengths = words[_Message.length.offset // 4 :: ctypes.sizeof(_Message) // 4]

    def receive(self, fd: int) -> tuple[memoryview, list[int]]:
        """
        The datagrams that a socket has now, until the next call: the slots that they are in, and their true lengths.

        Raises:
            OSError: As recvmmsg(2); what was received before an error is given first.
        """
        count = _libc.recvmmsg(fd, self._address, self._slots, _TAKE, None)
        if count < 0:
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return self._room[:0], []
            raise OSError(number, os.strerror(number))
        return self._room[: count * self._slot_bytes], self._lengths[:count].tolist()


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
