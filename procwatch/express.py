"""
The short way from facts to lines, for what nearly all execs and exits are.

    facts ─┬─ plain ──────────────────────────────> lines
           └─ anything else ─> table ─> drafts ─> (formats)

When all that anybody wants is native JSON, a whole exec and its exit need no draft, no look at what may be joined and
no queue: the table is changed and the line is written in one place. Half of what an event costs is calling functions
and making objects, and this does without both; it is the only reason for this module to be.

What is plain: an exec that the kernel told whole, of a process that was not known, with a parent that is; an exit with
a code, of a process whose exec was written. Whatever is out of the ordinary goes the general way, fact by
fact and in its place. Both ways leave the same table and give the same lines, to the byte (tests/test_express.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from msgspec.json import Encoder

from procwatch import events
from procwatch.events import Event
from procwatch.facts import Exec, Exit, Fact
from procwatch.formats.native import Lines
from procwatch.table.draft import Draft, Maker, Who
from procwatch.table.identity import NS_PER_TICK
from procwatch.table.process import MAX_DEPTH, Process
from procwatch.table.table import KTHREADD, Table

# Facts whose lines are put together at once: 64 kB of text, for which malloc() does not ask the kernel each time.
CHUNK = 64
_CLEAR = b',"missing":{},"inferred":[]'
_EXEC, _FORKED = _CLEAR + b"}\n", _CLEAR + b',"forked":true}\n'
_EXITED = (
    _CLEAR + b',"code":%d,"signal":null,"core_dumped":false,"duration_ns":',
    _CLEAR.replace(b"{}", b'{"max_rss_bytes":"not_reported"}')
    + b',"code":%d,"signal":null,"core_dumped":false,"duration_ns":',
)
# Bytes are formatted with %: it is three times as quick as an f-string and encode() where there are numbers.
_USAGE = b'%d,"cpu_user_ns":%d,"cpu_system_ns":%d,"max_rss_bytes":%d}\n'
_USAGE_NO_RSS = _USAGE.replace(b"%d}", b"null}")

_encode = Encoder().encode


class Written(Event, frozen=True, kw_only=True, tag="written"):
    """
    Several events, as the lines that they are written as: only for sinks that asked for it. `time` is before all.
    """

    event: ClassVar[Literal["written"]] = "written"

    data: bytes
    execs: int
    exits: int
    until: str  # RFC 3339; after all

    @property
    def count(self) -> int:
        """
        How many events.
        """
        return self.execs + self.exits


class Express:
    """
    Takes the eBPF source's facts into a table, as Table.apply() and Table.flush_drafts() do, and writes lines of what
    is plain.

    Args:
        table: The table that the facts are for. It must be asked for execs, and not for forks, nor for `ancestors`.
        maker: Whose names and host the lines show.
        lines: Writes the other drafts, too.
        tells_exit: Whether exits are wanted.
    """

    def __init__(self, table: Table, maker: Maker, lines: Lines, *, tells_exit: bool) -> None:
        self._table = table
        self._maker = maker
        self._lines = lines
        self._tells_exit = tells_exit
        self._exited = [tuple(text % code for text in _EXITED) for code in range(256)]

    def take(self, facts: Sequence[Fact]) -> list[Event | Draft]:
        """
        What is decided, in order.

        Args:
            facts: In the order of their time.
        """
        out = self._table.flush_drafts(0)
        at = 0
        while at < len(facts):
            chunk = facts[at : at + CHUNK]
            ns = self._lines.since_second(chunk[0].time_ns)
            if ns + chunk[-1].time_ns - chunk[0].time_ns >= 1_000_000_000:
                chunk = chunk[:1]
            self._take(chunk, out)
            at += len(chunk)
        return out

    def _take(self, facts: Sequence[Fact], out: list[Event | Draft]) -> None:
        """
        Facts of one second of the wall clock.
        """
        table, lines, tells_exit, exited = self._table, self._lines, self._tells_exit, self._exited
        processes, boot = table.processes, table.boot.encode()
        generation, host, second_ns = self._maker.names.generation, lines.host, lines.second_ns
        exec_head, exit_head = lines.head(events.Exec), lines.head(events.Exit)
        view, parent_text, ppid_text = None, b"", b""
        pieces: list[bytes] = []
        put = pieces.extend
        execs = exits = 0

        for fact in facts:
            # Each branch reads the fields itself: Python is quick where a line of code sees one type only.
            if type(fact) is Exit:
                pid, usage, status = fact.pid, fact.usage, fact.status
                process = processes.get(pid)
                if (
                    process is not None
                    and process.who is not None
                    and (text := process.who.plain) is not None
                    and (context := process.details.line) is not None
                    and process.details.named == generation
                    and (start_ns := fact.start_ns) is not None
                    and start_ns // NS_PER_TICK == process.start_ticks
                    and usage is not None
                    and status is not None
                    and not status & 0xFF
                ):
                    del processes[pid]
                    process.ended = True
                    if tells_exit:
                        time_ns, rss = fact.time_ns, usage.max_rss_bytes
                        marks = exited[status >> 8 & 0xFF][rss is None]
                        times = (time_ns - process.born_ns, usage.cpu_user_ns, usage.cpu_system_ns)
                        tail = _USAGE_NO_RSS % times if rss is None else _USAGE % (*times, rss)
                        ns = time_ns - second_ns
                        stamp = b"%d" % ns if ns > 99_999_999 else b"%09d" % ns
                        put((exit_head, stamp, host, text, context, marks, tail))
                        exits += 1
                    continue

            elif type(fact) is Exec:
                pid, ppid, argv, details, start_ns = fact.pid, fact.ppid, fact.argv, fact.details, fact.start_ns
                parent = processes.get(ppid)  # type: ignore[arg-type]
                if (
                    parent is not None
                    and pid not in processes
                    and start_ns is not None
                    and details is not None
                    and not details.missing
                    and argv is not None
                    and not fact.argv_truncated
                    and (depth := parent.depth + 1) < MAX_DEPTH
                    and ppid is not None
                    and ppid != KTHREADD
                    and (context := details.line) is not None  # the first of its kind goes the general way
                    and details.named == generation
                ):
                    try:
                        argv_text = _encode(argv)
                        if view is None or parent.view is not view:
                            view = parent.as_parent()
                            parent_text = b',"argv_truncated":false,"parent":' + _encode(view)
                            ppid_text = b',"ppid":%d,"argv":' % ppid
                    except UnicodeEncodeError:
                        view = None
                    else:
                        start = start_ns // NS_PER_TICK
                        identity = b"%b-%d-%d" % (boot, pid, start)
                        text = b'"id":"%b","pid":%d%b%b%b' % (identity, pid, ppid_text, argv_text, parent_text)
                        name = identity.decode()
                        ns_pid = fact.ns_pid
                        if ns_pid == pid:
                            ns_pid = None
                        elif ns_pid is not None:
                            text += b',"ns_pid":%d' % ns_pid
                        processes[pid] = Process(
                            pid, start, name, parent, details, ppid, argv, False, ns_pid, depth, start_ns,
                            Who(name, pid, ppid, argv, False, view, ns_pid, None, text, text),
                        )  # fmt: skip
                        last = _FORKED if fact.first else _EXEC
                        ns = fact.time_ns - second_ns
                        stamp = b"%d" % ns if ns > 99_999_999 else b"%09d" % ns
                        put((exec_head, stamp, host, text, context, last))
                        execs += 1
                        continue

            if pieces:
                out.append(self._written(pieces, execs, exits, facts))
                pieces.clear()
                execs = exits = 0
            view = None
            table.apply((fact,))
            out += table.flush_drafts(0)

        if pieces:
            out.append(self._written(pieces, execs, exits, facts))

    def _written(self, pieces: list[bytes], execs: int, exits: int, facts: Sequence[Fact]) -> Written:
        since, until = map(self._maker.clock.stamp, (facts[0].time_ns, facts[-1].time_ns))
        host = self._maker.host
        return Written(time=since, host=host, data=b"".join(pieces), execs=execs, exits=exits, until=until)
