"""
One turn of the machine: read the sources, look at /proc, join, give out events. No event loop, no waiting.

    facts of the lead source  ─┐
    details from /proc         ├─> table ─> events
    facts of the other sources ─┘

The order within a turn matters. The lead (netlink) is drained first and /proc read at once, while the processes are
there; then the others, so that each exec and exit of the batch finds their facts: the kernel queues the opens of an
exec, and the account of an exit, before it tells netlink.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Protocol, TypeVar, runtime_checkable

from msgspec import Struct

from procwatch import __version__
from procwatch.brief import Brief
from procwatch.enrich.hashes import REFUSED
from procwatch.enrich.inspector import Inspector
from procwatch.errors import ConfigError, DecodeError, SourceLost, SourceUnavailable
from procwatch.events import (
    DEFAULT_KINDS,
    Container,
    ContainerEvent,
    Event,
    Exit,
    Lost,
    ProcessEvent,
    Ready,
    Skipped,
    Stop,
)
from procwatch.express import Express, Records, Written
from procwatch.facts import PRESSURE, REPLACED, Alive, Details, Exec, Fact, Thread
from procwatch.facts import Lost as Dropped
from procwatch.formats.native import Lines
from procwatch.policy.filter import Predicate
from procwatch.sources import procfs
from procwatch.sources.base import Source, SourceStats
from procwatch.table.draft import Draft, Maker
from procwatch.table.process import Process
from procwatch.table.table import HOLD_NS, Table

_UNLIMITED = (Ready, Lost, Stop)
_REPLACED = {"exe": REPLACED, "exe_deleted": REPLACED, "argv": REPLACED, "comm": REPLACED, "file": REPLACED}
# Drains of the lead within one turn. Each drain catches what happened while /proc was read.
ROUNDS = 8
# A look through all of /proc after a loss costs 50 µs a process: at most once in this time.
RESYNC_EVERY_NS = 1_000_000_000
# A source whose descriptor was closed by somebody else is never heard of again: at most so long.
LOOK_EVERY_NS = 60_000_000_000
# A source that fails again within this time of its reopening is lost.
FAILS_EVERY_NS = 1_000_000_000
NEVER_NS = 1 << 63
BY_TIME = attrgetter("time_ns")
# Events that wait for the names of a container; beyond it the first goes without.
MAX_HELD = 65_536
# So long they wait to know if their cgroup is a container's at all, where its path does not say it: plain runc's.
# It takes some milliseconds, once for each such cgroup, more on a busy host.
CLEAR_WAIT_NS = 100_000_000

T = TypeVar("T")
log = logging.getLogger(__name__)


@runtime_checkable
class Finishing(Protocol):
    """
    A source that has something to tell only at the end.
    """

    def finish(self) -> list[Fact]:
        """
        The last facts, before it is closed.
        """


@runtime_checkable
class Counting(Protocol):
    """
    A source that compares itself with the kernel's own counts.
    """

    def coverage(self) -> dict[str, float]:
        """
        By kind, the share of what the kernel counted that was told: 0 to 1.
        """


@runtime_checkable
class Wandering(Protocol):
    """
    A source that must be told of mount namespaces, to listen there, too.
    """

    def seen(self, pid: int, namespace: int) -> None:
        """
        A process was seen in a mount namespace, an inode number.
        """


@runtime_checkable
class Holding(Protocol):
    """
    A source that is woken by another descriptor than those that it reads.
    """

    def descriptors(self) -> list[int]:
        """
        All that it could not do without.
        """


class Stats(Struct, frozen=True):
    """
    What `stats()` tells, since the start.
    """

    events: dict[str, int]
    lost: int
    processes: int
    sources: dict[str, SourceStats]
    proc_reads: int  # looks at /proc/PID after an exec
    proc_hits: int  # of these, the process was still there
    disagreements: int  # execs of which /proc and fanotify named different files
    coverage: dict[str, float] = {}  # by kind, the share of what the kernel counted that was seen: 0 to 1


class Pipeline:
    """
    Sources, table and names of one watcher, driven by `turn()`.

    Args:
        backend: The rung that was chosen.
        sources: Opened sources, the lead first.
        skipped: What does not run, and why.
        maker: Has the clock, the name of the host, and those of users and containers.
        started_ns: When the sources were opened; None: now.
        kinds: The kinds of events wanted.
        hold_ns: See Table.
        ancestors: See Table.
        limit: Show so many events of processes, then set `finished`.
        strict: Set `finished` after the first `lost`.
        keep: Which events of processes to show; None: all.
        under: Show only the process with this pid and its descendants.
        name_wait_ns: How long events may wait for the names of their container.
        hash_wait_ns: How long events may wait for the hash of their executable.
        inspector: Looks at executables.
        look: Reads one process from /proc.
        listen: Called with a source that failed and False, before it is opened anew; and with True after that.
    """

    def __init__(
        self,
        backend: str,
        sources: list[Source],
        skipped: list[Skipped],
        *,
        maker: Maker,
        started_ns: int | None = None,
        kinds: Collection[str] = DEFAULT_KINDS,
        hold_ns: int = HOLD_NS,
        ancestors: int = 0,
        limit: int | None = None,
        strict: bool = False,
        keep: Predicate | None = None,
        under: int | None = None,
        name_wait_ns: int = 0,
        hash_wait_ns: int = 0,
        inspector: Inspector | None = None,
        look: Callable[[int], Details] = procfs.read,
        listen: Callable[[Source, bool], None] = lambda source, on: None,
    ) -> None:
        self.sources = sources
        self.clock = maker.clock
        self.started_ns = started_ns or self.clock.now_ns()
        self._cpu_ns = time.process_time_ns()
        self._host = maker.host
        boot = procfs.boot_id()
        reads_proc = any(source.name == "netlink" for source in sources)
        self._look = look if reads_proc else None
        self.table = Table(
            boot=boot.replace("-", "")[:8],
            maker=maker,
            kinds=kinds,
            hold_ns=hold_ns,
            look=look if reads_proc else None,
            ancestors=ancestors,
        )
        self.ready = Ready(
            time=self.clock.stamp(self.started_ns),
            host=self._host,
            boot_id=boot,
            version=__version__,
            backend=backend,
            sources=[source.name for source in sources],
            skipped=skipped,
            kernel=os.uname().release,
        )
        self.maker = maker
        self._keep = keep
        self._under_pid = under
        self._under: str | None = None
        self._name_wait_ns = name_wait_ns
        self._hash_wait_ns = hash_wait_ns
        self._inspector = inspector
        self._held: deque[tuple[int, Event | Draft]] = deque()
        self._kinds = frozenset(kinds)
        self._ancestors = ancestors
        self._hold_ns = hold_ns
        self._express: Express | None = None
        self._brief: Brief | None = None
        self.finished = False
        self._limit = limit
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._lost = 0
        self._proc_reads = self._proc_hits = 0
        self._wanderers = [source for source in sources if isinstance(source, Wandering)]
        self._resync_ns = NEVER_NS
        self._resynced_ns = 0
        self._resyncs = bool(sources) and sources[0].name != "scan"  # which looks through /proc all the time
        self._read_until_ns = NEVER_NS
        self._listen = listen
        self._turned_ns = self.started_ns
        self._reopened_ns: dict[str, int] = {}
        self._files = {source.name: _files(source) for source in sources}
        self._look_ns = self.started_ns + LOOK_EVERY_NS if any(self._files.values()) else NEVER_NS

    def start(
        self, *, initial: bool = False, before: Collection[Process] = (), alive: Collection[Alive] | None = None
    ) -> list[Event | Draft]:
        """
        `ready`, then what is alive if `initial`; the sources are open already, so nothing falls between.

        Args:
            initial: Tell of all that is alive.
            before: Who was known in an earlier run of the same boot.
            alive: Who is alive, looked for after the sources were opened; None: look now.
        """
        self.table.emit(self.ready)
        self.table.snapshot(procfs.snapshot() if alive is None else alive, self.started_ns, tell=initial, before=before)
        if self._under_pid is not None:
            root = self.table.processes.get(self._under_pid)
            if root is None:
                raise ConfigError(f"no process {self._under_pid} to watch under")
            self._under = root.id
        now = self.clock.now_ns()
        return self._show(self.table.flush_drafts(now), now)

    def express(self, lines: Lines | None) -> None:
        """
        From now on write lines at once where that is possible, or no more: see Express and Brief.
        """
        odd = (self._keep, self._under, self._limit)
        ebpf = self.sources[0] if len(self.sources) == 1 else None
        possible = (
            "exec" in self._kinds
            and not (self._ancestors or self._name_wait_ns or self._hash_wait_ns)
            and all(wish is None for wish in odd)
        )
        self._general()
        if not possible or lines is None:
            return
        names = [source.name for source in self.sources]
        if names in (["netlink"], ["netlink", "fanotify", "taskstats"]):
            tells_exit, accounts = "exit" in self._kinds, len(names) > 1
            self._brief = Brief(self.table, self.maker, lines, accounts=accounts, tells_exit=tells_exit)
        tells_fork = "fork" in self._kinds
        if isinstance(ebpf, Records) and (self._hold_ns >= HOLD_NS or not tells_fork):
            self._express = Express(
                ebpf, self.table, self.maker, lines, tells_exit="exit" in self._kinds, tells_fork=tells_fork
            )

    def _general(self) -> None:
        if self._express is not None:
            self._express.finish()
        self._express = self._brief = None

    def turn(self) -> list[Event | Draft]:
        """
        Take what the kernel has now, and give the events that are decided.
        """
        written: list[Event | Draft] = []
        if self.clock.now_ns() >= self._look_ns:
            self._look_at_files()
        if self._express is None:
            facts = self._take()
            self._read_until_ns = facts[-1].time_ns if facts else NEVER_NS
        else:
            written = self._ask(self.sources[0], self._express.take)
            self._read_until_ns = NEVER_NS if self._express.until_ns is None else self._express.until_ns
        now = self._turned_ns = self.clock.now_ns()
        if self.table.lost != self._lost:
            self._lost = self.table.lost
            if self._resyncs:
                self._resync_ns = min(self._resync_ns, max(now, self._resynced_ns + RESYNC_EVERY_NS))
        if now >= self._resync_ns:
            self._resync_ns, self._resynced_ns = NEVER_NS, now
            if self._express is not None:
                self._express.finish()
            self._put_right(now)
        drafts = self.table.flush_drafts(now)
        return self._show(written + drafts if written else drafts, now)

    @property
    def found(self) -> bool:
        """
        Whether the lead had something in the last turn.
        """
        return self._read_until_ns != NEVER_NS

    def _take(self) -> list[Fact]:
        """
        What all sources have, into the table; gives the lead's.
        """
        facts = self._read_lead()
        others = [self._ask(source, source.read) for source in self.sources[1:]]
        left = facts if self._brief is None else self._brief.take(facts, others)
        for other in others:
            self.table.apply(other)
        self.table.apply(left)
        return facts

    # Sources that fail

    def _ask(self, source: Source, read: Callable[[], list[T]]) -> list[T]:
        """
        What `read` of a source gives; when it fails, the source is opened anew.
        """
        try:
            return read()
        except OSError as error:
            self._reopen(source, error)
            return []

    def _look_at_files(self) -> None:
        """
        Whether the descriptors of the sources are still theirs: a program that closes one twice may have hit them.
        """
        self._look_ns = self.clock.now_ns() + LOOK_EVERY_NS
        for source in self.sources:
            if _files(source) != self._files[source.name]:
                self._reopen(source, OSError(errno.EBADF, "its descriptor is another file"))

    def _reopen(self, source: Source, error: OSError) -> None:
        """
        Go on with a source that has failed, with the gap marked.

        Raises:
            SourceLost: It cannot be opened, or failed a moment ago.
        """
        failed = f"{source.name} failed ({error.strerror or error})"
        now = self.clock.now_ns()
        if now - self._reopened_ns.get(source.name, 0) < FAILS_EVERY_NS:
            raise SourceLost(f"{failed} again and again: restart; if that does not help please report it") from error
        self._listen(source, False)
        before = self._files[source.name]
        theirs = [fd for fd, file in _files(source).items() if file not in (None, before.get(fd))]
        with suppress(OSError), _kept(theirs):  # others may be closed already
            source.close()
        try:
            source.open()
        except SourceUnavailable as unavailable:
            raise SourceLost(f"{failed} and cannot be opened again: {unavailable}") from error
        log.warning("%s and was opened again", failed)
        self._listen(source, True)
        self._files[source.name] = _files(source)
        until = self._reopened_ns[source.name] = self.clock.now_ns()
        self.table.apply([Dropped(until, 0, source.name, 1, False, self._turned_ns, until)])
        if source is self.sources[0]:
            self._resync_ns = until

    # The table

    def _put_right(self, now_ns: int) -> None:
        """
        Look through /proc after a loss, and correct the table.

        What ended while we looked is told by facts that are queued by now: they are taken first, so that nothing counts
        as vanished whose end was seen.
        """
        try:
            alive = procfs.snapshot()
        except SourceUnavailable:
            self._resync_ns = now_ns + RESYNC_EVERY_NS
            return
        self._take()
        known = self.table.processes
        self.table.resync([fact for fact in alive if fact.pid in known or procfs.stat(fact.pid) is not None], now_ns)

    def deadline_ns(self) -> int | None:
        """
        When `turn()` has something to do though no source has anything, CLOCK_BOOTTIME, or None.
        """
        when = min(self._resync_ns, self._look_ns, self.table.deadline_ns() or NEVER_NS)
        if self._held:
            when = min(when, self._held[0][0] + max(self._name_wait_ns, self._hash_wait_ns, CLEAR_WAIT_NS))
        return when if when != NEVER_NS else None

    def is_ending(self, identity: str) -> bool:
        """
        Whether the exit of a process is decided, and held back.
        """
        held = (draft for _, draft in self._held if isinstance(draft, Draft))
        ending = any(draft.kind is Exit and draft.who.id == identity for draft in held)
        return ending or self.table.is_ending(identity)

    def stop(self) -> list[Event | Draft]:
        """
        What the kernel still holds, what was undecided, and `stop`.
        """
        for source in self.sources:
            if isinstance(source, Finishing):
                self.table.apply(self._ask(source, source.finish))
        until = self.clock.now_ns()
        last = self.turn()
        while self._read_until_ns <= until and not self.finished:
            last += self.turn()
        if self._express is not None:
            self._express.finish()
        last += self._show(self.table.drain_drafts(), NEVER_NS)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        now = self.clock.now_ns()
        last.append(
            Stop(
                time=self.clock.stamp(now),
                host=self._host,
                counts={kind: n for kind, n in self._counts.items() if n and kind != "ready"},
                lost=self._lost,
                duration_ns=now - self.started_ns,
                cpu_ns=time.process_time_ns() - self._cpu_ns,
                max_rss_bytes=usage.ru_maxrss * 1024,
                coverage=self._coverage() or None,
            )
        )
        return last

    def choose(self, keep: Predicate | None, name_wait_ns: int) -> None:
        """
        From now on show what `keep` keeps, and wait so long for names.
        """
        self._keep, self._name_wait_ns = keep, name_wait_ns
        self._general()

    def announce(self, containers: list[tuple[Container, str]]) -> list[Event | Draft]:
        """
        `container` events for containers whose names have become known, each with its cgroup.
        """
        now = self.clock.now_ns()
        if "container" in self._kinds:
            for container, cgroup in containers:
                stamp = self.clock.stamp(now)
                self.table.emit(ContainerEvent(time=stamp, host=self._host, container=container, cgroup=cgroup))
        return self._show(self.table.flush_drafts(now), now)

    def stats(self) -> Stats:
        """
        Counters so far.
        """
        return Stats(
            events={kind: n for kind, n in self._counts.items() if n},
            lost=self._lost,
            processes=len(self.table.processes),
            sources={source.name: source.stats() for source in self.sources},
            proc_reads=self._proc_reads,
            proc_hits=self._proc_hits,
            disagreements=self.table.joins.disagreements,
            coverage=self._coverage(),
        )

    def _coverage(self) -> dict[str, float]:
        lead = self.sources[0] if self.sources else None
        try:
            return lead.coverage() if isinstance(lead, Counting) else {}
        except DecodeError:  # no descriptor left to ask the kernel
            return {}

    def _read_lead(self) -> list[Fact]:
        lead = self.sources[0]
        facts = self._ask(lead, lead.read)
        if self._look is not None:
            latest: dict[int, Exec] = {}
            fresh = facts
            for _ in range(ROUNDS):
                if not self._complete(fresh, latest, self._look):
                    break
                fresh = self._ask(lead, lead.read)  # what happened meanwhile: it may prove a reading wrong
                if fresh:
                    facts += fresh
                    facts.sort(key=BY_TIME)
        return facts

    def _complete(self, fresh: list[Fact], latest: dict[int, Exec], look: Callable[[int], Details]) -> bool:
        """
        Read /proc for the execs that netlink told of, where it can still tell.

        An exec that was followed by another one, or by the end, is not looked at: what /proc shows is not its. One that
        was read while a later exec had already happened loses what was read.

        Args:
            fresh: The facts to complete.
            latest: The last exec of each pid in this turn.
            look: Reads a process.

        Returns:
            Whether anything was read, so that time has passed.
        """
        alive: dict[int, Exec] = {}
        for fact in fresh:
            if type(fact) is Exec:
                before = latest.get(fact.pid)
                if before is not None and (before.details is None or fact.time_ns <= before.read_ns):
                    before.details = Details(missing=_REPLACED)
                latest[fact.pid] = alive[fact.pid] = fact
            elif type(fact) is Thread and fact.tid == fact.pid and not fact.born:
                latest.pop(fact.pid, None)
                alive.pop(fact.pid, None)
        # The last born first: when we are late, they are those that may still live.
        for pid, fact in reversed(alive.items()):
            fact.details = look(pid)
            fact.read_ns = self.clock.now_ns()
            if self._wanderers and (namespace := procfs.mount_namespace(pid)):
                for source in self._wanderers:
                    source.seen(pid, namespace)
            self._proc_hits += fact.details.exe is not None
        self._proc_reads += len(alive)
        return bool(alive)

    # What is shown

    def _show(self, drafts: list[Event | Draft], now_ns: int) -> list[Event | Draft]:
        """
        Those that may go now, that are wanted, counted.
        """
        if not (self._held or any(type(draft) is not Written for draft in drafts)):
            return self._count(drafts)
        if self._inspector is not None:
            for draft in drafts:
                if isinstance(draft, Draft) and not draft.details.inspected:
                    self._inspector.inspect(draft.who.pid, draft.details)
                    if draft.details.hash is REFUSED:
                        draft.missing = {**draft.missing, "hash": PRESSURE}
        if self._name_wait_ns or self._hash_wait_ns or self._held or self._any_unclear(drafts):
            drafts = self._release(drafts, now_ns)
        if self._keep is not None or self._under is not None:
            drafts = [shown for draft in drafts if (shown := self._wanted(draft)) is not None]
        return self._count(drafts)

    def _any_unclear(self, drafts: list[Event | Draft]) -> bool:
        unclear = self.maker.names.unclear
        return any(unclear(draft.details.cgroup) for draft in drafts if type(draft) is Draft)

    def _release(self, drafts: list[Event | Draft], now_ns: int) -> list[Event | Draft]:
        """
        Hold back, in order, what is still being looked up: the names of a container, a hash. At the end nothing is.
        """
        held = self._held
        for draft in drafts:
            held.append((now_ns, draft))
            if isinstance(draft, Draft):  # all lookups begin now, not when their turn comes
                self.maker.names.place(draft.details.cgroup)
        ready = []
        most = MAX_HELD if now_ns != NEVER_NS else 0
        while held:
            since_ns, draft = held[0]
            if len(held) < most and isinstance(draft, Draft) and self._incomplete(draft, now_ns - since_ns):
                break
            ready.append(draft)
            held.popleft()
        return ready

    def _incomplete(self, draft: Draft, waited_ns: int) -> bool:
        details, names = draft.details, self.maker.names
        if waited_ns < self._name_wait_ns and names.pending(details.cgroup):
            return True
        if waited_ns < CLEAR_WAIT_NS and names.unclear(details.cgroup):
            return True
        return waited_ns < self._hash_wait_ns and self._inspector is not None and self._inspector.pending(details)

    def _wanted(self, draft: Event | Draft) -> Event | Draft | None:
        if not isinstance(draft, Draft):
            return draft
        if self._under is not None and not _descends(draft, self._under):
            return None
        if self._keep is None:
            return draft
        event = self.maker.event(draft)
        assert isinstance(event, ProcessEvent)
        return event if self._keep(event) else None

    def _count(self, events: list[Event | Draft]) -> list[Event | Draft]:
        """
        Count what is shown, and stop showing at the limit.
        """
        counts = self._counts
        for at, event in enumerate(events):
            if self.finished:
                return events[:at]
            if type(event) is Written:
                counts["exec"] += event.execs
                counts["exit"] += event.exits
                continue
            counts[event.event] += 1
            if self._limit is not None and type(event) not in _UNLIMITED:
                self._limit -= 1
                self.finished = self._limit <= 0
        if self._strict and counts["lost"]:
            self.finished = True
        return events


def _descends(draft: Draft, root: str) -> bool:
    """
    Whether a draft is of the process with the id `root`, or of one of its descendants.
    """
    process = draft.process
    return process is not None and (process.id == root or any(ancestor.id == root for ancestor in process.ancestors()))


def _files(source: Source) -> dict[int, tuple[int, int, int] | None]:
    """
    Which files the descriptors of a source are; None: one that is closed.
    """
    fd = source.fileno()
    found: dict[int, tuple[int, int, int] | None] = {}
    for one in source.descriptors() if isinstance(source, Holding) else [] if fd is None else [fd]:
        try:
            state = os.fstat(one)
        except OSError:
            found[one] = None
        else:
            found[one] = (state.st_dev, state.st_ino, state.st_mode)
    return found


@contextmanager
def _kept(fds: list[int]) -> Iterator[None]:
    """
    Descriptors are afterwards what they were before, whoever closes them meanwhile.
    """
    spares = [(fd, os.dup(fd), os.get_inheritable(fd)) for fd in fds]
    with open(os.devnull, "wb") as nothing:  # a last word to the kernel goes to nobody else
        for fd in fds:
            os.dup2(nothing.fileno(), fd, inheritable=False)
    try:
        yield
    finally:
        for fd, spare, inheritable in spares:
            os.dup2(spare, fd, inheritable)
            os.close(spare)
