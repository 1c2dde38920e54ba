"""
Decode the kernel's accounts of ended tasks (include/uapi/linux/taskstats.h, kernel/taskstats.c, kernel/tsacct.c).

A message is nlmsghdr (16 bytes), genlmsghdr (4), then one attribute AGGR_PID for the task that ended and, when it was
the last of a group of threads, AGGR_TGID for the group. Each nests the number and a struct taskstats.

struct taskstats grew at its end from version to version, so it is read as far as it goes; only version 15 (Linux 6.14)
put new fields in the middle, which version 16 moved to the end again.
"""

from __future__ import annotations

import struct
from typing import Final

from msgspec import Struct

from procwatch.errors import DecodeError

AGGR_PID: Final = 4
AGGR_TGID: Final = 5
NLMSG_ERROR: Final = 2
NLMSG_MIN_TYPE: Final = 16
OLDEST: Final = 8
WITH_EXE: Final = 12  # first version with ac_tgid, ac_tgetime, ac_exe_dev, ac_exe_inode, AGROUP
MIDDLE: Final = 15
AGROUP: Final = 0x20  # include/uapi/linux/acct.h: the last task of its group

_NLMSG: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_AGGREGATE: Final = struct.Struct("=HHIHH")  # attribute PID or TGID with its number, header of attribute STATS
_PAYLOAD: Final = _NLMSG.size + 4
_VERSION: Final = struct.Struct("=H")
# version, ac_exitcode, ac_flag, ac_comm, ac_uid, ac_gid, ac_pid, ac_ppid, ac_etime, ac_utime, ac_stime, hiwater_rss,
# read_bytes, write_bytes
_LAYOUT: Final = "=H2xIB{0}x32s8xIIII8xQQQ32xQ40xQQ"
_BASIC: Final = struct.Struct(_LAYOUT.format(71))
_BASIC_15: Final = struct.Struct(_LAYOUT.format(71 + 6 * 8))  # maximum and minimum of three delays
# What all kernels from version 12 on, but for version 15, send of a task that was not the last of several; in a slot of
# SLOT bytes: nlmsghdr, genlmsghdr, the attribute AGGR_PID, and from struct taskstats what is told here.
SLOT: Final = 2048
_USUAL: Final = struct.Struct("=IH14x HH HHIHH" + _LAYOUT[1:].format(71) + "104x I4xQQQ 1612x")
# ac_tgid, ac_tgetime, ac_exe_dev, ac_exe_inode
_GROUP: Final = struct.Struct("=I4xQQQ")
_GROUP_AT: Final = 368
_GROUP_AT_15: Final = 368 + 12 * 8  # of six delays


class Record(Struct, gc=False):
    """
    The account of one task that ended.

    `pid` is its process, or, before version 12, which does not tell, the task's own number unless it was the last of
    its group. `last` says that the whole process is over; None: not known. `group_*` is what the kernel summed over
    the threads, 0 where it did not.
    """

    tid: int
    pid: int
    last: bool | None
    version: int
    status: int
    comm: str
    uid: int
    gid: int
    ppid: int
    elapsed_us: int  # of the whole process from version 12 on
    user_us: int
    system_us: int
    max_rss_kib: int
    read_bytes: int
    write_bytes: int
    exe_dev: int  # 0: none, or not told
    exe_inode: int
    group_user_us: int = 0
    group_system_us: int = 0


def decode(data: bytes) -> list[Record]:
    """
    All records of one datagram. Acknowledgements are stepped over.

    Raises:
        DecodeError: A length, a nesting or a version that the kernel would not send.
    """
    records: list[Record] = []
    at, end = 0, len(data)
    while at < end:
        if end - at < _NLMSG.size:
            raise DecodeError(f"taskstats: {end - at} bytes are too few for a message")
        length, kind, _, _, _ = _NLMSG.unpack_from(data, at)
        if not _NLMSG.size <= length <= end - at:
            raise DecodeError(f"taskstats: message of {length} bytes in {end - at}")
        if kind >= NLMSG_MIN_TYPE:
            record = _message(data, at + _PAYLOAD, at + length)
            if record is not None:
                records.append(record)
        at += (length + 3) & ~3
    return records


