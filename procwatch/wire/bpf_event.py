"""
Records of the BPF programs (sources/ebpf/procwatch.bpf.c), as they lie in the kernel's ring buffer.

Each begins with the ring's own header (length with a busy and a discard bit, include/uapi/linux/bpf.h), then the
common head, then what its kind adds. Paths come leaf first, each component with a NUL ("bash\\0bin\\0usr\\0"), because
that is how the kernel walks them. This is the hot path of the whole agent: one unpack for each record, and strings that
were seen before cost a dictionary lookup.
"""

from __future__ import annotations

import mmap
import struct
from typing import NoReturn, TypeVar

from procwatch.errors import DecodeError
from procwatch.facts import (
    LOST,
    PAGED_OUT,
    TOO_LONG,
    Details,
    Exec,
    ExecFailed,
    Exit,
    Fact,
    Fork,
    Usage,
)
from procwatch.wire.procfs import tty_name

EXEC, FORK, EXIT, ARGV, EXEC_FAILED, TASK = 1, 2, 3, 4, 5, 6
KINDS = {EXEC: "exec", FORK: "fork", EXIT: "exit", EXEC_FAILED: "exec_failed"}

BUSY, DISCARD = 1 << 31, 1 << 30  # BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT
_BUSY_BYTE, _DISCARD_BYTE = BUSY >> 24, DISCARD >> 24
RING_HEADER = 8

# enum shared_flag, enum flag in procwatch.bpf.c
EXE_CUT, EXE_DETACHED, EXE_DELETED, CWD_CUT, CGROUP_CUT, FILE_CUT, SCRIPT = (1 << bit for bit in range(7))
SETUID, SETGID, CAPABILITIES = (1 << bit for bit in range(7, 10))
ARGV_CUT, ARGV_FAULT, FIRST, NO_MM = (1 << bit for bit in range(4))

# Each is the whole of a record's own part: one unpack, for that is what costs. Ring header: length, (page offset).
# Common head: (kind), pid, time, start, ppid, flags or bytes that follow.
HEAD_RECORD = struct.Struct("<I4x4xIQQII")
_AFTER_HEAD = HEAD_RECORD.size
FORK_SIZE = _AFTER_HEAD - RING_HEADER  # of one in its parent's cgroup
# maxrss, ns_pid, argv here, argv before, bytes of what is shared
EXEC_RECORD = struct.Struct(HEAD_RECORD.format + "QIIII")
# utime, stime, runtime, rss, maxrss; status; comm
EXIT_RECORD = struct.Struct(HEAD_RECORD.format + "QQQQQI4x16s")
# The same with the kind, and without ppid and comm, which an exit that goes the short way has no use for.
EXIT_BRIEF = struct.Struct("<I4xIIQQ4xIQQQQQI4x16x")
EXEC_SIZE, EXIT_SIZE = EXEC_RECORD.size, EXIT_RECORD.size - RING_HEADER
_FAILED = struct.Struct(HEAD_RECORD.format + "I4x")
# inode, size, dev; uid gid euid egid auid session tty flags; namespaces; comm; lengths of exe, cwd, cgroup, file
_SHARED = struct.Struct("<QQQ8I32s16s4H")
_NAMESPACES = struct.Struct("<8I")
_NAMESPACE_NAMES = ("pid", "mnt", "user", "net", "uts", "ipc", "cgroup", "time")

_NO_AUID = 0xFFFFFFFF
_CACHE = 4096  # entries; a full cache is emptied, which is cheaper than keeping it in order
_PARTS = 64  # processes whose arguments are on their way

Bytes = bytes | mmap.mmap  # both give bytes when sliced
PAGESIZE = mmap.PAGESIZE
V = TypeVar("V")


def path(components: bytes) -> str:
    """
    A path that was sent leaf first.

    >>> path(b"bash\\x00bin\\x00usr\\x00"), path(b"")
    ('/usr/bin/bash', '/')
    """
    names = components.split(b"\0")
    names.reverse()
    # The root of a file system that is mounted nowhere any more has the name "/".
    return "/" + b"/".join(name for name in names if name not in (b"", b"/")).decode("utf-8", "surrogateescape")


