"""
Records of the BPF programs (sources/ebpf/procwatch.bpf.c), as they lie in the kernel's ring buffer.

Each begins with the ring's own header (length with a busy and a discard bit, include/uapi/linux/bpf.h), then the
common head, then what its kind adds. Paths come leaf first, each component with a NUL ("bash\\0bin\\0usr\\0"), because
that is how the kernel walks them. This is the hot path of the whole agent: one unpack for a fork, two for the others,
and strings that were seen before cost a dictionary lookup.
"""

from __future__ import annotations

import struct
from mmap import PAGESIZE
from typing import TypeVar

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

EXEC, FORK, EXIT, ARGV, EXEC_FAILED = 1, 2, 3, 4, 5
KINDS = {EXEC: "exec", FORK: "fork", EXIT: "exit", EXEC_FAILED: "exec_failed"}

BUSY, DISCARD = 1 << 31, 1 << 30  # BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT
RING_HEADER = 8

# enum flag in procwatch.bpf.c
EXE_CUT, EXE_DETACHED, EXE_DELETED, CWD_CUT, CGROUP_CUT, FILE_CUT, SCRIPT = (1 << bit for bit in range(7))
ARGV_CUT, ARGV_FAULT, SETUID, SETGID, CAPABILITIES, NO_MM = (1 << bit for bit in range(7, 13))

# Ring header (length, page offset), then: kind, pid, time, start ticks, ppid, flags or bytes.
_HEAD = struct.Struct("<IIIIQQII")
# inode, size, dev, maxrss; uid gid euid egid auid session tty ns_pid; namespaces; comm; argv here, argv before; lengths
_EXEC = struct.Struct("<QQQQ8I32s16sIIHHHH")
# utime, stime, runtime, rss, maxrss; status; comm
_EXIT = struct.Struct("<QQQQQIxxxx16s")
_FAILED = struct.Struct("<Ixxxx")
_LENGTHS = struct.Struct("<HHHH")
_NAMESPACES = struct.Struct("<8I")
_NAMESPACE_NAMES = ("pid", "mnt", "user", "net", "uts", "ipc", "cgroup", "time")

_NO_AUID = 0xFFFFFFFF
_CACHE = 4096  # entries; a full cache is emptied, which is cheaper than keeping it in order
_PARTS = 64  # processes whose arguments are on their way

Names = tuple[str, str, str, str]
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


def tty_name(dev: int) -> str:
    """
    Name of a terminal by its device number (20 bits of minor), as ps shows it; devices.txt of the kernel.

    >>> tty_name(136 << 20 | 3), tty_name(4 << 20 | 1), tty_name(4 << 20 | 64), tty_name(229 << 20), tty_name(0)
    ('pts/3', 'tty1', 'ttyS0', '229:0', '')
    """
    major, minor = dev >> 20, dev & 0xFFFFF
    if 136 <= major <= 143:
        return f"pts/{(major - 136) * 256 + minor}"
    if major == 4:
        return f"tty{minor}" if minor < 64 else f"ttyS{minor - 64}"
    return f"{major}:{minor}" if dev else ""


