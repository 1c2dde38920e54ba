"""
One live process, as the table knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from procwatch.events import Parent
from procwatch.facts import Details
from procwatch.table.draft import Who

# A child has these of its parent until it says otherwise: fork(2) copies them.
AT_FORK = (
    "exe", "file", "script", "argv", "comm", "cwd", "uid", "gid", "euid", "egid", "tty", "session", "cgroup",
)  # fmt: skip
# execve(2) leaves these as they were; what it replaces (exe, argv, comm, file) cannot be deduced.
AT_EXEC = ("cwd", "uid", "gid", "euid", "egid", "tty", "session", "cgroup")

# A chain of ended ancestors is cut beyond this many generations: a process that re-spawns itself for ever
# would otherwise keep all its past alive.
MAX_DEPTH = 128


class Process(Struct, gc=False):
    """
    A mutable record; the table alone writes it. `make` makes one.

    `details` is shared with the parent until the child executes a program of its own. An ended process lives on as long
    as a child's `parent` refers to it.
    """

    pid: int
    start_ticks: int
    id: str
    parent: Process | None
    details: Details
    ppid: int | None
    argv: list[str] | None
    argv_truncated: bool = False
    ns_pid: int | None = None
    depth: int = 0
    born_ns: int = 0  # 0: only known to the tick
    who: Who | None = None
    view: Parent | None = None
    inherited: bool = False  # `details` are the parent's
    argv_missing: str | None = None
    start_inferred: bool = False  # derived from the stamp of the fork
    forked_ns: int = 0  # a fork that no event has told yet
    seen_ns: int = 0  # when /proc was looked at; threads born before are counted in `others`
    held: object | None = None
    ended: bool = False
    # Threads, where the source tells of each (netlink): the process ends with the last of them.
    tids: set[int] | None = None
    others: int = 0  # threads that were there already, whose numbers we do not know
    leader_alive: bool = True
    leader_status: int = 0

    def cut(self) -> None:
        """
        Forget the ancestors beyond half of the limit, as soon as one of them has ended; O(1) amortised.
        """
        ancestor: Process | None = self
        for _ in range(MAX_DEPTH // 2):
            if ancestor is None:
                return
            ancestor = ancestor.parent
        while ancestor is not None and not ancestor.ended:
            ancestor = ancestor.parent
        if ancestor is not None:
            ancestor.parent = None
        self.depth = MAX_DEPTH // 2

    def ancestors(self) -> Iterator[Process]:
        """
        Parent, its parent and so on, as far as they are known.
        """
        ancestor = self.parent
        while ancestor is not None:
            yield ancestor
            ancestor = ancestor.parent

    def as_parent(self) -> Parent:
        """
        What events of children say of this process.
        """
        if self.view is None:
            self.view = Parent(self.id, self.pid, self.details.exe, self.details.comm)
        return self.view

    def set_details(self, details: Details) -> None:
        """
        Take new knowledge of this very process.
        """
        self.details = details
        self.argv = details.argv
        self.argv_truncated = details.argv_truncated
        self.argv_missing = None
        self.ns_pid = details.ns_pid
        self.inherited = False
        self.view = self.who = None

    def introduce(self, ancestors: int) -> Who:
        """
        What events say of who this is, until the next exec.

        Args:
            ancestors: How many of them to name.
        """
        parent = self.parent
        self.who = Who(
            self.id,
            self.pid,
            self.ppid,
            self.argv,
            self.argv_truncated,
            parent.as_parent() if parent is not None else None,
            self.ns_pid,
            [ancestor.as_parent() for ancestor in islice(self.ancestors(), ancestors)] if ancestors else None,
        )
        return self.who


def make(pid: int, start_ticks: int, process_id: str, parent: Process | None, details: Details) -> Process:
    """
    A process that was born, or found; what it has of its parent is in `details` already.
    """
    if parent is None:
        return Process(
            pid, start_ticks, process_id, None, details,
            details.ppid, details.argv, details.argv_truncated, details.ns_pid,
        )  # fmt: skip
    depth = parent.depth + 1
    process = Process(
        pid, start_ticks, process_id, parent, details, parent.pid, parent.argv, parent.argv_truncated, None, depth
    )
    if depth >= MAX_DEPTH:
        process.cut()
    return process


def inherit(known: Details, new: Details, fields: tuple[str, ...], inferred: bool) -> Details:
    """
    `new`, with each of `fields` that it lacks taken from what was known before, and marked.

    Args:
        known: Before the fork or the exec.
        new: What was read after it; may be changed in place.
        fields: Names that the system call leaves as they were.
        inferred: Mark what is taken over as deduced, not read.
    """
    taken: list[str] | None = None
    missing = new.missing
    for name in fields:
        if getattr(new, name) is None:
            value = getattr(known, name)
            if value is not None:
                setattr(new, name, value)
                if name in missing:
                    missing = {key: why for key, why in missing.items() if key != name}
                if inferred:
                    taken = taken or list(new.inferred)
                    taken.append(name)
            elif name not in missing and name in known.missing:
                missing = {**missing, name: known.missing[name]}
    new.missing = missing
    if taken is not None:
        new.inferred = tuple(taken)
    return new


def as_inferred(process: Process, fields: tuple[str, ...]) -> list[str]:
    """
    The names of `fields` that are set: for a child that has them of its parent.
    """
    details = process.details
    return [name for name in fields if (process.argv if name == "argv" else getattr(details, name)) is not None]


def changed(details: Details, **fields: object) -> Details:
    """
    A copy with some fields replaced: details are shared between parent and child, so they are never changed in place.
    """
    return replace(details, unread=None, line=None, **fields)