def arguments(raw: bytes) -> list[str]:
    """
    The words of an argument area, each of which ends with a NUL.

    >>> arguments(b"ls\\x00-l\\x00"), arguments(b"\\x00"), arguments(b"")
    (['ls', '-l'], [''], [])
    """
    argv = raw.decode("utf-8", "surrogateescape").split("\0")
    if not argv[-1]:
        argv.pop()
    return argv


def script_path(file: str, cwd: str) -> str:
    """
    The script that was executed, absolute. A `..` behind a name stays: that name may be a symlink, which we cannot see.

    >>> script_path("./run", "/srv"), script_path("../run", "/srv/bin"), script_path("/bin/../run", "/srv")
    ('/srv/run', '/srv/run', '/bin/../run')
    """
    names = [] if file.startswith("/") else [name for name in cwd.split("/") if name]
    resolved = True  # as long as all of it is from the kernel's own walk
    for name in file.split("/"):
        if name in ("", "."):
            continue
        if name == ".." and resolved:
            del names[-1:]
        else:
            names.append(name)
            resolved = False
    return "/" + "/".join(names)


def cpu_times(utime: int, stime: int, runtime: int) -> tuple[int, int]:
    """
    User and system time as getrusage(2) would give them: ticks tell the ratio, the scheduler's clock the sum.

    A process that no tick ever hit shows 0 in both and has run nevertheless: the kernel counts that as user time
    (cputime_adjust in kernel/sched/cputime.c), and so do we.

    >>> cpu_times(0, 0, 150_000), cpu_times(4_000_000, 4_000_000, 6_000_000)
    ((150000, 0), (3000000, 3000000))
    """
    if not stime:
        return runtime, 0
    if not utime:
        return 0, runtime
    system = runtime * stime // (utime + stime)
    return runtime - system, system