def decode_slots(slots: memoryview, lengths: list[int]) -> tuple[list[Record], int]:
    """
    All records of many datagrams: the same as `decode()` gives for each, at a third of the cost.

    Args:
        slots: The datagrams, each at the begin of its SLOT bytes.
        lengths: Theirs; more than SLOT for one that was cut.

    Returns:
        The records, and how many datagrams were refused.
    """
    found: list[Record] = []
    put = found.append
    refused = 0
    for at, (
        length, kind, outer, aggregate, first, _, tid, inner, _, version, status, flag, comm, uid, gid, _, ppid, _,
        user, system, rss, read, written, pid, elapsed, dev, inode,
    ) in enumerate(_USUAL.iter_unpack(slots)):  # fmt: skip
        if (
            length == lengths[at] == outer + 20 == inner + 32 <= SLOT
            and inner >= 404
            and kind >= NLMSG_MIN_TYPE
            and aggregate == AGGR_PID
            and first == 8
            and version >= WITH_EXE
            and version != MIDDLE
        ):
            name = comm.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            last = flag & AGROUP != 0
            put(
                Record(
                    tid, pid, last, version, status, name, uid, gid, ppid, elapsed, user, system, rss, read, written,
                    dev, inode,
                )
            )  # fmt: skip
            continue
        start = at * SLOT
        try:
            found += decode(bytes(slots[start : start + min(lengths[at], SLOT)]))
        except DecodeError:
            refused += 1
    return found, refused


def errors(data: bytes) -> int | None:
    """
    The errno of an acknowledgement, 0 for success, None if `data` is something else.
    """
    if len(data) < _NLMSG.size + 4 or _NLMSG.unpack_from(data)[1] != NLMSG_ERROR:
        return None
    return -int(struct.unpack_from("=i", data, _NLMSG.size)[0])


def _message(data: bytes, at: int, end: int) -> Record | None:
    record = None
    while at < end:
        if end - at < _ATTRIBUTE.size:
            raise DecodeError(f"taskstats: {end - at} bytes are too few for an attribute")
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= end - at:
            raise DecodeError(f"taskstats: attribute of {length} bytes in {end - at}")
        kind &= 0x3FFF  # NLA_F_NESTED and NLA_F_NET_BYTEORDER are flags
        if kind == AGGR_PID:
            record = _task(data, at + 4, at + length)
        elif kind == AGGR_TGID and record is not None:
            _add_group(record, data, at + 4, at + length)
        at += (length + 3) & ~3
    return record


def _stats(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """
    The number in an aggregate, and where its struct taskstats begins and ends.
    """
    if end - at < _AGGREGATE.size:
        raise DecodeError(f"taskstats: {end - at} bytes are too few for an aggregate")
    first, _, number, length, _ = _AGGREGATE.unpack_from(data, at)
    begin, stop = at + _AGGREGATE.size, at + 8 + length
    if first != 8 or stop > end or stop - begin < _VERSION.size:
        raise DecodeError(f"taskstats: aggregate of {end - at} bytes with {length} of statistics")
    version = _VERSION.unpack_from(data, begin)[0]
    if version < OLDEST or stop - begin < (_BASIC_15 if version == MIDDLE else _BASIC).size:
        raise DecodeError(f"taskstats: version {version} with {stop - begin} bytes")
    return number, begin, stop


def _task(data: bytes, at: int, end: int) -> Record:
    tid, begin, stop = _stats(data, at, end)
    middle = _VERSION.unpack_from(data, begin)[0] == MIDDLE
    fields = (_BASIC_15 if middle else _BASIC).unpack_from(data, begin)
    version, status, flag, comm, uid, gid, _, ppid, elapsed, user, system, rss, read, written = fields
    pid, dev, inode, last = tid, 0, 0, None
    group_at = begin + (_GROUP_AT_15 if middle else _GROUP_AT)
    if version >= WITH_EXE and stop - group_at >= _GROUP.size:
        pid, elapsed, dev, inode = _GROUP.unpack_from(data, group_at)
        last = bool(flag & AGROUP)
    name = comm.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return Record(
        tid, pid, last, version, status, name, uid, gid, ppid, elapsed, user, system, rss, read, written, dev, inode
    )


def _add_group(record: Record, data: bytes, at: int, end: int) -> None:
    pid, begin, _ = _stats(data, at, end)
    middle = _VERSION.unpack_from(data, begin)[0] == MIDDLE
    fields = (_BASIC_15 if middle else _BASIC).unpack_from(data, begin)
    record.pid, record.last = pid, True
    record.group_user_us, record.group_system_us = fields[9], fields[10]
