"""
An event to be: what the table decides, before it is written out.

Most events go straight into a line of text. To build an object of forty fields for each, only to write it and throw it
away, was two thirds of the cost of the agent; so the table makes drafts, which refer to what they tell of, and an Event
is made only for who wants one (a Python program, a filter). formats/native.py writes drafts as lines without that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from msgspec import Struct, structs

from procwatch.clock import Clock
from procwatch.events import Container, Event, Parent, ProcessEvent
from procwatch.facts import Details


class Who(Struct, gc=False, omit_defaults=True):
    """
    What is a process's own, from one exec to the next. Not changed once it is made, but for `line`.
    """

    id: str
    pid: int
    ppid: int | None
    argv: list[str] | None
    argv_truncated: bool
    parent: Parent | None
    ns_pid: int | None = None
    ancestors: list[Parent] | None = None
    line: bytes | None = None  # formats': this, as it stands in a line of output
    # procwatch.express: the same in two pieces, if nothing is out of the ordinary.
    plain: bytes | None = None
    plain_after: bytes = b""


class Forked(Struct, frozen=True, omit_defaults=True):
    """
    The tail of an exec that tells a fork, too.
    """

    forked: bool | None = None


class Via(Struct, frozen=True, omit_defaults=True):
    """
    The tail of `running`.
    """

    via: str | None = None


class Tracer(Struct, frozen=True):
    """
    The tail of `ptrace`.
    """

    tracer: int


class Failed(Struct, frozen=True):
    """
    The tail of `exec_failed`.
    """

    errno: int
    error: str


class End(Struct, frozen=True, gc=False, omit_defaults=True):
    """
    The tail of `exit`.
    """

    code: int | None
    signal: int | None
    core_dumped: bool | None
    duration_ns: int | None
    cpu_user_ns: int | None
    cpu_system_ns: int | None
    max_rss_bytes: int | None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None


FORKED = Forked(True)


class Ancestry(Protocol):
    """
    What a draft asks of a process of the table.
    """

    id: str

    def ancestors(self) -> Iterator[Ancestry]:
        """
        Parent, its parent and so on.
        """


class Draft(Struct, gc=False):
    """
    One event of one process. Nothing it refers to changes afterwards.
    """

    kind: type[ProcessEvent]
    time_ns: int
    who: Who
    details: Details
    missing: dict[str, str]
    inferred: Sequence[str]
    tail: Struct | None  # the fields that only this kind has
    process: Ancestry | None = None

    @property
    def event(self) -> str:
        """
        The kind, as of an Event.
        """
        return self.kind.event


class Names(Protocol):
    """
    What is asked of the enrich stage; each answer is a dictionary's, never waits.

    `generation` grows when an answer that was given before would now be another.
    """

    generation: int

    def user(self, uid: int | None) -> str | None:
        """
        The name of a user of this host.
        """

    def place(self, cgroup: str | None) -> tuple[Container | None, str | None, int | None]:
        """
        Container, systemd unit, and the owner of a user unit, of a cgroup path.
        """

    def pending(self, cgroup: str | None) -> bool:
        """
        Whether the names of its container may still come, soon.
        """

    def unclear(self, cgroup: str | None) -> bool:
        """
        Whether its path does not say if it is a container's, and the lookup that tells has no answer yet. Begins that.
        """


class NoNames:
    """
    For who wants none, and for tests.
    """

    generation = 1

    def user(self, uid: int | None) -> str | None:
        """
        Nobody.
        """
        return None

    def place(self, cgroup: str | None) -> tuple[Container | None, str | None, int | None]:
        """
        Nowhere.
        """
        return None, None, None

    def pending(self, cgroup: str | None) -> bool:
        """
        Never.
        """
        return False

    unclear = pending


class Maker:
    """
    Makes events of drafts.
    """

    def __init__(self, host: str, clock: Clock, names: Names | None = None) -> None:
        self.host = host
        self.clock = clock
        self.names = names or NoNames()
        self.labels: dict[str, str] | None = None  # the user's, for every event

    def event(self, draft: Draft | Event) -> Event:
        """
        The event that a draft stands for; an event is given back as it is, but for the labels.
        """
        if not isinstance(draft, Draft):
            return draft if self.labels is None else structs.replace(draft, labels=self.labels)
        who, details = draft.who, draft.details
        container, unit, unit_user = self.names.place(details.cgroup)
        tail = {} if draft.tail is None else structs.asdict(draft.tail)
        return draft.kind(
            time=self.clock.stamp(draft.time_ns),
            host=self.host,
            labels=self.labels,
            id=who.id,
            pid=who.pid,
            ppid=who.ppid,
            argv=who.argv,
            argv_truncated=who.argv_truncated,
            parent=who.parent,
            exe=details.exe,
            exe_deleted=details.exe_deleted,
            file=details.file,
            script=details.script,
            comm=details.comm,
            cwd=details.cwd,
            uid=details.uid,
            gid=details.gid,
            euid=details.euid,
            egid=details.egid,
            user=self.names.user(details.uid),
            tty=details.tty,
            session=details.session,
            cgroup=details.cgroup,
            container=container,
            unit=unit,
            unit_user=unit_user,
            exe_dev=details.exe_dev,
            exe_inode=details.exe_inode,
            exe_size=details.exe_size,
            exe_memfd=details.exe_memfd,
            namespaces=details.namespaces,
            auid=details.auid,
            privileges=details.privileges,
            exe_owner=details.exe_owner,
            exe_mode=details.exe_mode,
            exe_capabilities=details.exe_capabilities,
            exe_upper=details.exe_upper,
            hash=hash_of(details),
            ns_uid=details.ns_uid,
            audit_session=details.audit_session,
            missing=draft.missing,
            inferred=list(draft.inferred),
            ns_pid=who.ns_pid,
            ancestors=who.ancestors,
            **tail,
        )


def hash_of(details: Details) -> dict[str, str] | None:
    """
    The hashes of the executable that are known now.
    """
    digest = details.hash
    return None if digest is None or digest.hex is None else {"sha256": digest.hex}