class Decoder:
    """
    Turns records into facts; keeps what makes the next record cheap, all of it bounded.

    Args:
        peaks: Keep each process's peak memory as it was at its exec: for kernels that say at the exit only what the
            process ever had. One number for each live process.
    """

    def __init__(self, *, peaks: bool = False) -> None:
        self._details: dict[bytes, Details] = {}
        self._strings: dict[bytes, str] = {}
        self._comms: dict[bytes, str] = {}
        self._namespaces: dict[bytes, dict[str, int]] = {}
        self._parts: dict[int, bytes] = {}
        self.peaks: dict[int, int] | None = {} if peaks else None

    def decode(self, data: Bytes, at: int, end: int, facts: list[Fact], limit: int = 1 << 30) -> int:
        """
        Append the facts of the records in `data[at:end]` to `facts` and return where to go on.

        Stops before a record that the kernel is still writing, and after `limit` records.

        Raises:
            DecodeError: What is there is no record. `facts` has those before it.
        """
        # What nearly all records are is decoded here and not in functions of its own: a call is a tenth of the cost.
        unpack_exec, unpack_exit = EXEC_RECORD.unpack_from, EXIT_RECORD.unpack_from
        known, comms = self._details, self._comms
        add, peaks, last, last_key = facts.append, self.peaks, None, b""
        try:
            while at < end and limit > 0:
                state, kind = data[at + 3], data[at + 8]  # the byte with the busy bit; the kind's low byte
                if state & (_BUSY_BYTE | _DISCARD_BYTE):
                    if state & _BUSY_BYTE:
                        break
                    length = HEAD_RECORD.unpack_from(data, at)[0] & ~DISCARD
                elif kind == EXIT:
                    # fmt: off
                    (length, pid, time, start, ppid, flags,
                     utime, stime, runtime, peak, group_peak, status, comm) = unpack_exit(data, at)
                    # fmt: on
                    if not EXIT_SIZE <= length <= end - at - RING_HEADER:
                        _refuse(length)
                    user, system = (runtime, 0) if not stime else cpu_times(utime, stime, runtime)
                    # The kernel counts pages in batches for each CPU: of a very small program it may not know any.
                    max_rss = self.late_peak(pid, group_peak) if flags & NO_MM else peak * PAGESIZE or None
                    comm_text = comms.get(comm) or self._new_comm(comm)
                    add(Exit(time, pid, status, Usage(user, system, max_rss), start, ppid, comm_text))
                elif kind == EXEC:
                    # fmt: off
                    (length, pid, time, start, ppid, flags,
                     peak, ns_pid, argv_here, argv_before, shared) = unpack_exec(data, at)
                    # fmt: on
                    shared_at = at + EXEC_SIZE
                    argv_at = shared_at + shared
                    argv_end = argv_at + argv_here
                    if not argv_end - at - RING_HEADER <= length <= end - at - RING_HEADER:
                        _refuse(length)
                    key = data[shared_at:argv_at]
                    if key != last_key or last is None:  # cheaper than to look for it
                        last, last_key = known.get(key) or self._new_details(key), key
                    if peaks is not None:
                        peaks[pid] = peak
                    raw = data[argv_at:argv_end]
                    if flags & (ARGV_CUT | ARGV_FAULT) or argv_before:
                        argv, truncated, missing = self._odd_argv(pid, raw, flags, argv_before)
                        add(Exec(time, pid, last, 0, start, ppid, argv, truncated, missing, ns_pid, flags & FIRST != 0))
                    else:
                        argv = arguments(raw)
                        add(Exec(time, pid, last, 0, start, ppid, argv, False, None, ns_pid, flags & FIRST != 0))
                elif kind == FORK:
                    length = self._fork(data, at, end, facts)
                elif kind == ARGV:
                    length = self._argv(data, at, end)
                elif kind == EXEC_FAILED:
                    length = self._exec_failed(data, at, end, facts)
                else:
                    raise DecodeError(f"record of kind {kind}")
                at += RING_HEADER + (length + 7 & ~7)
                limit -= 1
        except (struct.error, IndexError):
            raise DecodeError("the last record is cut") from None
        if at > end:  # records begin at multiples of 8
            raise DecodeError("the padding of the last record is cut")
        return at

    def _odd_argv(self, pid: int, raw: bytes, flags: int, before: int) -> tuple[list[str] | None, bool, str | None]:
        """
        Arguments that were sent in parts, or were cut: with whether that is so, and why there are none.
        """
        size = before + len(raw)
        if before:
            raw = self._parts.pop(pid, b"") + raw
        if len(raw) != size:
            return None, False, LOST
        argv = arguments(raw)
        if flags & ARGV_FAULT and not argv:
            return None, False, PAGED_OUT
        return argv, flags & (ARGV_CUT | ARGV_FAULT) != 0, None

    def _fork(self, data: Bytes, at: int, end: int, facts: list[Fact]) -> int:
        length, pid, time, start, ppid, size = HEAD_RECORD.unpack_from(data, at)
        cgroup_at = at + _AFTER_HEAD
        _check(cgroup_at + size, at, length, end)
        facts.append(Fork(time, pid, ppid, start, path(data[cgroup_at : cgroup_at + size]) if size else None))
        return length  # type: ignore[no-any-return]

    def _argv(self, data: Bytes, at: int, end: int) -> int:
        length, pid, _, _, _, size = HEAD_RECORD.unpack_from(data, at)
        argv_at = at + _AFTER_HEAD
        _check(argv_at + size, at, length, end)
        if pid not in self._parts and len(self._parts) >= _PARTS:
            self._parts.clear()  # their exec records were dropped
        self._parts[pid] = self._parts.get(pid, b"") + data[argv_at : argv_at + size]
        return length  # type: ignore[no-any-return]

    def _exec_failed(self, data: Bytes, at: int, end: int, facts: list[Fact]) -> int:
        length, pid, time, _, _, size, error = _FAILED.unpack_from(data, at)
        file_at = at + _FAILED.size
        _check(file_at + size, at, length, end)
        facts.append(ExecFailed(time, pid, data[file_at : file_at + size].decode("utf-8", "surrogateescape"), error))
        return length  # type: ignore[no-any-return]

    def late_peak(self, pid: int, group_peak: int) -> int | None:
        """
        Peak memory where only signal_struct has it at exit: that includes what ran in the process before its last
        exec, so it is this program's own only when it has grown since.
        """
        before = self.peaks.pop(pid, None) if self.peaks is not None else None
        return group_peak * PAGESIZE if before is not None and group_peak > before else None

    def details(self, shared: bytes) -> Details:
        """
        What the shared part of an exec's record says; the same bytes are the same object.

        Raises:
            DecodeError: It does not hold what it says.
        """
        return self._details.get(shared) or self._new_details(shared)

    def _new_details(self, shared: bytes) -> Details:
        # One line for each group of the record: a name on a line each would be twenty-five lines.
        # fmt: off
        (inode, size, dev,
         uid, gid, euid, egid, auid, session, tty, flags, namespaces, comm,
         exe_size, cwd_size, cgroup_size, file_size) = _SHARED.unpack_from(shared)
        # fmt: on
        cwd_at = _SHARED.size + exe_size
        cgroup_at = cwd_at + cwd_size
        file_at = cgroup_at + cgroup_size
        if file_at + file_size != len(shared):
            raise DecodeError(f"names of {file_at + file_size} bytes in {len(shared)}")
        details = Details(
            comm=self._comms.get(comm) or self._new_comm(comm),
            exe=self._path(shared[_SHARED.size : cwd_at]),
            exe_deleted=flags & EXE_DELETED != 0,
            file=shared[file_at:].decode("utf-8", "surrogateescape"),
            cwd=self._path(shared[cwd_at:cgroup_at]),
            uid=uid,
            gid=gid,
            euid=euid,
            egid=egid,
            tty=tty_name(tty),
            session=session,
            cgroup=self._path(shared[cgroup_at:file_at]),
            exe_dev=dev,
            exe_inode=inode,
            exe_size=size,
            exe_memfd=False,
            namespaces=self._namespaces.get(namespaces) or self._new_namespaces(namespaces),
            auid=None if auid == _NO_AUID else auid,
        )
        _apply(details, flags)
        return _remember(self._details, shared, details)

    def _path(self, components: bytes) -> str:
        return self._strings.get(components) or _remember(self._strings, components, path(components))

    def _new_comm(self, comm: bytes) -> str:
        return _remember(self._comms, comm, comm.partition(b"\0")[0].decode("utf-8", "surrogateescape"))

    def _new_namespaces(self, numbers: bytes) -> dict[str, int]:
        pairs = zip(_NAMESPACE_NAMES, _NAMESPACES.unpack(numbers), strict=True)
        return _remember(self._namespaces, numbers, {name: number for name, number in pairs if number})


