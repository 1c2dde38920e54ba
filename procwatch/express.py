"""
The short way from the kernel's records to lines, for what nearly all execs and exits are.

    records ─┬─ plain ───────────────────────────────────────> lines
             └─ anything else ─> facts ─> table ─> drafts ─> (formats)

When all that anybody wants is native JSON, a whole exec and its exit need no fact, no draft, no look at what may be
joined and no queue: the line is written from the record. Half of what an event costs is calling functions and making
objects, and this does without both; it is the only reason for this module to be.

What is plain: an exec that the kernel told whole, of a process that was not known or has just been forked, with a
parent that is; an exit with a code, of a process whose exec was written. Whatever is out of the ordinary goes the
general way, record by record and in its place. Both ways leave the same table and give the same lines, to the byte
(tests/test_express.py).

Where forks are wanted, one waits here for its exec up to the next drain, and the lines behind it with it. If there is
none by then, or anything odd comes meanwhile, the fork and they go to the table, which holds them as it holds all; and
as long as it holds any, all goes the general way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import ClassVar, Literal, Protocol, runtime_checkable

from msgspec import Struct
from msgspec.json import Encoder

from procwatch.errors import DecodeError
from procwatch.events import Event, Exec, Exit, Parent
from procwatch.facts import Decided, Details, Fact, Fork, Lost
from procwatch.formats.native import CLEAR, Lines
from procwatch.table.draft import Draft, Maker, Who
from procwatch.table.identity import NS_PER_TICK
from procwatch.table.process import MAX_DEPTH, Process
from procwatch.table.table import KTHREADD, Table
from procwatch.wire.bpf_event import (
    BUSY,
    EXEC,
    EXEC_RECORD,
    EXEC_SIZE,
    EXIT,
    EXIT_BRIEF,
    EXIT_SIZE,
    FIRST,
    FORK,
    FORK_SIZE,
    HEAD_RECORD,
    NO_MM,
    PAGESIZE,
    RING_HEADER,
    Bytes,
    Decoder,
    arguments,
    cpu_times,
)

_EXEC, _FORKED = CLEAR + b"}\n", CLEAR + b',"forked":true}\n'
# Bytes are formatted with %: it is three times as quick as an f-string and encode() where there are numbers.
_EXIT = CLEAR + (
    b',"code":%d,"signal":null,"core_dumped":false,"duration_ns":%d,"cpu_user_ns":%d,"cpu_system_ns":%d'
    b',"max_rss_bytes":%d}\n'
)
_EXIT_NO_RSS = _EXIT.replace(b"{}", b'{"max_rss_bytes":"not_reported"}').replace(b'bytes":%d', b'bytes":null')
_EXIT_0 = _EXIT.replace(b'"code":%d', b'"code":0').replace(b'system_ns":%d', b'system_ns":0')
_EXIT_0_NO_RSS = _EXIT_NO_RSS.replace(b'"code":%d', b'"code":0').replace(b'system_ns":%d', b'system_ns":0')
_FORK_STEP = RING_HEADER + (FORK_SIZE + 7 & ~7)
_EXIT_STEP = RING_HEADER + (EXIT_SIZE + 7 & ~7)
PIECES = 6  # of a line
_NO_LINE = (b"",) * PIECES
_MAX_COMMONS = 256
_BY_TIME = attrgetter("time_ns")
_SECOND_NS = 1_000_000_000
_NEVER_NS = -1 << 62

_encode = Encoder().encode


class Written(Event, frozen=True, kw_only=True, tag="written"):
    """
    Several events, as the lines that they are written as: only for sinks that asked for it, which see no `time`.
    """

    event: ClassVar[Literal["written"]] = "written"

    time: str = ""
    host: str = ""
    since_ns: int  # CLOCK_BOOTTIME; no event is before
    until_ns: int  # no event is after
    data: bytes
    execs: int
    exits: int

    @property
    def count(self) -> int:
        """
        How many events.
        """
        return self.execs + self.exits


@runtime_checkable
class Records(Protocol):
    """
    What is asked of the eBPF source.
    """

    decoder: Decoder

    def drain(self, walk: Callable[[Bytes, int, int, int], int]) -> Lost | None:
        """
        Give all records to `walk`; what was lost.
        """

    def read(self) -> list[Fact]:
        """
        The same as facts.
        """

    def took(self, facts: int) -> None:
        """
        Count them.
        """


class Common(Struct, gc=False):
    """
    What a process has in common with the one before: most come in rows.
    """

    ppid: int
    parent: Process
    view: Parent
    depth: int
    details: Details
    # As they stand in a line.
    own: bytes  # what is before argv, but for three numbers: pid, start in ticks, pid
    parent_text: bytes  # what is between argv and ns_pid
    where: bytes  # what is behind that
    after: bytes  # both

    def holds(self, parent: Process | None, generation: int) -> bool:
        """
        Whether it is still so, with who has the parent's pid now.
        """
        details = self.details
        return (
            parent is self.parent
            and parent.view is self.view
            and parent.depth < self.depth
            and details.named == generation
            and details.line is self.where
        )

    def with_ns_pid(self, ns_pid: int) -> bytes:
        """
        What is behind argv, for a process with another pid in its own namespace.
        """
        return b'%b,"ns_pid":%d%b' % (self.parent_text, ns_pid, self.where)


# A process that was born, or at least executed something, in this very drain: its start and its birth (ns; the fork
# comes a little later), the three pieces of its lines that say who and what it is, what of it is common, its arguments,
# and its pid in its own namespace. Most end before they must be made a process of the table.
Life = tuple[int, int, bytes, bytes, bytes, Common, bytes, int]


class Express:
    """
    Takes the eBPF source's records into a table, as its facts and Table.apply() do, and writes lines of what is plain.

    Args:
        source: Whose records.
        table: The table that they are for. It must be asked for execs, and not for `ancestors`.
        maker: Whose names and host the lines show.
        lines: Writes the other drafts, too.
        tells_exit: Whether exits are wanted.
        tells_fork: Whether forks are wanted, and every one is among the records.
    """

    def __init__(
        self,
        source: Records,
        table: Table,
        maker: Maker,
        lines: Lines,
        *,
        tells_exit: bool,
        tells_fork: bool = False,
    ) -> None:
        self._source = source
        self._table = table
        self._maker = maker
        self._lines = lines
        self._tells_exit = tells_exit
        self._tells_fork = tells_fork
        self._prefix = (lines.host + b'"id":"' + table.boot.encode() + b"-").replace(b"%", b"%%")
        self._fresh: dict[int, Life] = {}
        self._forks: dict[int, Fork] = {}  # that wait for their exec, by pid
        self._interrupted = False  # something odd came while forks were waiting
        # What is not given out yet, fact by fact: when, the pieces of its line, or what became of it if not plain.
        self._times: list[int] = []
        self._pieces: list[bytes] = []
        self._odd: dict[int, list[Event | Draft]] = {}
        self._exits = 0  # of the lines among them
        self._late = False  # each CPU writes for itself, so some records of different processes overtake others
        self._records = 0
        self._commons: dict[tuple[int, bytes], Common] = {}  # by ppid and the kernel's words
        # The second that the last line was in, and what an exec's and an exit's begin with in it.
        self._second_ns = _NEVER_NS
        self._heads = b"", b""
        self.until_ns: int | None = None  # of the last fact; None: there was none

    def take(self) -> list[Event | Draft]:
        """
        What is decided, in the order of the kernel's time.
        """
        out = self._table.flush_drafts(0)
        self.until_ns = None
        if self._table.holds:
            return out + self._by_table()
        waiting = set(self._forks) if self._forks else ()
        self._records = 0
        lost = self._source.drain(self._walk)
        if self._records or self._interrupted or self._forks:
            self._source.took(self._records)
            if not self._forks:
                self._tell_all(out)
            elif self._interrupted or any(pid in self._forks for pid in waiting):
                self.finish()
                out += self._table.flush_drafts(0)
            else:
                self._tell(self._before(self._forks), out)
        if self._interrupted:
            self._interrupted = False
            out += self._by_table()
        if lost is not None:
            self.until_ns = lost.time_ns
            self._table.apply((lost,))
            out += self._table.flush_drafts(0)
        return out

    def finish(self) -> None:
        """
        Leave all that waits here to the table.
        """
        forks = sorted(self._forks.values(), key=_BY_TIME)
        for fork in (*forks, None):
            told: list[Event | Draft] = []
            self._tell(self._before([fork.pid] if fork is not None else ()), told)
            self._table.apply([Decided(0, 0, item) for item in told])
            if fork is not None:
                self._table.apply((fork,))
                del self._forks[fork.pid]

    def _by_table(self) -> list[Event | Draft]:
        facts = self._source.read()
        if facts:
            self.until_ns = facts[-1].time_ns
        self._table.apply(facts)
        return self._table.flush_drafts(0)

    def _before(self, pids: Collection[int]) -> Sequence[int]:
        """
        The places of what is older than the forks of these processes, in order.
        """
        times = self._times
        order: Sequence[int] = range(len(times))
        if self._late:
            order = sorted(order, key=times.__getitem__)
        if not pids:
            return order
        first_ns = min(self._forks[pid].time_ns for pid in pids)
        return [at for at in order if times[at] < first_ns]

    def _tell_all(self, out: list[Event | Draft]) -> None:
        """
        Give out all, in the short way if it is in order.
        """
        times = self._times
        if self._odd or self._late or not times:
            self._tell(self._before(()), out)
            return
        data, exits = b"".join(self._pieces), self._exits
        execs = len(times) - exits
        out.append(Written(since_ns=times[0], until_ns=times[-1], data=data, execs=execs, exits=exits))
        self._times, self._pieces, self._exits = [], [], 0

    def _tell(self, order: Sequence[int], out: list[Event | Draft]) -> None:
        """
        Give out what is at these places, and forget it.
        """
        if not order:
            return
        odd = self._odd
        if odd:
            run: list[int] = []
            for at in order:
                if at not in odd:
                    run.append(at)
                    continue
                if run:
                    out.append(self._written(run))
                    run = []
                out += odd[at]
            if run:
                out.append(self._written(run))
        else:
            out.append(self._written(order))
        left: list[int] = []
        if len(order) < len(self._times):
            told = set(order)
            left = [at for at in range(len(self._times)) if at not in told]
        self._pieces = [piece for at in left for piece in self._pieces[PIECES * at : PIECES * at + PIECES]]
        self._odd = {new: odd[at] for new, at in enumerate(left) if at in odd}
        self._times = [self._times[at] for at in left]
        self._late = self._late and bool(left)

    def _written(self, run: Sequence[int]) -> Written:
        """
        The lines of these facts, as one.
        """
        pieces = [piece for at in run for piece in self._pieces[PIECES * at : PIECES * at + PIECES]]
        exits = sum(head.startswith(b'{"event":"exit"') for head in pieces[::PIECES])
        self._exits -= exits
        since_ns, until_ns = self._times[run[0]], self._times[run[-1]]
        return Written(since_ns=since_ns, until_ns=until_ns, data=b"".join(pieces), execs=len(run) - exits, exits=exits)

    def _walk(self, data: Bytes, at: int, end: int, most: int) -> int:
        """
        As Decoder.decode(): in one function, for a call costs a tenth of what a record does, and each step a hundredth.
        """
        if self._interrupted:
            return at
        decoder, table, lines, tells_exit = self._source.decoder, self._table, self._lines, self._tells_exit
        unpack_exec, unpack_exit, peaks = EXEC_RECORD.unpack_from, EXIT_BRIEF.unpack_from, decoder.peaks
        unpack_head, tells_fork = HEAD_RECORD.unpack_from, self._tells_fork
        processes, fresh, forks, commons = table.processes, self._fresh, self._forks, self._commons
        times, pieces = self._times, self._pieces
        generation, second_ns, (exec_head, exit_head) = self._maker.names.generation, self._second_ns, self._heads
        head = last = key_before = argv = after_argv = text = b""
        common: Common | None = None
        raw_before: bytes | None = None
        ppid_before, known, exits = -1, len(times), 0
        before = times[-1] if known else 0

        try:
            for _ in range(most):
                if at >= end:
                    break
                kind = data[at + 8]
                own: bytes | None = None  # set when it is plain
                if kind == EXIT:
                    # fmt: off
                    (length, _, pid, time, start, flags,
                     utime, stime, runtime, peak, group_peak, status) = unpack_exit(data, at)
                    # fmt: on
                    # A record that is busy or discarded has a bit set in its length.
                    if (
                        length == EXIT_SIZE
                        and not status & ~0xFF00
                        and not (forks and any(fork.ppid == pid for fork in forks.values()))
                    ):
                        life = fresh.pop(pid, None)
                        if life is not None:
                            first, born, own, argv, after_argv, _, _, _ = life
                            if first != start:
                                fresh[pid], own = life, None
                        else:
                            process = processes.get(pid)
                            if (
                                process is not None
                                and process.start_ticks == start // NS_PER_TICK
                                and (who := process.who) is not None
                                and who.plain is not None
                                and (context := process.details.line) is not None
                                and process.details.named == generation
                            ):
                                own, argv, after_argv = who.plain, who.plain_after, context
                                born = process.born_ns
                                del processes[pid]
                                process.ended = True
                                if pid == ppid_before:
                                    ppid_before = -1
                        if own is not None:
                            at += _EXIT_STEP
                            if flags & NO_MM:
                                peak = (decoder.late_peak(pid, group_peak) or 0) // PAGESIZE
                            if not tells_exit:
                                continue
                            exits += 1
                            head = exit_head
                            if stime or status:
                                user, system = cpu_times(utime, stime, runtime)
                                used = (status >> 8, time - born, user, system)
                                last = _EXIT % (*used, peak * PAGESIZE) if peak else _EXIT_NO_RSS % used
                            elif peak:
                                last = _EXIT_0 % (time - born, runtime, peak * PAGESIZE)
                            else:
                                last = _EXIT_0_NO_RSS % (time - born, runtime)

                elif kind == EXEC:
                    # fmt: off
                    (length, pid, time, start, ppid, flags,
                     peak, ns_pid, argv_here, argv_before, shared) = unpack_exec(data, at)
                    # fmt: on
                    key_at = at + EXEC_SIZE
                    argv_at = key_at + shared
                    argv_end = argv_at + argv_here
                    if (
                        argv_end == at + length + RING_HEADER
                        and flags | FIRST == FIRST
                        and not argv_before
                        and pid not in fresh
                        and pid not in processes
                        and (
                            (fork := forks.get(pid)) is None
                            or (fork.start_ticks == start // NS_PER_TICK and fork.ppid == ppid)
                        )
                    ):
                        key, raw = data[key_at:argv_at], data[argv_at:argv_end]
                        if ppid != ppid_before or key != key_before:
                            common = commons.get((ppid, key))
                            if common is None or not common.holds(processes.get(ppid), generation):
                                common = self._common(key, generation, ppid)
                            ppid_before, key_before = ppid, key
                        if raw != raw_before and common is not None:
                            try:
                                words = raw.decode().split("\0")
                            except UnicodeDecodeError:
                                common, ppid_before = None, -1
                            else:
                                if not words[-1]:
                                    words.pop()
                                text, raw_before = _encode(words), raw
                        if common is not None:
                            at = argv_end + 7 & ~7
                            own, born = common.own % (pid, start // NS_PER_TICK, pid), start
                            argv, after_argv = text, common.after
                            head, last = exec_head, _FORKED if flags and not tells_fork else _EXEC
                            if fork is not None:
                                del forks[pid]
                                last, born = _FORKED, fork.time_ns
                            if ns_pid != pid:
                                after_argv = common.with_ns_pid(ns_pid)
                            ns = time - second_ns
                            # Most end before anything else happens: both lines at once, which is a quarter cheaper.
                            if ns >= 100_000_000 and at + _EXIT_STEP <= end and tells_exit and not forks:
                                # fmt: off
                                (length, kind, next_pid, until, next_start, flags,
                                 _, stime, runtime, rss, group_peak, status) = unpack_exit(data, at)
                                # fmt: on
                                ns_end = until - second_ns
                                if (
                                    next_pid == pid
                                    and kind == EXIT
                                    and length == EXIT_SIZE
                                    and next_start == start
                                    and not status
                                    and not stime
                                    and ns <= ns_end < _SECOND_NS
                                ):
                                    at += _EXIT_STEP
                                    if flags & NO_MM:
                                        rss = group_peak if group_peak > peak else 0
                                    spent = (until - born, runtime)
                                    # fmt: off
                                    pieces += (
                                        exec_head, b"%d" % ns, own, text, after_argv, last,
                                        exit_head, b"%d" % ns_end, own, text, after_argv,
                                        _EXIT_0 % (*spent, rss * PAGESIZE) if rss else _EXIT_0_NO_RSS % spent,
                                    )
                                    # fmt: on
                                    times += time, until
                                    exits += 1
                                    if time < before:
                                        self._late = True
                                    before = until
                                    continue
                                kind = EXEC
                            fresh[pid] = (start, born, own, argv, after_argv, common, raw, ns_pid)
                            if peaks is not None:
                                peaks[pid] = peak

                elif kind == FORK and tells_fork:
                    length, pid, time, ticks, ppid, size = unpack_head(data, at)
                    if (
                        length == FORK_SIZE
                        and not size  # in the cgroup of its parent
                        and pid not in forks
                        and pid not in fresh
                        and pid not in processes
                        and (ppid in processes or ppid in fresh)
                        and ppid != KTHREADD
                    ):
                        if ppid in fresh:
                            self._enter(ppid, fresh.pop(ppid))
                        forks[pid] = Fork(time, pid, ppid, ticks)
                        self._records += 1
                        self.until_ns = time
                        at += _FORK_STEP
                        continue

                if own is None:
                    if data[at + 3] >= BUSY >> 24:
                        break
                    if forks:  # it may be about one of them
                        self._interrupted = True
                        break
                    at = self._general(data, at, end)
                    if table.holds:
                        self._interrupted = True
                        break
                    ppid_before, before = -1, times[-1] if times else 0
                    continue
                ns = time - second_ns
                if 100_000_000 <= ns < _SECOND_NS:
                    stamp = b"%d" % ns
                else:
                    if not 0 <= ns < _SECOND_NS:
                        ns = lines.since_second(time)
                        second_ns, exec_head, exit_head = lines.second_ns, lines.head(Exec), lines.head(Exit)
                        head = exec_head if kind == EXEC else exit_head
                    stamp = b"%09d" % ns
                pieces += head, stamp, own, argv, after_argv, last
                times.append(time)
                if time < before:
                    self._late = True
                before = time
        except (struct.error, IndexError):
            raise DecodeError("the last record is cut") from None
        finally:
            self._settle()
            self._exits += exits
            self._second_ns, self._heads = second_ns, (exec_head, exit_head)
            self._records += len(times) - known
            if len(times) > known:
                self.until_ns = max(times[-1], self.until_ns or 0)
        if at > end:
            raise DecodeError("the padding of the last record is cut")
        return at

    def _general(self, data: Bytes, at: int, end: int) -> int:
        """
        One record by way of the table.
        """
        self._settle()
        facts: list[Fact] = []
        at = self._source.decoder.decode(data, at, end, facts, 1)
        for fact in facts:
            self._late |= bool(self._times) and fact.time_ns < self._times[-1]
            self._table.apply((fact,))
            self._odd[len(self._times)] = self._table.flush_drafts(0)
            self._times.append(fact.time_ns)
            self._pieces += _NO_LINE
        return at

    def _common(self, key: bytes, generation: int, ppid: int) -> Common | None:
        """
        What plain execs have in common; None if these are not plain.

        Args:
            key: What the kernel said of them.
            generation: Of the names that lines are to have.
            ppid: Their parent's.
        """
        details = self._source.decoder.details(key)
        if (life := self._fresh.pop(ppid, None)) is not None:
            self._enter(ppid, life)
        parent = self._table.processes.get(ppid)
        where = details.line  # the first of its kind goes the general way
        if (
            parent is None
            or ppid == KTHREADD
            or parent.depth + 1 >= MAX_DEPTH
            or details.missing
            or where is None
            or details.named != generation
        ):
            return None
        view = parent.as_parent()
        try:
            text = b',"argv_truncated":false,"parent":' + _encode(view)
        except UnicodeEncodeError:
            return None
        own = self._prefix + b'%%d-%%d","pid":%%d,"ppid":%d,"argv":' % ppid
        if len(self._commons) >= _MAX_COMMONS:
            self._commons.clear()
        common = Common(ppid, parent, view, parent.depth + 1, details, own, text, where, text + where)
        self._commons[ppid, key] = common
        return common

    def _settle(self) -> None:
        """
        Into the table with all that live.
        """
        for pid, life in self._fresh.items():
            self._enter(pid, life)
        self._fresh.clear()

    def _enter(self, pid: int, life: Life) -> None:
        start, born, own, argv_text, after_argv, common, raw, inner_pid = life
        ticks = start // NS_PER_TICK
        ns_pid = inner_pid if inner_pid != pid else None
        name = f"{self._table.boot}-{pid}-{ticks}"
        argv = arguments(raw)
        mine = argv_text + after_argv[: -len(common.where)]
        text = own[len(self._lines.host) :] + mine
        who = Who(name, pid, common.ppid, argv, False, common.view, ns_pid, None, text, own, mine)
        self._table.processes[pid] = Process(
            pid, ticks, name, common.parent, common.details, common.ppid, argv, False, ns_pid, common.depth, born, who
        )
