"""
What sources emit: partial knowledge of one process at one moment.

A fact is what one source learnt, nothing more; the table joins facts into events. Fields that the source does not
know are None. All times are CLOCK_BOOTTIME in nanoseconds. Strings are the kernel's bytes decoded as UTF-8 with
surrogateescape, so that the exact bytes can be had back. `pid` is always the thread group (what user space calls a
process); only `thread` facts carry a thread's own id.

Facts are mutable on purpose: the reader of /proc fills `details` into an Exec that netlink announced. They are not
tracked by the garbage collector (`gc=False`): they never form cycles, and live for one batch.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct, field

# Why a field is null (`missing` in an event).
EXITED = "exited"  # the process was gone, or a zombie, before it could be read
PERMISSION = "permission"  # the kernel refuses it to our user
KERNEL_THREAD = "kernel_thread"  # has no such thing
REPLACED = "replaced"  # the process had executed something else by the time it was read
NOT_REPORTED = "not_reported"  # this backend's mechanism does not carry it
LOST = "lost"  # the fact that held it was dropped
PAGED_OUT = "paged_out"  # its memory was not resident when the kernel was asked
PRESSURE = "pressure"  # we had no descriptor, no memory or no time left for it
TOO_LONG = "too_long"  # longer than the 4096 bytes of a path that the kernel itself would say


class Digest(Protocol):
    """
    A hash that is there, or will be.
    """

    hex: str | None
    done: bool


class Details(Struct, gc=False):
    """
    What was read of one process, by any means.

    None together with an entry in `missing` means "tried, and could not, because"; None without one means
    "not asked": the table then keeps or inherits what it knew.
    """

    ppid: int | None = None
    start_ticks: int | None = None  # field 22 of /proc/PID/stat: USER_HZ ticks since boot, proc(5)
    comm: str | None = None
    exe: str | None = None  # as /proc/PID/exe, without " (deleted)"; always absolute, or "/memfd:name"
    exe_deleted: bool | None = None
    file: str | None = None  # the name as given to execve (AT_EXECFN, bprm->filename)
    script: str | None = None  # path of the `#!` file, when one was executed
    argv: list[str] | None = None
    argv_truncated: bool = False
    cwd: str | None = None
    uid: int | None = None
    gid: int | None = None
    euid: int | None = None
    egid: int | None = None
    tty: str | None = None  # "pts/0", or "" for none
    session: int | None = None
    cgroup: str | None = None
    threads: int | None = None
    missing: dict[str, str] = {}
    inferred: tuple[str, ...] = ()
    # What only some sources know.
    exe_dev: int | None = None  # st_dev, as os.makedev
    exe_inode: int | None = None
    exe_size: int | None = None  # bytes
    exe_memfd: bool | None = None
    ns_pid: int | None = None  # pid in the process's own pid namespace
    namespaces: dict[str, int] | None = None  # "pid", "mnt", "user" ...: inode numbers
    auid: int | None = None  # audit login uid, unset = None
    privileges: list[str] | None = None  # gained by this exec: "setuid", "setgid", "capabilities"
    audit_session: int | None = None
    # The enrich stage's.
    inspected: bool = False
    exe_owner: int | None = None
    exe_mode: str | None = None
    exe_capabilities: str | None = None
    exe_upper: bool | None = None
    hash: Digest | None = None
    ns_uid: int | None = None
    unread: Details | None = None  # the table's: what remains of these after an exec that nobody could read
    line: bytes | None = None  # formats': these, as they stand in a line of output
    named: int = 0  # formats': as of which generation of the names


class Usage(Struct, gc=False):
    """
    What a process had used when it ended.
    """

    cpu_user_ns: int | None = None
    cpu_system_ns: int | None = None
    max_rss_bytes: int | None = None
    io_read_bytes: int | None = None  # from storage
    io_write_bytes: int | None = None  # to storage


class Fact(Struct, gc=False):
    """
    Base of all facts.
    """

    time_ns: int  # kernel's stamp where the mechanism has one, else when we read it
    pid: int


class Fork(Fact, gc=False):
    """
    A process was born. (Threads are `Thread`.)
    """

    ppid: int
    start_ticks: int | None = None  # None: derived from time_ns, and marked inferred
    cgroup: str | None = None  # None: the parent's
    details: Details | None = None


class Exec(Fact, gc=False):
    """
    A process now runs another program.
    """

    details: Details | None = None
    read_ns: int = 0  # when `details` had been read; 0: taken in the kernel, at the exec itself
    # Taken in the kernel: what is the process's own, while `details` are shared by all that are alike otherwise.
    start_ns: int | None = None  # birth, CLOCK_BOOTTIME; None: all is in `details`
    ppid: int | None = None
    argv: list[str] | None = None
    argv_truncated: bool = False
    argv_missing: str | None = None
    ns_pid: int | None = None
    first: bool = False  # no exec since the fork


class Exit(Fact, gc=False):
    """
    A process ended: its last thread is dead.
    """

    status: int | None = None  # as wait(2) gives it; None: unknown
    usage: Usage | None = None
    start_ns: int | None = None  # birth, CLOCK_BOOTTIME
    ppid: int | None = None
    comm: str | None = None


class Thread(Fact, gc=False):
    """
    A thread of process `pid` was born, or ended. netlink says no more than that, and the table has to count.
    """

    tid: int = 0
    born: bool = True
    status: int = 0


class Changed(Fact, gc=False):
    """
    Something of a living process changed: `what` is "comm", "uid", "gid", "sid", "ptrace" or "coredump".
    """

    what: str = ""
    comm: str | None = None
    real: int | None = None  # uid or gid
    effective: int | None = None
    tracer: int | None = None  # pid of the tracer, 0: detached


class ExecFailed(Fact, gc=False):
    """
    An exec was refused.
    """

    file: str | None = None
    errno: int = 0


class Alive(Fact, gc=False):
    """
    A look at a living process: the snapshot at the start, the scan, a resync.
    """

    details: Details = field(default_factory=Details)


class Gone(Fact, gc=False):
    """
    A process that was known is not there any more, and nobody said how it ended.
    """


class Opened(Fact, gc=False):
    """
    A file was opened to be executed by `pid` (fanotify). It may be the binary, a script, or the ELF interpreter.
    """

    path: str = ""
    deleted: bool = False
    memfd: bool = False
    dev: int = 0
    inode: int = 0
    size: int = 0
    kind: str = ""  # "elf" (static or dynamic), "script", "other": by its first bytes
    interpreter: str | None = None  # PT_INTERP of an ELF file, or the path on the `#!` line
    held: Details | None = None  # what was read while the kernel held the exec (hold mode)
    stray: bool = False  # a script, and there is no such interpreter: the exec failed
    over: bool = False  # a file of an overlay: the open before it was of the layer's file, and is not an exec's own


class Accounted(Fact, gc=False):
    """
    The kernel's account of an ended process (taskstats): joined with its Exit.
    """

    usage: Usage = field(default_factory=Usage)
    ppid: int | None = None
    uid: int | None = None
    gid: int | None = None
    comm: str | None = None
    exe_dev: int | None = None
    exe_inode: int | None = None
    status: int | None = None
    start_ns: int | None = None  # start, CLOCK_BOOTTIME, as exact as the record allows
    elapsed_ns: int | None = None  # from its start to its end, to the microsecond; does not count suspend
    exe_memfd: bool = False  # `exe_dev` is that of files in memory


class Decided(Fact, gc=False):
    """
    What is to be told is known already, and keeps its place among what the other facts tell. `pid` is 0.
    """

    event: object = None


class Lost(Fact, gc=False):
    """
    Facts that were dropped. `pid` is 0. Placed in the batch where it happened.
    """

    where: str = ""  # "netlink_socket", "fanotify_queue", "ring_buffer", "taskstats_socket", "scan"
    count: int = 0
    exact: bool = True
    since_ns: int = 0
    until_ns: int = 0
    kinds: dict[str, int] = {}
