"""
One live process, as the table knows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from procwatch.events import Parent
from procwatch.facts import Details, Opened

# A child has these of its parent until it says otherwise: fork(2) copies them.
AT_FORK = (
    "exe", "file", "script", "argv", "comm", "cwd", "uid", "gid", "euid", "egid", "tty", "session", "cgroup",
)  # fmt: skip
# execve(2) leaves these as they were; what it replaces (exe, argv, comm, file) cannot be deduced.
AT_EXEC = ("cwd", "uid", "gid", "euid", "egid", "tty", "session", "cgroup")

# A chain of ended ancestors is cut beyond this many generations: a process that re-spawns itself for ever
# would otherwise keep all its past alive.
MAX_DEPTH = 128


class Process:
    """
    A mutable record; the table alone writes it.

    `details` is shared with the parent until the child executes a program of its own. An ended process lives on as long
    as a child's `parent` refers to it.
    """

    __slots__ = (
        "born_ns",
        "depth",
        "details",
        "ended",
        "forked_ns",
        "held",
        "id",
        "inherited",
        "leader_alive",
        "leader_status",
        "opens",
        "others",
        "parent",
        "pid",
        "ppid",
        "seen_ns",
        "start_inferred",
        "start_ticks",
        "tids",
        "view",
    )

    def __init__(self, pid: int, start_ticks: int, process_id: str, parent: Process | None, details: Details) -> None:
        self.pid = pid
        self.start_ticks = start_ticks
        self.id = process_id
        self.parent = parent
        self.ppid: int | None = parent.pid if parent is not None else details.ppid
        self.details = details
        self.inherited = False  # `details` are the parent's
        self.start_inferred = False  # derived from the stamp of the fork
        self.born_ns = 0  # 0: only known to the tick
        self.forked_ns = 0  # a fork that no event has told yet
        self.seen_ns = 0  # when /proc was looked at; threads born before are counted in `others`
        self.held: object | None = None
        self.ended = False
        # Threads, where the source tells of each (netlink): the process ends with the last of them.
        self.tids: set[int] | None = None
        self.others = 0  # threads that were there already, whose numbers we do not know
        self.leader_alive = True
        self.leader_status = 0
        self.opens: list[Opened] | None = None
        self.view: Parent | None = None
        self.depth = 0
        if parent is not None:
            self.depth = parent.depth + 1
            if self.depth >= MAX_DEPTH:
                self._cut()

    def _cut(self) -> None:
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
        self.inherited = False
        self.view = None


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


def as_inferred(details: Details, fields: tuple[str, ...]) -> list[str]:
    """
    The names of `fields` that are set: for a child that has them of its parent.
    """
    return [name for name in fields if getattr(details, name) is not None]


def changed(details: Details, **fields: object) -> Details:
    """
    A copy with some fields replaced: details are shared between parent and child, so they are never changed in place.
    """
    return replace(details, unread=None, **fields)
