"""
What users receive: the event types and their fields. This is the schema, in one place; docs/events.md explains it.

Events are immutable. The same names stand in Python and in native JSON. A field that belongs to the kind is always
there: None where it could not be had, and then `missing` says why. The fields of the last block of each type are
extras: left out of the JSON when None. Strings are the kernel's bytes as UTF-8 with surrogateescape.
"""

from __future__ import annotations

import base64
from datetime import datetime
from signal import Signals
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from msgspec import Struct

if TYPE_CHECKING:
    import psutil


class Parent(Struct, frozen=True, gc=False):
    """
    The process that forked this one, as it was then known; also one of its `ancestors`.
    """

    id: str
    pid: int
    exe: str | None
    comm: str | None


class Pod(Struct, frozen=True, gc=False, omit_defaults=True):
    """
    A Kubernetes pod.
    """

    uid: str | None
    namespace: str | None
    name: str | None
    container: str | None = None  # the container's name within the pod
    labels: dict[str, str] | None = None


class Container(Struct, frozen=True, omit_defaults=True):
    """
    The innermost container that a process ran in.
    """

    id: str
    runtime: str | None  # "docker", "containerd", "cri-o", "podman", "lxc", "nspawn", "runc" ...
    name: str | None
    image: str | None
    pod: Pod | None
    image_id: str | None = None
    labels: dict[str, str] | None = None
    created: str | None = None  # RFC 3339
    outer: list[str] | None = None  # ids of the containers around it, outermost first


class Skipped(Struct, frozen=True):
    """
    A source that does not run, why, and what would make it run.
    """

    name: str
    reason: str
    remedy: str


class Event(Struct, frozen=True, tag_field="event", omit_defaults=True):
    """
    Base of all events.

    `time` is RFC 3339, UTC, with nanoseconds, from the kernel's own stamp.
    """

    event: ClassVar[str] = ""
    time: str
    host: str
    labels: dict[str, str] | None = None  # the same for every event, as the agent's configuration says

    @property
    def time_ns(self) -> int:
        """
        `time` as nanoseconds since 1970-01-01 UTC.
        """
        seconds = int(datetime.fromisoformat(self.time[:19] + "+00:00").timestamp())
        return seconds * 1_000_000_000 + int(self.time[20:29])

    @property
    def raw(self) -> dict[str, Any]:
        """
        The exact bytes, base64, of each field that is not valid UTF-8; a list is given whole.
        """
        return raw_of(self)


class ProcessEvent(Event, frozen=True, kw_only=True, omit_defaults=True):
    """
    Something happened to one process. See docs/events.md for each field.
    """

    # Who: what is its own.
    id: str
    pid: int
    ppid: int | None
    argv: list[str] | None
    argv_truncated: bool
    parent: Parent | None
    ns_pid: int | None = None
    ancestors: list[Parent] | None = None
    # What and where: processes of one kind have all of this in common, so it is written out once for all of them.
    exe: str | None
    exe_deleted: bool | None
    file: str | None
    script: str | None
    comm: str | None
    cwd: str | None
    uid: int | None
    gid: int | None
    euid: int | None
    egid: int | None
    user: str | None
    tty: str | None
    session: int | None
    cgroup: str | None
    container: Container | None
    unit: str | None
    unit_user: int | None = None  # uid of the owner of a user unit
    exe_dev: int | None = None
    exe_inode: int | None = None
    exe_size: int | None = None
    exe_memfd: bool | None = None
    namespaces: dict[str, int] | None = None
    auid: int | None = None
    privileges: list[str] | None = None
    exe_owner: int | None = None
    exe_mode: str | None = None
    exe_capabilities: str | None = None
    exe_upper: bool | None = None
    hash: dict[str, str] | None = None
    ns_uid: int | None = None
    audit_session: int | None = None
    # How much of it is known, and how.
    missing: dict[str, str]
    inferred: list[str]

    def process(self) -> psutil.Process | None:
        """
        A `psutil.Process` of exactly this process, or None when it is gone (also when its pid is used again).
        """
        import psutil

        try:
            process = psutil.Process(self.pid)
            # psutil gives the start in seconds since 1970; only the tick is free of clock changes.
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                ticks = stat.read().rpartition(b")")[2].split()[19]
        except (psutil.Error, OSError, IndexError):
            return None
        return process if int(ticks) == int(self.id.rpartition("-")[2]) else None


class Exec(ProcessEvent, frozen=True, kw_only=True, tag="exec", omit_defaults=True):
    """
    A process runs another program.
    """

    event: ClassVar[Literal["exec"]] = "exec"
    forked: bool | None = None  # True: this line tells the birth of the process, too


class Fork(ProcessEvent, frozen=True, kw_only=True, tag="fork", omit_defaults=True):
    """
    A process was born, and did not execute a program soon after.
    """

    event: ClassVar[Literal["fork"]] = "fork"


class Running(ProcessEvent, frozen=True, kw_only=True, tag="running", omit_defaults=True):
    """
    A process that was there already: at the start, or found by the look after a loss.
    """

    event: ClassVar[Literal["running"]] = "running"
    via: str | None = None  # "snapshot", "resync" or "restart"