def script_path(file: str, cwd: str) -> str:
    """
    The script that was executed, absolute. `..` stays: it may lead through a symlink that we cannot see.

    >>> script_path("./run", "/srv"), script_path("/bin/run", "/srv"), script_path("../run", "/")
    ('/srv/run', '/bin/run', '/../run')
    """
    if file.startswith("/"):
        return file
    names = [name for name in file.split("/") if name not in ("", ".")]
    return "/".join([cwd.rstrip("/"), *names])


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
    """

    def __init__(self) -> None:
        self._names: dict[bytes, Names] = {}
        self._comms: dict[bytes, str] = {}
        self._namespaces: dict[bytes, dict[str, int]] = {}
        self._parts: dict[int, bytes] = {}
        self._peaks: dict[int, int] | None = None

    def decode(self, data: bytes | memoryview, at: int, end: int, facts: list[Fact], limit: int = 1 << 30) -> int:
        """
        Append the facts of the records in `data[at:end]` to `facts` and return where to go on.

        Stops before a record that the kernel is still writing, and after `limit` records.

        Raises:
            DecodeError: What is there is no record. `facts` has those before it.
        """
        head = _HEAD.unpack_from
        append = facts.append
        try:
            while at < end and limit > 0:
                length, _, kind, pid, time, start, ppid, extra = head(data, at)
                if length & BUSY:
                    break
                following = at + RING_HEADER + ((length & ~DISCARD) + 7 & ~7)
                if following > end:
                    raise DecodeError(f"record of {length} bytes, {end - at} are there")
                if length & DISCARD:
                    pass
                elif kind == EXEC:
                    append(self._exec(data, at, following, pid, time, start, ppid, extra))
                elif kind == FORK:
                    append(Fork(time, pid, ppid, start, self._fork_cgroup(data, at, following, extra)))
                elif kind == EXIT:
                    append(self._exit(data, at, following, pid, time, start, ppid, extra))
                else:
                    self._rare(data, at, following, kind, pid, time, extra, facts)
                at = following
                limit -= 1
        except struct.error as error:
            raise DecodeError(f"record is cut: {error}") from None
        return at

    def _exec(
        self, data: bytes | memoryview, at: int, end: int, pid: int, time: int, start: int, ppid: int, flags: int
    ) -> Exec:
        # One line for each group of the record: a name on a line each would be forty lines.
        # fmt: off
        (inode, size, dev, peak,
         uid, gid, euid, egid, auid, session, tty, ns_pid, namespaces, comm,
         argv_here, argv_before, exe_size, cwd_size, cgroup_size, file_size) = _EXEC.unpack_from(data, at + 40)
        # fmt: on
        names_at = at + 168
        argv_at = names_at + exe_size + cwd_size + cgroup_size + file_size
        argv_end = argv_at + argv_here
        if argv_end > end:
            raise DecodeError(f"strings end {argv_end - end} bytes after the record")
        key = bytes(data[names_at - 8 : argv_at])  # the lengths say where one name ends
        exe, cwd, cgroup, file = self._names.get(key) or self._new_names(key)
        raw = bytes(data[argv_at:argv_end])
        if argv_before:
            raw = self._parts.pop(pid, b"") + raw
        argv = raw.decode("utf-8", "surrogateescape").split("\0")
        if not argv[-1]:
            argv.pop()
        if self._peaks is not None:
            self._peaks[pid] = peak
        # fmt: off
        details = Details(
            ppid, start, self._comms.get(comm) or self._new_comm(comm), exe, False, file, None, argv, False, cwd,
            uid, gid, euid, egid, tty_name(tty) if tty else "", session, cgroup, 1, {}, (), dev, inode, size, False,
            ns_pid, self._namespaces.get(namespaces) or self._new_namespaces(namespaces),
            None if auid == _NO_AUID else auid,
        )
        # fmt: on
        if flags:
            _apply(details, flags)
        if argv_before and len(raw) != argv_before + argv_here:
            details.argv = None
            details.missing["argv"] = LOST
        return Exec(time, pid, details)

    def _exit(
        self, data: bytes | memoryview, at: int, end: int, pid: int, time: int, start: int, ppid: int, flags: int
    ) -> Exit:
        utime, stime, runtime, peak, group_peak, status, comm = _EXIT.unpack_from(data, at + 40)
        if at + 104 > end:
            raise DecodeError(f"exit record of {end - at} bytes")
        user, system = (runtime, 0) if not stime else cpu_times(utime, stime, runtime)
        max_rss = self._late_peak(pid, group_peak) if flags & NO_MM else peak * PAGESIZE
        comm_text = self._comms.get(comm) or self._new_comm(comm)
        return Exit(time, pid, status, Usage(user, system, max_rss), start, ppid, comm_text)

    def _late_peak(self, pid: int, group_peak: int) -> int | None:
        """
        Peak memory where only signal_struct has it at exit: that includes what ran in the process before its last
        exec, so it is this program's own only when it has grown since.
        """
        if self._peaks is None:
            self._peaks = {}
        before = self._peaks.pop(pid, None)
        return group_peak * PAGESIZE if before is not None and group_peak > before else None

    def _fork_cgroup(self, data: bytes | memoryview, at: int, end: int, size: int) -> str | None:
        if not size:
            return None
        if at + 40 + size > end:
            raise DecodeError(f"cgroup of {size} bytes is longer than its record")
        return path(bytes(data[at + 40 : at + 40 + size]))

    def _rare(
        self, data: bytes | memoryview, at: int, end: int, kind: int, pid: int, time: int, size: int, facts: list[Fact]
    ) -> None:
        if kind == ARGV:
            if at + 40 + size > end:
                raise DecodeError(f"{size} bytes of arguments are longer than their record")
            if pid not in self._parts and len(self._parts) >= _PARTS:
                self._parts.clear()  # their exec records were dropped
            self._parts[pid] = self._parts.get(pid, b"") + bytes(data[at + 40 : at + 40 + size])
        elif kind == EXEC_FAILED:
            (error,) = _FAILED.unpack_from(data, at + 40)
            if at + 48 + size > end:
                raise DecodeError(f"file name of {size} bytes is longer than its record")
            name = bytes(data[at + 48 : at + 48 + size]).decode("utf-8", "surrogateescape")
            facts.append(ExecFailed(time, pid, name, error))
        else:
            raise DecodeError(f"record of kind {kind}")

    def _new_names(self, key: bytes) -> Names:
        exe, cwd, cgroup, file = _LENGTHS.unpack_from(key)
        at = 8
        parts = []
        for size in (exe, cwd, cgroup, file):
            parts.append(key[at : at + size])
            at += size
        name = parts.pop().decode("utf-8", "surrogateescape")
        names: Names = (path(parts[0]), path(parts[1]), path(parts[2]), name)
        return _remember(self._names, key, names)

    def _new_comm(self, comm: bytes) -> str:
        return _remember(self._comms, comm, comm.partition(b"\0")[0].decode("utf-8", "surrogateescape"))

    def _new_namespaces(self, numbers: bytes) -> dict[str, int]:
        pairs = zip(_NAMESPACE_NAMES, _NAMESPACES.unpack(numbers), strict=True)
        return _remember(self._namespaces, numbers, {name: number for name, number in pairs if number})


def _remember(cache: dict[bytes, V], key: bytes, value: V) -> V:
    if len(cache) >= _CACHE:
        cache.clear()
    cache[key] = value
    return value


def _apply(details: Details, flags: int) -> None:
    """
    What is out of the ordinary with an exec.
    """
    missing = details.missing
    if flags & EXE_DELETED:
        details.exe_deleted = True
    if flags & EXE_DETACHED:
        details.exe_memfd = details.exe is not None and details.exe.startswith("/memfd:")
    if flags & SCRIPT and details.file is not None and details.cwd is not None:
        details.script = script_path(details.file, details.cwd)
    for flag, field in ((EXE_CUT, "exe"), (CWD_CUT, "cwd"), (CGROUP_CUT, "cgroup"), (FILE_CUT, "file")):
        if flags & flag:
            setattr(details, field, None)
            missing[field] = TOO_LONG
    if flags & (ARGV_CUT | ARGV_FAULT):
        details.argv_truncated = True
    if flags & ARGV_FAULT and not details.argv:
        details.argv = None
        details.argv_truncated = False
        missing["argv"] = PAGED_OUT
    if flags & (SETUID | SETGID | CAPABILITIES):
        named = ((SETUID, "setuid"), (SETGID, "setgid"), (CAPABILITIES, "capabilities"))
        details.privileges = [name for flag, name in named if flags & flag]