def _check(inner_end: int, at: int, length: int, end: int) -> None:
    if not inner_end <= at + RING_HEADER + length <= end:
        _refuse(length)


def _refuse(length: int) -> NoReturn:
    raise DecodeError(f"record of {length} bytes does not hold what it says")


def _remember(cache: dict[bytes, V], key: bytes, value: V) -> V:
    if len(cache) >= _CACHE:
        cache.clear()
    cache[key] = value
    return value


def _apply(details: Details, flags: int) -> None:
    """
    What is out of the ordinary with an exec.
    """
    if flags & EXE_DETACHED:
        details.exe_memfd = details.exe is not None and details.exe.startswith("/memfd:")
    if flags & SCRIPT and details.file is not None and details.cwd is not None:
        details.script = script_path(details.file, details.cwd)
    for flag, field in ((EXE_CUT, "exe"), (CWD_CUT, "cwd"), (CGROUP_CUT, "cgroup"), (FILE_CUT, "file")):
        if flags & flag:
            setattr(details, field, None)
            details.missing[field] = TOO_LONG
    if flags & (SETUID | SETGID | CAPABILITIES):
        named = ((SETUID, "setuid"), (SETGID, "setgid"), (CAPABILITIES, "capabilities"))
        details.privileges = [name for flag, name in named if flags & flag]