class Exit(ProcessEvent, frozen=True, kw_only=True, tag="exit", omit_defaults=True):
    """
    A process ended; with what its exec said.
    """

    event: ClassVar[Literal["exit"]] = "exit"
    code: int | None
    signal: int | None  # that killed it; `code` is None then
    core_dumped: bool | None
    duration_ns: int | None  # since it was born
    cpu_user_ns: int | None
    cpu_system_ns: int | None
    max_rss_bytes: int | None
    # extras
    io_read_bytes: int | None = None  # from storage
    io_write_bytes: int | None = None  # to storage

    @property
    def signal_name(self) -> str | None:
        """
        `signal` by its name, as "SIGSEGV".
        """
        if self.signal is None:
            return None
        try:
            return Signals(self.signal).name
        except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
            return f"SIG{self.signal}"


class Vanished(ProcessEvent, frozen=True, kw_only=True, tag="vanished", omit_defaults=True):
    """
    A process that was known is gone, and its end was not seen.
    """

    event: ClassVar[Literal["vanished"]] = "vanished"


class Comm(ProcessEvent, frozen=True, kw_only=True, tag="comm", omit_defaults=True):
    """
    A process gave itself another name: `comm` is the new one.
    """

    event: ClassVar[Literal["comm"]] = "comm"


class Uid(ProcessEvent, frozen=True, kw_only=True, tag="uid", omit_defaults=True):
    """
    A process changed its user: `uid` and `euid` are the new ones.
    """

    event: ClassVar[Literal["uid"]] = "uid"


class Gid(ProcessEvent, frozen=True, kw_only=True, tag="gid", omit_defaults=True):
    """
    A process changed its group: `gid` and `egid` are the new ones.
    """

    event: ClassVar[Literal["gid"]] = "gid"


class Sid(ProcessEvent, frozen=True, kw_only=True, tag="sid", omit_defaults=True):
    """
    A process began a session of its own.
    """

    event: ClassVar[Literal["sid"]] = "sid"


class Ptrace(ProcessEvent, frozen=True, kw_only=True, tag="ptrace", omit_defaults=True):
    """
    A process is traced by `tracer`, or by nobody any more (0).
    """

    event: ClassVar[Literal["ptrace"]] = "ptrace"
    tracer: int


class Coredump(ProcessEvent, frozen=True, kw_only=True, tag="coredump", omit_defaults=True):
    """
    A process is about to die with a core dump.
    """

    event: ClassVar[Literal["coredump"]] = "coredump"


class ExecFailed(ProcessEvent, frozen=True, kw_only=True, tag="exec_failed", omit_defaults=True):
    """
    An exec was refused: `file` is what was asked for, the rest is the process that asked.
    """

    event: ClassVar[Literal["exec_failed"]] = "exec_failed"
    errno: int
    error: str  # "ENOENT"


class Lost(Event, frozen=True, kw_only=True, tag="lost", omit_defaults=True):
    """
    Events were dropped here, by the kernel or by us.
    """

    event: ClassVar[Literal["lost"]] = "lost"
    count: int
    exact: bool  # False: an upper bound, or the best that is known
    where: str
    since: str | None
    until: str | None
    kinds: dict[str, int] | None = None  # how many of each kind, where that is known


class ContainerEvent(Event, frozen=True, kw_only=True, tag="container", omit_defaults=True):
    """
    The names of a container became known.
    """

    event: ClassVar[Literal["container"]] = "container"
    container: Container
    cgroup: str | None


class Ready(Event, frozen=True, kw_only=True, tag="ready", omit_defaults=True):
    """
    The first event: what watches, and what does not and why.
    """

    event: ClassVar[Literal["ready"]] = "ready"
    boot_id: str
    version: str
    backend: str
    sources: list[str]
    skipped: list[Skipped]
    kernel: str


class Stop(Event, frozen=True, kw_only=True, tag="stop", omit_defaults=True):
    """
    The last event: what was shown, what was lost, and what it cost.
    """

    event: ClassVar[Literal["stop"]] = "stop"
    counts: dict[str, int]  # events of each kind that were shown
    lost: int
    duration_ns: int
    cpu_ns: int  # user and system, of this program
    max_rss_bytes: int
    coverage: dict[str, float] | None = None


AnyEvent = (
    Ready
    | Exec
    | Fork
    | Exit
    | Running
    | Vanished
    | Comm
    | Uid
    | Gid
    | Sid
    | Ptrace
    | Coredump
    | ExecFailed
    | ContainerEvent
    | Lost
    | Stop
)

# Kinds that `--events` takes; the others (ready, lost, stop) are always there.
KINDS: tuple[str, ...] = (
    "exec", "fork", "exit", "running", "vanished", "comm", "uid", "gid", "sid", "ptrace", "coredump",
    "exec_failed", "container",
)  # fmt: skip
DEFAULT_KINDS: tuple[str, ...] = ("exec", "fork", "exit", "running", "vanished", "container")


def raw_of(value: Struct) -> dict[str, Any]:
    """
    Each field of `value` that holds bytes which are not UTF-8, as base64; in others as "parent.exe", "ancestors.0.exe".
    """
    found: dict[str, Any] = {}
    for name in value.__struct_fields__:
        field = getattr(value, name)
        if isinstance(field, str):
            if not _is_text(field):
                found[name] = _base64(field)
        elif isinstance(field, list):
            if field and all(isinstance(item, str) for item in field):
                if not all(map(_is_text, field)):
                    found[name] = [_base64(item) for item in field]
                continue
            for at, item in enumerate(field):
                if isinstance(item, Struct):
                    found.update({f"{name}.{at}.{inner}": raw for inner, raw in raw_of(item).items()})
        elif isinstance(field, Struct):
            found.update({f"{name}.{inner}": raw for inner, raw in raw_of(field).items()})
    return found


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()
