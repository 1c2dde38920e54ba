"""
Decode what read(2) gives on a fanotify group, and encode the answers to permission events
(include/uapi/linux/fanotify.h, fanotify(7)).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from procwatch.errors import DecodeError

METADATA_VERSION: Final = 3
FAN_OPEN_EXEC: Final = 0x00001000
FAN_Q_OVERFLOW: Final = 0x00004000
FAN_OPEN_EXEC_PERM: Final = 0x00040000
FAN_ALLOW: Final = 1

_METADATA: Final = struct.Struct("=IBBHQii")
_USUAL: Final = struct.Struct("=IBxHQii")
_RESPONSE: Final = struct.Struct("=iI")
EVENT_BYTES: Final = _METADATA.size


class Event(NamedTuple):
    """
    One event: what happened, an open descriptor of the file (the reader's to close; negative: none), and the process.
    """

    mask: int
    fd: int
    pid: int


def decode_usual(data: bytes) -> list[tuple[int, int, int]] | None:
    """
    The events of one read, as plain tuples at a third of the cost; None where one brings more than what is usual.
    """
    if len(data) % EVENT_BYTES:
        return None
    events = [
        (mask, fd, pid)
        for length, version, metadata, mask, fd, pid in _USUAL.iter_unpack(data)
        if length == metadata == EVENT_BYTES and version == METADATA_VERSION
    ]
    return events if len(events) * EVENT_BYTES == len(data) else None


def decode(data: bytes) -> list[Event]:
    """
    All events of one read.

    Information records after the metadata (a newer kernel's, or asked for with FAN_REPORT_*) are stepped over.

    Raises:
        DecodeError: Another metadata version, or a length that does not fit.
    """
    events: list[Event] = []
    at, end = 0, len(data)
    unpack = _METADATA.unpack_from
    while at < end:
        try:
            length, version, _, metadata, mask, fd, pid = unpack(data, at)
        except struct.error as error:
            raise DecodeError(f"fanotify: {end - at} bytes are too few for an event") from error
        if version != METADATA_VERSION:
            raise DecodeError(f"fanotify: metadata version {version}, not {METADATA_VERSION}")
        if not EVENT_BYTES <= metadata <= length <= end - at:
            raise DecodeError(f"fanotify: event of {length} bytes, {metadata} of metadata, in {end - at}")
        events.append(Event(mask, fd, pid))
        at += length
    return events


def allow(fd: int) -> bytes:
    """
    The answer that lets the open of `fd` go on.
    """
    return _RESPONSE.pack(fd, FAN_ALLOW)
