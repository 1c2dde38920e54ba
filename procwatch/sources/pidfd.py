"""
pidfd(2): a descriptor of one process, which becomes readable when that ends. Any user may have one of any process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

# include/uapi/linux/pidfd.h
_GET_INFO: Final = 0xC040FF0B
_INFO_EXIT: Final = 1 << 3
_INFO: Final = struct.Struct("=QQ11Ii")

NOBODY: Final = -1
THREAD: Final = -2
UNKNOWN: Final = -3


def find(pid: int) -> int:
    """
    A pidfd of the process, or what there is instead.

    Returns:
        A descriptor; NOBODY where the number is not in use; THREAD where it is that of a thread which does not lead its
        process; UNKNOWN with no descriptors left, before Linux 5.3, or in a sandbox that refuses the call.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return NOBODY
        return THREAD if error.errno in (errno.ENOENT, errno.EINVAL) else UNKNOWN


def exit_status(fd: int) -> int | None:
    """
    As wait(2) gave it to the parent, once that has waited; None before, and before Linux 6.15.
    """
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _INFO_EXIT, *[0] * 13)
    try:
        fcntl.ioctl(fd, _GET_INFO, info)
    except OSError:
        return None
    fields = _INFO.unpack(info)
    return int(fields[-1]) if fields[0] & _INFO_EXIT else None
