"""
The table of live processes: facts in, events out. Synchronous, no I/O, no clock.

What becomes of facts, by example (f fork, x exec, e exit of one process; "hold" is `hold_ns`):

    f x e               [exec (forked), exit]    the exec tells the fork
    f e                 [fork, exit]
    f, hold over        [fork]
    f x x e             [exec (forked), exec, exit]
    x (pid unknown)     [exec]                   its fork was lost; the parent is what /proc says
    f f (same pid)      [vanished, ...]          the first one's exit was lost
    e (pid unknown)     [exit]                   with what the fact itself says, the rest missing: lost

Events leave in the order of the kernel's time. A held fork therefore holds back what came after it, at most for
`hold_ns`: it is decided by its exec, its exit, or the end of the hold. One fact costs O(1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from errno import errorcode
from typing import Any

from msgspec import Struct

from procwatch import events
from procwatch.events import Event, ProcessEvent
from procwatch.facts import (
    EXITED,
    LOST,
    NOT_REPORTED,
    PRESSURE,
    Accounted,
    Alive,
    Changed,
    Decided,
    Details,
    Exec,
    ExecFailed,
    Exit,
    Fact,
    Fork,
    Gone,
    Lost,
    Opened,
    Thread,
    Usage,
)
from procwatch.table.draft import FORKED, Draft, End, Failed, Maker, Tracer, Via
from procwatch.table.identity import NS_PER_TICK, process_id, ticks
from procwatch.table.joins import Joins, named
from procwatch.table.opens import Ran
from procwatch.table.process import AT_EXEC, AT_FORK, Process, as_inferred, changed, inherit, make
from procwatch.table.resume import go_on

KTHREADD = 2
HOLD_NS = 100_000_000
# Events held back behind an undecided fork; beyond it forks are decided early.
MAX_HELD_EVENTS = 65_536
MAX_ACCOUNTS = 16_384
_UNREAD = {"exe": EXITED, "exe_deleted": EXITED, "argv": EXITED, "comm": EXITED, "file": EXITED}
_NO_USAGE = Usage()
_SNAPSHOT, _RESYNC, _RESTART = Via("snapshot"), Via("resync"), Via("restart")
_NOBODY = Details(missing=dict.fromkeys(AT_FORK, LOST))


class _Held:
    """
    The place of a fork in the output, while it is not decided.
    """

    __slots__ = ("deadline_ns", "event", "pending", "process")

    def __init__(self, process: Process, deadline_ns: int) -> None:
        self.process = process
        self.deadline_ns = deadline_ns
        self.pending = True
        self.event: Draft | None = None


class Table:
    """
    Joins facts into events and keeps who is alive.

    Args:
        boot: First 8 hex digits of the boot id.
        maker: Makes events of drafts; has the clock's text and the host's name.
        kinds: The kinds of events to make; others cost nothing.
        hold_ns: How long a fork may wait for its exec; 0 tells each fork at once.
        look: Reads a live process, for a fork that is not followed by an exec; None: never look.
        ancestors: How many `ancestors` an event carries; 0: none.
    """

    def __init__(
        self,
        *,
        boot: str,
        maker: Maker,
        kinds: Collection[str] = events.DEFAULT_KINDS,
        hold_ns: int = HOLD_NS,
        look: Callable[[int], Details] | None = None,
        ancestors: int = 0,
    ) -> None:
        self.processes: dict[int, Process] = {}
        self.lost = 0
        self.started_ns = 0
        self.boot = boot
        self.maker = maker
        self._kinds = frozenset(kinds)
        self._tells_fork, self._tells_exec, self._tells_exit = (
            kind in self._kinds for kind in ("fork", "exec", "exit")
        )
        self._hold_ns = hold_ns if {"fork", "exec"} <= self._kinds else 0
        self._look = look
        self._ancestors = ancestors
        self._out: deque[Event | Draft | _Held] = deque()
        self.joins = Joins()
        self._ran: dict[int, list[Ran]] = {}
        self._undecided = 0  # forks that hold back what came after them
        # By pid: of ends that are not told yet.
        self.accounts: dict[int, Accounted] = {}
        self._last_inferred: tuple[Sequence[str], Sequence[str]] = [], []
        self._last_missing: tuple[dict[str, str], dict[str, str], dict[str, str]] = {}, {}, {}
        self._doubtful: dict[int, int] = {}  # leader dead, other threads believed alive: pid -> when to look
        self._apply: dict[type[Fact], Callable[[Any], None]] = {
            Fork: self._on_fork,
            Exec: self._on_exec,
            Exit: self._on_exit,
            Thread: self._on_thread,
            Changed: self._on_changed,
            ExecFailed: self._on_exec_failed,
            Alive: self._on_alive,
            Gone: self._on_gone,
            Opened: self.joins.opened,
            Accounted: self._on_accounted,
            Lost: self._on_lost,
            Decided: lambda fact: self._out.append(fact.event),
        }

    # What goes in and out

    def apply(self, facts: Sequence[Fact]) -> None:
        """
        Take facts in the order of their time. Opens and accounts come before the execs and exits that they are of.
        """
        apply = self._apply
        if self._ran:
            self._ran = {}
        if self.accounts or self.joins.waiting:
            self._ran = self.joins.match(facts, self.accounts)
        for fact in facts:
            apply[type(fact)](fact)

    def flush(self, now_ns: int) -> list[Event]:
        """
        The events that are decided by now, in order.
        """
        return list(map(self.maker.event, self.flush_drafts(now_ns)))

    def flush_drafts(self, now_ns: int) -> list[Event | Draft]:
        """
        The same, as drafts.
        """
        out = self._out
        if self._doubtful:
            self._settle_doubts(now_ns)
        ready: list[Event | Draft] = []
        if not out:
            return ready
        if not self._undecided:
            for item in out:
                if type(item) is not _Held:
                    ready.append(item)  # type: ignore[arg-type]
                elif item.event is not None:
                    ready.append(item.event)
            out.clear()
            return ready
        while out:
            head = out[0]
            if type(head) is _Held:
                if head.pending:
                    if head.deadline_ns > now_ns and len(out) < MAX_HELD_EVENTS:
                        break
                    self._decide(head, look=True)
                if head.event is not None:
                    ready.append(head.event)
            else:
                ready.append(head)  # type: ignore[arg-type]
            out.popleft()
        return ready

    @property
    def holds(self) -> bool:
        """
        Whether a fork holds back what came after it.
        """
        return self._undecided > 0

    def deadline_ns(self) -> int | None:
        """
        When `flush()` will have something though no fact comes, or None.
        """
        if not (self._out or self._doubtful):
            return None
        head = self._out[0] if self._out else None
        times = [head.deadline_ns] if type(head) is _Held else []
        if self._doubtful:
            times.append(next(iter(self._doubtful.values())))
        return min(times, default=None)

    def drain(self) -> list[Event]:
        """
        All that is left, decided or not: for the end.
        """
        return list(map(self.maker.event, self.drain_drafts()))

    def drain_drafts(self) -> list[Event | Draft]:
        """
        The same, as drafts.
        """
        for item in self._out:
            if type(item) is _Held and item.pending:
                self._decide(item, look=False)
        return self.flush_drafts(0)

    def is_ending(self, identity: str) -> bool:
        """
        Whether the exit of a process is held back behind an undecided fork.
        """
        held = (item for item in self._out if isinstance(item, Draft) and item.kind is events.Exit)
        return any(draft.who.id == identity for draft in held)

    def emit(self, event: Event) -> None:
        """
        Put an event that is not made from facts into the output.
        """
        self._out.append(event)

    def snapshot(
        self, alive: Iterable[Alive], started_ns: int, *, tell: bool, before: Collection[Process] = ()
    ) -> None:
        """
        Take the processes that live at the start; `tell` makes `running` events of them.

        Those that were known `before`, in an earlier run of the same boot, go on; who is gone has `vanished`, and who
        is new, or runs another program, is `running`.
        """
        facts = list(alive)
        # Who ended before it was looked for, and was not born since, was never there for us.
        self.started_ns = max([started_ns, *(fact.time_ns for fact in facts)])
        moved = self._resume(before, facts, started_ns)
        new = [fact for fact in facts if fact.pid not in self.processes]
        for fact in new:
            self._adopt(fact)
        for fact in new:  # parents may have higher pids than their children
            self.processes[fact.pid].parent = self.processes.get(fact.details.ppid or 0)
        if tell:
            for fact in facts:
                self._tell(events.Running, self.processes[fact.pid], started_ns, _SNAPSHOT)
        elif before:  # who was born since the sources are open is told of by them
            found = [fact for fact in new if (fact.details.start_ticks or 0) <= ticks(started_ns)]
            for process in [*moved, *(self.processes[fact.pid] for fact in found)]:
                if process.ppid != KTHREADD:
                    self._tell(events.Running, process, started_ns, _RESTART)

    def _resume(self, before: Collection[Process], alive: Collection[Alive], now_ns: int) -> list[Process]:
        """
        Take up processes of an earlier run; gives those that run another program now.
        """
        self.processes.update({process.pid: process for process in before})
        seen = {fact.pid: fact for fact in alive}
        moved = []
        for process in before:
            fact = seen.get(process.pid)
            if fact is None or not _same(process, fact.details):
                self._vanish(process, now_ns)
                continue
            if process.start_inferred and fact.details.start_ticks is not None:
                self._set_start(process, fact.details.start_ticks)
            self._look_at(process, fact)
            if not go_on(process, fact.details):
                moved.append(process)
        return moved

    def resync(self, alive: Iterable[Alive], now_ns: int) -> None:
        """
        Put the table right after a loss: `vanished` for those gone unseen, `running` for those born unseen.
        """
        seen = {fact.pid: fact for fact in alive}
        for pid, process in list(self.processes.items()):
            fact = seen.get(pid)
            if (fact is None or not _same(process, fact.details)) and process.born_ns <= now_ns:
                self._vanish(process, now_ns)
        for pid, fact in seen.items():
            if pid not in self.processes:
                process = self._adopt(fact)
                process.parent = self.processes.get(fact.details.ppid or 0)
                self._tell(events.Running, process, now_ns, _RESYNC)

    # One method for each kind of fact

    def _on_fork(self, fact: Fork) -> None:
        pid = fact.pid
        known = self.processes.get(pid)
        start = fact.start_ticks
        if known is not None:
            if fact.time_ns <= known.seen_ns and abs(known.start_ticks - (start or ticks(fact.time_ns))) <= 1:
                known.born_ns = fact.time_ns  # the snapshot saw it first
                self._hold(known, fact.time_ns)
                return
            if start is not None and start == known.start_ticks and not known.start_inferred:
                return  # told before: a source may tell a fork late, and again
            self._vanish(known, fact.time_ns)
        parent = self.processes.get(fact.ppid)
        details = fact.details
        if details is None:
            details = parent.details if parent is not None else _NOBODY
            if fact.cgroup is not None and fact.cgroup != details.cgroup:
                details = changed(details, cgroup=fact.cgroup)
        elif parent is not None:
            details = inherit(parent.details, details, AT_FORK, inferred=True)
        if start is None:
            start = fact.time_ns // NS_PER_TICK
        process = make(pid, start, f"{self.boot}-{pid}-{start}", parent, details)
        process.ppid = fact.ppid
        process.inherited = fact.details is None
        process.start_inferred = fact.start_ticks is None
        process.born_ns = fact.time_ns
        self.processes[pid] = process
        if fact.ppid != KTHREADD:
            self._hold(process, fact.time_ns)

    def _on_exec(self, fact: Exec) -> None:
        if fact.start_ns is not None:
            self._on_whole_exec(fact, fact.start_ns)
            return
        process = self._executed(fact)
        if process.tids is not None or not process.leader_alive or process.others:
            process.tids = None  # an exec ends all other threads, and the one that called it becomes the leader
            process.others = 0
            process.leader_alive = True
            self._doubtful.pop(fact.pid, None)
        forked = self._merge(process)
        if self._tells_exec:
            self._out.append(self._draft(events.Exec, process, fact.time_ns, FORKED if forked else None))

    def _executed(self, fact: Exec) -> Process:
        """
        Who executed a program, with what could be read of it afterwards.
        """
        process = self.processes.get(fact.pid)
        details = fact.details
        ran = self._ran.get(fact.pid)
        if details is None:
            details = unread(process.details if process is not None else _NOBODY)
        elif process is not None and not _same(process, details):
            if fact.read_ns > fact.time_ns:
                details = unread(process.details)  # the pid is another process's by now
            else:
                self._vanish(process, fact.time_ns)
                process = None
        if process is None:
            process = self._found(fact, details)
            details = process.details
        else:
            if details.start_ticks is not None and process.start_inferred:
                self._set_start(process, details.start_ticks)
            if fact.details is not None:
                inherit(process.details, details, AT_EXEC, inferred=True)
                if "ppid" in details.missing and process.ppid is not None:
                    details.missing = {name: why for name, why in details.missing.items() if name != "ppid"}
        if ran:
            # The account of the end names the last program that ran.
            account = self.accounts.get(fact.pid) if len(ran) == 1 else None
            details = self.joins.add(details, ran.pop(0), account.comm if account is not None else None)
        process.set_details(details)
        return process

    def _on_whole_exec(self, fact: Exec, start_ns: int) -> None:
        """
        The same, where the source knew all of it: nothing to join, and details that many share.

        With `_end` this is what each process on the best backend costs, so it calls little: calls are half of the cost.
        """
        pid, details, ppid = fact.pid, fact.details, fact.ppid
        assert details is not None
        process = self.processes.get(pid)
        start = start_ns // NS_PER_TICK
        if process is not None and process.start_ticks != start:
            self._vanish(process, fact.time_ns)
            process = None
        if process is None:
            parent = self.processes.get(ppid or 0)
            process = make(pid, start, f"{self.boot}-{pid}-{start}", parent, details)
            process.ppid = ppid
            process.born_ns = start_ns
            self.processes[pid] = process
            forked = fact.first and not self._tells_fork
        else:
            parent = process.parent
            process.view = None
            process.inherited = False
            process.details = details
            forked = (process.forked_ns != 0 and self._merge(process)) or (fact.first and not self._tells_fork)
        process.argv = fact.argv
        missing = details.missing
        if fact.argv is None or fact.argv_truncated or process.argv_truncated or process.argv_missing:
            process.argv_truncated = fact.argv_truncated
            process.argv_missing = fact.argv_missing
            if fact.argv_missing is not None:
                missing = {**missing, "argv": fact.argv_missing}
        process.ns_pid = fact.ns_pid if fact.ns_pid != pid else None
        process.who = None
        if self._tells_exec:
            who = process.introduce(self._ancestors)
            tail = FORKED if forked else None
            self._out.append(Draft(events.Exec, fact.time_ns, who, details, missing, details.inferred, tail, process))

    def _on_exit(self, fact: Exit) -> None:
        process = self.processes.get(fact.pid)
        if process is not None and fact.start_ns is not None and process.start_ticks != fact.start_ns // NS_PER_TICK:
            self._vanish(process, fact.time_ns)
            process = None
        if process is None:
            if fact.time_ns <= self.started_ns:
                return  # ended before we were ready
            process = self._unannounced(fact)
        self._end(process, fact.time_ns, fact.status, fact.usage)

    def _unannounced(self, fact: Exit) -> Process:
        """
        The end of a process whose birth nobody told: it lived as a copy of its parent, as far as is known.
        """
        start = None if fact.start_ns is None else ticks(fact.start_ns)
        parent = self.processes.get(fact.ppid or 0)
        if parent is None or start is None:
            process = self._unknown(fact.pid, start, changed(_NOBODY, ppid=fact.ppid, comm=fact.comm))
        else:
            process = make(fact.pid, start, process_id(self.boot, fact.pid, start), parent, parent.details)
            process.inherited = True
        process.born_ns = fact.start_ns or 0
        return process

    def _on_thread(self, fact: Thread) -> None:
        """
        Count threads, where each tells of itself (netlink): a process ends with the last of its threads.

        The end of a thread that we do not know is not counted: one that exits while another executes a program is told
        of after that exec, under a number that is no longer its own (de_thread() in fs/exec.c).
        """
        process = self.processes.get(fact.pid)
        if process is None:
            if not fact.born and fact.tid == fact.pid:
                self._on_exit(Exit(fact.time_ns, fact.pid, fact.status))
            return
        if fact.born:
            if fact.time_ns > process.seen_ns:
                process.tids = process.tids or set()
                process.tids.add(fact.tid)
            return
        if fact.tid == fact.pid:
            process.leader_alive = False
            process.leader_status = fact.status
        elif process.tids and fact.tid in process.tids:
            process.tids.discard(fact.tid)
        elif process.others and fact.time_ns > process.seen_ns:
            process.others -= 1
        if process.leader_alive:
            return
        if process.tids or process.others:
            self._doubtful[fact.pid] = fact.time_ns + HOLD_NS
            return
        # exit_group(2) and signals give all threads one status; a leader that left by itself left 0.
        self._end(process, fact.time_ns, fact.status or process.leader_status, None)

    def _on_changed(self, fact: Changed) -> None:
        process = self.processes.get(fact.pid)
        if process is None:
            return
        what = fact.what
        fields: dict[str, object] = {}
        if what == "comm":
            fields = {"comm": fact.comm}
        elif what in ("uid", "gid"):
            fields = {what: fact.real, "e" + what: fact.effective}
        elif what == "sid":
            fields = {"session": fact.pid}
        if fields:
            details = changed(process.details, **fields)
            if any(name in details.inferred for name in fields):
                details.inferred = tuple(name for name in details.inferred if name not in fields)
            if any(name in details.missing for name in fields):
                details.missing = {name: why for name, why in details.missing.items() if name not in fields}
            process.details = details  # what was inherited stays so: only these fields are its own
            process.view = None
        if what in self._kinds:
            tail = Tracer(fact.tracer or 0) if what == "ptrace" else None
            self._tell(_CHANGES[what], process, fact.time_ns, tail)

    def _on_exec_failed(self, fact: ExecFailed) -> None:
        process = self.processes.get(fact.pid)
        if process is None or "exec_failed" not in self._kinds:
            return
        draft = self._draft(
            events.ExecFailed,
            process,
            fact.time_ns,
            Failed(fact.errno, errorcode.get(fact.errno, str(fact.errno))),
        )
        draft.details = changed(draft.details, file=fact.file)
        draft.inferred = [name for name in draft.inferred if name != "file"]
        draft.missing = {name: why for name, why in draft.missing.items() if name != "file"}
        self._out.append(draft)

    def _on_alive(self, fact: Alive) -> None:
        if fact.pid not in self.processes:
            self._adopt(fact)

    def _on_gone(self, fact: Gone) -> None:
        process = self.processes.get(fact.pid)
        if process is not None:
            self._vanish(process, fact.time_ns)

    def _on_accounted(self, fact: Accounted) -> None:
        self.accounts[fact.pid] = fact
        if len(self.accounts) > MAX_ACCOUNTS:
            del self.accounts[next(iter(self.accounts))]

    def _on_lost(self, fact: Lost) -> None:
        detail = _DETAILS.get(fact.where)
        count, kinds = (fact.count, fact.kinds) if detail is None else (0, {detail: fact.count})
        self.lost += count
        stamp = self.maker.clock.stamp
        self._out.append(
            events.Lost(
                time=stamp(fact.time_ns),
                host=self.maker.host,
                count=count,
                exact=fact.exact,
                where=fact.where,
                since=stamp(fact.since_ns) if fact.since_ns else None,
                until=stamp(fact.until_ns) if fact.until_ns else None,
                kinds=kinds or None,
            )
        )

    # Births and ends

    def _adopt(self, fact: Alive) -> Process:
        """
        A process that was found alive.
        """
        details = fact.details
        process = self._unknown(fact.pid, details.start_ticks, details)
        self._look_at(process, fact)
        self.processes[fact.pid] = process
        return process

    @staticmethod
    def _look_at(process: Process, fact: Alive) -> None:
        process.seen_ns = fact.time_ns
        process.others = max((fact.details.threads or 1) - 1, 0)

    def _found(self, fact: Exec, details: Details) -> Process:
        """
        A process that executes a program, whose birth we did not see.
        """
        process = self._unknown(fact.pid, details.start_ticks, details)
        process.parent = self.processes.get(details.ppid or 0)
        self.processes[fact.pid] = process
        return process

    def _unknown(self, pid: int, start: int | None, details: Details) -> Process:
        if start is None:
            details = changed(details, missing={**details.missing, "id": LOST})
        return make(pid, start or 0, process_id(self.boot, pid, start or 0), None, details)

    def _hold(self, process: Process, time_ns: int) -> None:
        process.forked_ns = time_ns
        if "fork" not in self._kinds:
            return
        self._undecided += 1
        held = _Held(process, time_ns + self._hold_ns)
        process.held = held
        self._out.append(held)
        if not self._hold_ns:
            self._decide(held, look=False)

    def _merge(self, process: Process) -> bool:
        """
        The exec tells the fork, unless that was told already.
        """
        held, process.held = process.held, None
        told = process.forked_ns == 0
        process.forked_ns = 0
        if type(held) is _Held and held.pending:
            held.pending = False
            self._undecided -= 1
            return True
        return not told and "fork" not in self._kinds

    def _decide(self, held: _Held, *, look: bool) -> None:
        """
        A fork without an exec: tell it, with a look at the child if it still lives.
        """
        process = held.process
        held.pending = False
        self._undecided -= 1
        process.held = None
        if look and self._look is not None and not process.ended and process.inherited:
            details = self._look(process.pid)
            if details.start_ticks is not None and abs(details.start_ticks - process.start_ticks) <= 1:
                self._set_start(process, details.start_ticks)
                inherit(process.details, details, AT_FORK, inferred=True)
                process.set_details(details)
        held.event = self._draft(events.Fork, process, process.forked_ns)
        process.forked_ns = 0

    def _end(self, process: Process, time_ns: int, status: int | None, usage: Usage | None) -> None:
        pid = process.pid
        if self._doubtful:
            self._doubtful.pop(pid, None)
        if process.held is not None:
            self._decide_now(process)
        self.processes.pop(pid, None)
        if self._look is not None:
            self.joins.forget(pid)
        process.ended = True
        if self.accounts and (account := self.accounts.pop(pid, None)) is not None:
            usage = usage or account.usage
            self._add_account(process, account)
        if not self._tells_exit or process.ppid == KTHREADD:
            return
        missing = None
        if status is None:
            number, code, core = 0, None, None
            missing = _NO_STATUS
        else:
            number = status & 0x7F
            code = None if number else status >> 8 & 0xFF
            core = status & 0x80 != 0
        if usage is None:
            usage = _NO_USAGE
            missing = {**missing, **NO_ACCOUNT} if missing else NO_ACCOUNT
        user_ns, system_ns, max_rss = usage.cpu_user_ns, usage.cpu_system_ns, usage.max_rss_bytes
        if usage is not _NO_USAGE and (user_ns is None or system_ns is None or max_rss is None):
            unknown = [name for name in NO_ACCOUNT if getattr(usage, name) is None]
            missing = {**(missing or {}), **dict.fromkeys(unknown, NOT_REPORTED)}
        born_ns = process.born_ns or process.start_ticks * NS_PER_TICK
        if not born_ns:
            missing = {**(missing or {}), "duration_ns": LOST}
        lived_ns = time_ns - born_ns if born_ns else None
        end = End(
            code,
            number or None,
            core,
            lived_ns,
            user_ns,
            system_ns,
            max_rss,
            usage.io_read_bytes,
            usage.io_write_bytes,
        )
        self._out.append(self._draft(events.Exit, process, time_ns, end, missing))

    def _decide_now(self, process: Process) -> None:
        """
        A fork that is still held is told as one: its process did not live to execute a program.
        """
        if type(process.held) is _Held and process.held.pending:
            self._decide(process.held, look=False)

    def _add_account(self, process: Process, account: Accounted) -> None:
        """
        What only the account of a process's end can tell, if it died unread.
        """
        details = process.details
        if details.comm is None or details.uid is None or details.gid is None:
            told = {
                name: getattr(account, name)
                for name in ("comm", "uid", "gid")
                if getattr(details, name) is None and getattr(account, name) is not None
            }
            missing = {name: why for name, why in details.missing.items() if name not in told}
            process.details = changed(details, missing=missing, **told)
        if details.exe is None and (exe := self.joins.path_of(account)) is not None:
            process.details = named(process.details, exe, None, False)

    def _vanish(self, process: Process, time_ns: int) -> None:
        self._decide_now(process)
        self.processes.pop(process.pid, None)
        self.joins.forget(process.pid)
        self._doubtful.pop(process.pid, None)
        process.ended = True
        if process.ppid != KTHREADD:  # the kernel's workers come and go, and no source tells of them
            self._tell(events.Vanished, process, time_ns)

    def _settle_doubts(self, now_ns: int) -> None:
        """
        Leaders that ended before threads of theirs: look whether those really live, an end may have been lost.
        """
        for pid, when in list(self._doubtful.items()):
            if when > now_ns:
                break
            del self._doubtful[pid]
            process = self.processes.get(pid)
            if process is None or self._look is None:
                continue
            details = self._look(pid)
            if details.missing.get("ppid") == PRESSURE:
                self._doubtful[pid] = now_ns + HOLD_NS
                continue
            if _same(process, details) and (details.threads or 0) > 1:
                continue
            if process.leader_status == 0 and (process.tids or process.others):
                # That the leader left by itself says nothing of the code, and the news of the last thread's end, with
                # the code, may lie unread: it has been read at the next look.
                process.tids, process.others = None, 0
                self._doubtful[pid] = now_ns + HOLD_NS
            else:
                self._end(process, now_ns, process.leader_status or None, None)

    def _set_start(self, process: Process, start: int) -> None:
        if start != process.start_ticks:
            process.start_ticks = start
            process.id = process_id(self.boot, process.pid, start)
            process.view = process.who = None
        process.start_inferred = False

    # Events

    def _tell(
        self,
        kind: type[ProcessEvent],
        process: Process,
        time_ns: int,
        tail: Struct | None = None,
        missing: dict[str, str] | None = None,
    ) -> None:
        if kind.event in self._kinds:
            self._out.append(self._draft(kind, process, time_ns, tail, missing))

    def _draft(
        self,
        kind: type[ProcessEvent],
        process: Process,
        time_ns: int,
        tail: Struct | None = None,
        missing: dict[str, str] | None = None,
    ) -> Draft:
        """
        What is known of a process now.

        Args:
            kind: Of the event.
            process: Of whom.
            time_ns: When, CLOCK_BOOTTIME.
            tail: The fields that only this kind has.
            missing: Which of these could not be had.
        """
        details = process.details
        inferred: Sequence[str] = details.inferred
        if process.inherited:
            inferred = as_inferred(process, AT_FORK)
        # What many have in common they share, and formats write it once (Lines): hence the two memories of the last.
        if process.start_inferred:
            if self._last_inferred[0] is not inferred:
                self._last_inferred = inferred, (*inferred, "id")
            inferred = self._last_inferred[1]
        known = details.missing
        if process.argv_missing is not None:
            known = {**known, "argv": process.argv_missing}
        if missing:
            if self._last_missing[0] is not known or self._last_missing[1] is not missing:
                self._last_missing = known, missing, {**known, **missing}
            known = self._last_missing[2]
        who = process.who or process.introduce(self._ancestors)
        return Draft(kind, time_ns, who, details, known, inferred, tail, process)


def unread(before: Details) -> Details:
    """
    What is known after an exec that could not be read; made once for a parent that has many such children.
    """
    if before.unread is None:
        before.unread = inherit(before, Details(missing=_UNREAD), AT_EXEC, inferred=True)
    return before.unread


def _same(process: Process, details: Details) -> bool:
    """
    Whether what was read under this pid is of this very process.
    """
    if details.start_ticks is None or details.start_ticks == process.start_ticks:
        return True
    # The stamp of the fork is taken some µs after the start, sometimes across a tick.
    return process.start_inferred and abs(details.start_ticks - process.start_ticks) <= 1


# Sources that only add to what others tell: what they lose is no event, but a field of one.
_DETAILS = {"fanotify_queue": "open", "fanotify": "open", "taskstats_socket": "account", "taskstats": "account"}
_NO_STATUS = dict.fromkeys(("code", "signal", "core_dumped"), NOT_REPORTED)
NO_ACCOUNT = dict.fromkeys(("cpu_user_ns", "cpu_system_ns", "max_rss_bytes"), NOT_REPORTED)
_CHANGES: dict[str, type[ProcessEvent]] = {
    "comm": events.Comm,
    "uid": events.Uid,
    "gid": events.Gid,
    "sid": events.Sid,
    "ptrace": events.Ptrace,
    "coredump": events.Coredump,
}
