"""
Decode the messages of the process connector (include/uapi/linux/cn_proc.h, include/uapi/linux/connector.h).

A datagram is nlmsghdr (16 bytes), cn_msg (20), then struct proc_event: what, cpu, timestamp_ns (CLOCK_MONOTONIC) and a
union. Measured: unpack_from on it takes 0.13 µs, a general netlink decoder 9 µs.

The kernel sends one datagram per event, but may put several messages into one; so they are walked.
"""

from __future__ import annotations

import struct
from typing import Final

from procwatch.errors import DecodeError
from procwatch.facts import Changed, Exec, Fact, Fork, Thread

NETLINK_CONNECTOR: Final = 11
CN_IDX_PROC: Final = 1
CN_VAL_PROC: Final = 1

PROC_CN_MCAST_LISTEN: Final = 1
PROC_CN_MCAST_IGNORE: Final = 2

NONE: Final = 0x00000000
FORK: Final = 0x00000001
EXEC: Final = 0x00000002
UID: Final = 0x00000004
GID: Final = 0x00000040
SID: Final = 0x00000080
PTRACE: Final = 0x00000100
COMM: Final = 0x00000200
COREDUMP: Final = 0x40000000
EXIT: Final = 0x80000000

NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII IIIIHH")  # nlmsghdr, cn_msg
_EVENT: Final = struct.Struct("=IHHII IIIIHH IIQ")  # the same, and what, cpu, timestamp_ns
# What every kernel so far sends: one event, with the whole union; in a slot of SLOT bytes.
SLOT: Final = 128
_USUAL: Final = struct.Struct("=I12x III4xH2x IIQ iiii 60x")
_USUAL_BYTES: Final = 76
_USUAL_SIZE: Final = 40  # sizeof(struct proc_event)
_TWO: Final = struct.Struct("=ii")
_FOUR: Final = struct.Struct("=iiii")
_EXIT: Final = struct.Struct("=iiII")
_UIDS: Final = struct.Struct("=iiII")
_COMM: Final = struct.Struct("=ii16s")
_DATA: Final = _EVENT.size  # offset of the union
# Enough for every union; the kernel always sends the whole struct, which is larger.
_NEEDED: Final = {FORK: 16, EXEC: 8, EXIT: 16, UID: 16, GID: 16, SID: 8, PTRACE: 16, COMM: 24, COREDUMP: 8, NONE: 4}


# One decoded message: the CPU that sent it, its number on that CPU, its time, the fact (None for a kind that we do not
# know: a newer kernel's), and the acknowledgement it is (None for all others). A plain tuple is half the cost.
Ack = tuple[int, int]
"""Of which request, as its `ack` said, and errno."""
Message = tuple[int, int, int, Fact | None, Ack | None]


def request(operation: int, mask: int | None = None, pid: int = 0, ack: int = 0) -> bytes:
    """
    The message that makes the kernel begin or end to send.

    Without a mask it is the 4 bytes that every kernel takes; with one the 8 bytes of Linux 6.6, which older kernels
    drop in silence (cn_proc_mcast_ctl in drivers/connector/cn_proc.c). All listeners get the acknowledgement of each:
    `ack` tells whose it is.
    """
    body = struct.pack("=I", operation) if mask is None else struct.pack("=II", operation, mask)
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, NLMSG_DONE, 0, 0, pid, CN_IDX_PROC, CN_VAL_PROC, 0, ack, len(body), 0) + body


