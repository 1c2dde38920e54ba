"""
The short way for brief lives: processes that were born, executed one program and ended between two reads of netlink.

In a storm nearly all are such. Nobody could look at them, so all that is told of one are three facts, a file and an
account, and what it has of its parent is the same for each of its kind. When all that anybody wants is native JSON,
their two lines are written from that at once, without a process in the table, drafts and joins.

What is not exactly so goes the general way, and so does the first of each kind: what this one needs to know was made
then. Both ways leave the same table and give the same lines, to the byte (tests/test_brief.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.json import Encoder

from procwatch import events
from procwatch.events import Parent
from procwatch.express import Written
from procwatch.facts import NOT_REPORTED, Accounted, Decided, Details, Exec, Fact, Fork, Opened, Thread
from procwatch.formats.native import Lines, encode_marks
from procwatch.table.draft import Maker
from procwatch.table.identity import NS_PER_TICK
from procwatch.table.opens import is_usual
from procwatch.table.process import MAX_DEPTH, Process
from procwatch.table.table import KTHREADD, NO_ACCOUNT, Table, unread

# Four lives; with fewer it is not worth while.
LEAST = 12
MAX_KINDS = 1024
_encode = Encoder().encode
_FORKED = b',"forked":true}\n'
_END = b',"code":%d,"signal":null,"core_dumped":false,"duration_ns":%d,'
_NO_USAGE = b'"cpu_user_ns":null,"cpu_system_ns":null,"max_rss_bytes":null}\n'
_USAGE = b'"cpu_user_ns":%d,"cpu_system_ns":%d,"max_rss_bytes":%b,"io_read_bytes":%d,"io_write_bytes":%d}\n'


class Kind(Struct, gc=False):
    """
    What brief lives with the same parent and the same file have in common, and how that stands in a line.
    """

    exe: Opened | None
    comm: str | None
    before: Details  # those that an exec of a child of this parent leaves, if nobody reads it
    details: Details
    view: Parent
    parent: bytes  # what follows the pid
    marks: bytes
    marks_at_end: bytes
    marks_no_rss: bytes  # the same where there is an account, but no memory was counted: it ended too soon


# One brief life: of what kind, as whom, when it was born, and as text what its end lacks, and the account of it.
Life = tuple[Kind, bytes, int, bytes, bytes]


class Brief:
    """
    Takes brief lives out of the facts of a drain.

    Args:
        table: The table that they are for. It must be asked for execs, and not for `ancestors`.
        maker: Whose names and host the lines show.
        lines: Writes the other drafts, too.
        accounts: Whether an account of each end comes, and the file of each exec; else neither does.
        tells_exit: Whether exits are wanted.
        least: Fewer facts than so many are not looked at.
    """

    def __init__(
        self, table: Table, maker: Maker, lines: Lines, *, accounts: bool, tells_exit: bool, least: int = LEAST
    ) -> None:
        self._table = table
        self._maker = maker
        self._lines = lines
        self._accounts = accounts
        self._tells_exit = tells_exit
        self._least = least
        self._boot = table.boot.encode()
        self._kinds: dict[int, Kind] = {}  # the last of each parent

    def take(self, facts: list[Fact], others: list[list[Fact]]) -> list[Fact]:
        """
        What is left for the table, with lines in the place of what was taken out.

        Args:
            facts: Of the lead, in the order of their time.
            others: Of the other sources; what belongs to brief lives is taken out.
        """
        lives = self._find(facts, others) if len(facts) >= self._least else None
        if not lives:
            return facts
        for at, other in enumerate(others):
            others[at] = [fact for fact in other if fact.pid not in lives]
        return self._write(facts, lives)

    def _find(self, facts: Sequence[Fact], others: Sequence[Sequence[Fact]]) -> dict[int, Life]:
        forks: dict[int, Fork] = {}
        execs: dict[int, Exec] = {}
        ends: dict[int, Thread] = {}
        odd: set[int] = set()  # more is told of them
        parents: set[int] = set()
        for fact in facts:
            pid = fact.pid
            if type(fact) is Exec:
                if pid in execs or pid not in forks or fact.details is not None:
                    odd.add(pid)
                execs[pid] = fact
            elif type(fact) is Fork:
                if pid in forks or pid in ends:
                    odd.add(pid)
                forks[pid] = fact
                parents.add(fact.ppid)
            elif type(fact) is Thread and fact.tid == pid and not fact.born:
                if pid in ends or pid not in execs or fact.status & 0xFF:
                    odd.add(pid)
                ends[pid] = fact
            else:
                odd.add(pid)
        whole = forks.keys() & execs.keys() & ends.keys()
        whole -= odd
        whole -= parents
        # What is known of these changes within this drain, so their children cannot be told of before.
        moving = odd | execs.keys() | forks.keys() | ends.keys()
        opens: dict[int, list[Opened]] = {}
        accounts: dict[int, Accounted] = {}
        for other in others:
            for fact in other:
                if type(fact) is Opened:
                    opens.setdefault(fact.pid, []).append(fact)
                elif type(fact) is Accounted:
                    accounts[fact.pid] = fact
        lives: dict[int, Life] = {}
        table, boot = self._table, self._boot
        processes, joins = table.processes, table.joins
        kinds, generation = self._kinds, self._maker.names.generation
        for pid in whole:
            fork = forks[pid]
            ppid, born_ns = fork.ppid, fork.time_ns
            parent = processes.get(ppid)
            if parent is None or ppid in moving or ppid == KTHREADD or pid in processes:
                continue
            used = exe = comm = None
            if self._accounts:
                # What came after the last read of netlink waits in the table.
                account = accounts.get(pid) or table.accounts.get(pid)
                opened = opens.get(pid) or joins.opens.get(pid)
                if account is None or opened is None or account.exe_dev is None or account.exe_inode is None:
                    continue
                exe, comm, used = opened[0], account.comm, account.usage
                if (
                    exe.held is not None
                    or not is_usual(opened, (account.exe_dev, account.exe_inode))
                    or (pid in opens and pid in joins.opens)
                    or used.cpu_user_ns is None
                ):
                    continue
            kind = kinds.get(ppid)
            if (
                kind is None
                or kind.view is not parent.view
                or kind.before is not parent.details.unread
                or kind.details.named != generation
                or kind.comm != comm
                or (exe is not None and (kind.exe is None or not _alike(kind.exe, exe)))
            ):
                kind = self._kind(parent, exe, comm)
                if kind is None:
                    continue
            who = b'"id":"%b-%d-%d","pid":%d%b' % (boot, pid, born_ns // NS_PER_TICK, pid, kind.parent)
            if used is None:
                lives[pid] = kind, who, born_ns, kind.marks_at_end, _NO_USAGE
                continue
            rss = used.max_rss_bytes
            marks, memory = (kind.marks_no_rss, b"null") if rss is None else (kind.marks_at_end, b"%d" % rss)
            usage = _USAGE % (
                used.cpu_user_ns, used.cpu_system_ns, memory, used.io_read_bytes, used.io_write_bytes,
            )  # fmt: skip
            lives[pid] = kind, who, born_ns, marks, usage
            joins.opens.pop(pid, None)
            table.accounts.pop(pid, None)
        return lives

    def _kind(self, parent: Process, exe: Opened | None, comm: str | None) -> Kind | None:
        """
        What kind of life it is, or None if it is the first of its kind.
        """
        before = unread(parent.details)
        details = before if exe is None else self._table.joins.known(before, exe, comm)
        if details is None or details.line is None or details.named != self._maker.names.generation:
            return None
        if exe is not None and (details.comm is None or details.uid is None or details.gid is None):
            return None  # the account of the end tells more
        if parent.depth + 1 >= MAX_DEPTH:
            return None
        view, missing, inferred = parent.as_parent(), details.missing, (*details.inferred, "id")
        try:
            text = b',"ppid":%d,"argv":null,"argv_truncated":false,"parent":%b' % (parent.pid, _encode(view))
        except UnicodeEncodeError:
            return None
        end = missing if exe is not None else {**missing, **NO_ACCOUNT}
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        no_rss = {**missing, "max_rss_bytes": NOT_REPORTED}
        marks = [encode_marks(one, inferred) for one in (missing, end, no_rss)]
        kind = self._kinds[parent.pid] = Kind(exe, comm, before, details, view, text, *marks)
        return kind

    def _write(self, facts: Sequence[Fact], lives: dict[int, Life]) -> list[Fact]:
        """
        The facts, with lines in the place of those that brief lives are told by.
        """
        lines, tells_exit = self._lines, self._tells_exit
        out: list[Fact] = []
        pieces: list[bytes] = []
        put = pieces.extend
        execs = exits = since_ns = until_ns = 0
        second_ns, host, exec_head, exit_head = lines.second_ns, lines.host, b"", b""
        for fact in facts:
            life = lives.get(fact.pid)
            if life is None:
                if pieces:
                    out.append(self._decided(pieces, execs, exits, since_ns, until_ns))
                    pieces.clear()
                    execs = exits = 0
                out.append(fact)
                continue
            if type(fact) is Fork:
                continue
            time_ns = fact.time_ns
            ns = time_ns - second_ns
            if not exec_head or not 0 <= ns < 1_000_000_000:
                ns = lines.since_second(time_ns)
                second_ns, exec_head, exit_head = lines.second_ns, lines.head(events.Exec), lines.head(events.Exit)
            kind, who, born_ns, marks_at_end, usage = life
            if not pieces:
                since_ns = time_ns
            until_ns = time_ns
            if type(fact) is Exec:
                put((exec_head, b"%09d" % ns, host, who, kind.details.line, kind.marks, _FORKED))  # type: ignore[arg-type]
                execs += 1
            elif type(fact) is Thread and tells_exit:
                end = _END % (fact.status >> 8 & 0xFF, time_ns - born_ns)
                put((exit_head, b"%09d" % ns, host, who, kind.details.line, marks_at_end, end, usage))  # type: ignore[arg-type]
                exits += 1
        if pieces:
            out.append(self._decided(pieces, execs, exits, since_ns, until_ns))
        return out

    def _decided(self, pieces: list[bytes], execs: int, exits: int, since_ns: int, until_ns: int) -> Decided:
        data = b"".join(pieces)
        written = Written(since_ns=since_ns, until_ns=until_ns, data=data, execs=execs, exits=exits)
        return Decided(since_ns, 0, written)


def _alike(one: Opened, other: Opened) -> bool:
    """
    Whether two opens are of the same file, and say the same of it.
    """
    return (
        one.path == other.path
        and one.inode == other.inode
        and one.dev == other.dev
        and one.size == other.size
        and one.deleted == other.deleted
    )