def decode(data: bytes, offset_ns: int = 0) -> list[Message]:
    """
    All messages of one datagram.

    Args:
        data: What recv(2) gave.
        offset_ns: CLOCK_BOOTTIME minus CLOCK_MONOTONIC, added to each stamp.

    Raises:
        DecodeError: A length or a type that the kernel would not send.
    """
    found: list[Message] = []
    start, end = 0, len(data)
    while start < end:
        try:
            length, _, _, _, _, idx, val, seq, ack, size, _, what, cpu, time_ns = _EVENT.unpack_from(data, start)
        except struct.error as error:
            raise DecodeError(f"cn_proc: {end - start} bytes are too few for an event") from error
        if (idx, val) != (CN_IDX_PROC, CN_VAL_PROC):
            raise DecodeError(f"cn_proc: connector id {idx}.{val} is not the process connector's")
        needed = _NEEDED.get(what, 0)
        if length > end - start or size > length - _HEADER.size or size < 16 + needed:
            raise DecodeError(f"cn_proc: event {what:#x} with length {length}, size {size} in {end - start} bytes")
        time_ns += offset_ns
        at = start + _DATA
        if what == NONE:
            found.append((cpu, seq, time_ns, None, ((ack - 1) & 0xFFFFFFFF, struct.unpack_from("=I", data, at)[0])))
        else:
            found.append((cpu, seq, time_ns, _fact(what, time_ns, data, at), None))
        start += (length + 3) & ~3
    return found


def decode_slots(slots: memoryview, lengths: list[int], offset_ns: int = 0) -> tuple[list[Message], int]:
    """
    All messages of many datagrams: the same as `decode()` gives for each, at a third of the cost.

    Args:
        slots: The datagrams, each at the begin of its SLOT bytes.
        lengths: Theirs; more than SLOT for one that was cut.
        offset_ns: As of `decode()`.

    Returns:
        The messages, and how many datagrams were refused.
    """
    found: list[Message] = []
    put = found.append
    refused = 0
    for at, (length, idx, val, seq, size, what, cpu, time_ns, first, second, third, fourth) in enumerate(
        _USUAL.iter_unpack(slots)
    ):
        if length == _USUAL_BYTES == lengths[at] and size == _USUAL_SIZE and idx == CN_IDX_PROC and val == CN_VAL_PROC:
            time_ns += offset_ns
            if what == EXIT:
                put((cpu, seq, time_ns, Thread(time_ns, second, first, False, third & 0xFFFFFFFF), None))
                continue
            if what == EXEC:
                put((cpu, seq, time_ns, Exec(time_ns, second), None))
                continue
            if what == FORK:
                born = Fork(time_ns, fourth, second) if third == fourth else Thread(time_ns, fourth, third, True)
                put((cpu, seq, time_ns, born, None))
                continue
        start = at * SLOT
        try:
            found += decode(bytes(slots[start : start + min(lengths[at], SLOT)]), offset_ns)
        except DecodeError:
            refused += 1
    return found, refused


def _fact(what: int, time_ns: int, data: bytes, at: int) -> Fact | None:
    """
    The fact of one event; None for a kind that we do not know (a newer kernel's).
    """
    if what == FORK:
        _, parent, tid, pid = _FOUR.unpack_from(data, at)
        return Fork(time_ns, pid, parent) if tid == pid else Thread(time_ns, pid, tid, True)
    if what == EXIT:
        tid, pid, status, _ = _EXIT.unpack_from(data, at)
        return Thread(time_ns, pid, tid, False, status)
    if what == EXEC:
        return Exec(time_ns, _TWO.unpack_from(data, at)[1])
    if what == COMM:
        _, pid, comm = _COMM.unpack_from(data, at)
        return Changed(time_ns, pid, "comm", comm=comm.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
    if what in (UID, GID):
        _, pid, real, effective = _UIDS.unpack_from(data, at)
        return Changed(time_ns, pid, "uid" if what == UID else "gid", real=real, effective=effective)
    if what == SID:
        return Changed(time_ns, _TWO.unpack_from(data, at)[1], "sid")
    if what == PTRACE:
        _, pid, _, tracer = _FOUR.unpack_from(data, at)
        return Changed(time_ns, pid, "ptrace", tracer=tracer)
    if what == COREDUMP:
        return Changed(time_ns, _TWO.unpack_from(data, at)[1], "coredump")
    return None
