"""
The scan: look at /proc again and again. Works for every user, everywhere, and misses what lives between two looks.

How it stays cheap and still knows what it missed:

- Births: the last pid that was given out stands in /proc/loadavg. While that stays, nothing was born, and a look costs
  one pread. When it moves, the numbers in between are tried one by one, in order. A number may be given out some 100 µs
  before its process can be seen, so what was not there is tried once more at the next look; a listing of /proc, seldom
  and only after births, finds what even that missed.
- pidfd_open(2) tells processes from threads (their numbers come from the same counter), and a pidfd becomes readable
  when its process ends: all ends cost one epoll_wait. From Linux 6.15 on it then gives the exit status too, of
  processes of any user; before, it can be had from a zombie of our own user. Processes for which no descriptor is
  left are looked at from time to time instead.
- Execs: a process that was only forked has PF_FORKNOEXEC in its flags, for every user to see; that it goes away is an
  exec, exactly. Later execs of the same process: code addresses and stack start in stat are drawn anew by each
  exec and by nothing else, so that setproctitle and prctl(PR_SET_NAME) are not taken for one. They are shown to who may
  trace the process; of others' processes comm and argv must both have changed. (So an exec of another user's
  process that keeps its comm is not seen, and one that sets both itself is taken for an exec.)
  Looks at one process get rarer with its age: every 1/16 of its age while it is younger than a second
  and has executed nothing, else every 1/4.
- Losses: /proc/stat counts births since boot. Births minus what was seen is an upper bound for the processes that were
  missed, because threads count too and may end unseen.

Times: a birth is stamped with its start time (one clock tick) moved between the two looks that enclose it, an exec and
an end with the look that found it. An exec may thus be late by the process's age / 4, an end by a look (1-20 ms), or
by the same fraction of the age where there is no pidfd.
"""

from __future__ import annotations

import errno
import heapq
import os
import resource
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from procwatch.errors import DecodeError, SourceUnavailable
from procwatch.facts import Details, Exec, Exit, Fact, Fork, Lost
from procwatch.sources import pidfd, procfs
from procwatch.sources.base import SourceStats
from procwatch.sources.births import share
from procwatch.table.identity import NS_PER_TICK
from procwatch.wire.procfs import PF_FORKNOEXEC, Stat

_MS = 1_000_000
_SECOND = 1_000_000_000
FASTEST_NS = 1 * _MS
SLOWEST_NS = 20 * _MS
# The pause between looks is this part of the time since the last birth: 1 ms until 50 ms after it, 20 ms after 1 s.
CALM = 50
# Beyond so many new numbers at once listing /proc is cheaper than trying each.
MAX_PROBES = 2048
# A pid is given out before its process can be seen; at open(), so many of the last ones are tried again.
IN_FLIGHT = 64
MAX_CHECKS = 256  # per look
SWEEP_NS = _SECOND  # longest time between two looks at one process, and between two listings ...
SWEEP_NS_PER_PROCESS = 5 * _MS // 2  # ... at least so much for each process: 0.3 % of a core
LISTING_NS_PER_PROCESS = _MS // 4
AT_ONCE = 4  # descriptors that are open at once while we look at one process
PATIENCE_NS = 100 * _MS  # how long looks at old processes may gather while nothing is born
REAP_NS = 20 * _MS  # how long an exit may wait for the parent, that makes its status known
RESERVED_PIDS = 300  # not given out again after the numbers wrapped (kernel/pid.c)
INITIAL_PID_NAMESPACE = 0xEFFFFFFC


class _Known:
    """
    A live process that the scan has told of, or found at open().
    """

    __slots__ = ("argv", "comm", "ended_ns", "fd", "half_way", "image", "pid", "start_ticks", "unexecuted")

    def __init__(self, pid: int, state: Stat) -> None:
        self.pid = pid
        self.start_ticks = state.start_ticks
        self.comm = state.comm
        self.argv: list[str] | None = None
        self.image = state.image
        self.unexecuted = bool(state.flags & PF_FORKNOEXEC)
        self.half_way = False  # in the middle of an exec when last looked at
        self.fd = -1  # pidfd, if there was one left
        self.ended_ns = 0


class Scan:
    """
    Births, execs and ends as seen by looking through /proc.

    Args:
        max_pidfds: How many descriptors to use for noticing ends; None: half of what the process may open.
    """

    name: ClassVar[str] = "scan"

    def __init__(self, *, max_pidfds: int | None = None) -> None:
        if max_pidfds is None:
            max_pidfds = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1 << 16)
        self._max_pidfds = max_pidfds
        self.limits: list[str] = []  # what it cannot see here, for the `ready` event
        self._loadavg = -1
        self._epoll: select.epoll | None = None
        self._known: dict[int, _Known] = {}
        self._by_fd: dict[int, _Known] = {}
        self._due: list[tuple[int, int, int]] = []  # heap: when to look again, pid, start
        self._absent: list[int] = []  # numbers that were given out, and nobody was there
        self._ended: set[int] = set()  # in this look
        self._told: dict[int, int] = {}  # ended and told, perhaps still waiting for the parent: pid -> start
        self._last_pid = self._pid_max = 0
        self._now_ns = self._looked_ns = self._born_ns = self._cost_ns = 0
        self._unlisted = False
        self._listed_ns = 0
        self._counts_births = False
        self._unaccounted = False
        self._accounted_ns = 0
        self._births_at_open = self._seen = self._lost = 0
        self._facts = self._wakeups = 0

    def probe(self) -> SourceUnavailable | None:
        """
        Whether /proc is there, whole, and of our own pid namespace.
        """
        try:
            own = os.readlink("/proc/self")
            with open("/proc/loadavg", "rb"):
                pass
        except OSError as error:
            return SourceUnavailable(self.name, f"/proc cannot be read ({error.strerror})", "mount proc on /proc")
        if own != str(os.getpid()):
            return SourceUnavailable(
                self.name, "/proc belongs to another pid namespace", "mount proc anew in this pid namespace"
            )
        return None

    def open(self) -> None:
        """
        Note what lives now; `read()` tells of what is born after it.

        Raises:
            SourceUnavailable: No usable /proc.
        """
        unavailable = self.probe()
        if unavailable is not None:
            raise unavailable
        try:
            self._loadavg = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            self._epoll = select.epoll()
            with open("/proc/sys/kernel/pid_max", "rb") as file:
                self._pid_max = int(file.read())
            self._begin()
        except OSError as error:
            self.close()
            raise SourceUnavailable(self.name, f"/proc cannot be read ({error.strerror})") from error
        except DecodeError as error:
            self.close()
            raise SourceUnavailable(self.name, str(error)) from error

    def _begin(self) -> None:
        self.limits = []
        self._counts_births = os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE
        if not self._counts_births:
            self.limits.append("births are counted for the whole host only, so losses in this pid namespace are not")
        if procfs.hidden():
            self.limits.append("processes of other users are hidden (/proc is mounted with hidepid)")
        self._count_from_here()
        now = self._looked_ns = self._born_ns = self._listed_ns = self._accounted_ns = _now()
        listed = procfs.pids()
        sweep = max(SWEEP_NS, len(listed) * SWEEP_NS_PER_PROCESS)
        for number, pid in enumerate(listed):
            state = procfs.stat(pid)
            if state is None or state.ended:
                continue
            process = self._note(pid, state, now + sweep * number // len(listed))
            if not (state.readable or state.kernel_thread):
                process.argv = procfs.read(pid, with_file=False).argv
            if len(self._by_fd) < self._max_pidfds // 2:  # the other half is for those to come
                self._watch(process, pidfd.find(pid))
        # Forked before, visible only after the listing: born after open(), as far as anybody can tell.
        recent = range(max(self._last_pid - IN_FLIGHT, 1), self._last_pid + 1)
        self._absent = [pid for pid in recent if pid not in self._known and procfs.stat(pid) is None]

    def _count_from_here(self) -> None:
        for _ in range(10):  # the two numbers must be of one moment
            self._last_pid = procfs.last_pid(self._loadavg)
            self._births_at_open = procfs.born() if self._counts_births else 0
            if procfs.last_pid(self._loadavg) == self._last_pid:
                break

    def fileno(self) -> int | None:
        """
        There is none: birth makes no descriptor readable.
        """
        return None

    def descriptors(self) -> list[int]:
        """
        What every look reads.
        """
        return [] if self._epoll is None else [self._loadavg, self._epoll.fileno()]

    def delay_s(self) -> float:
        """
        1 ms after a birth, growing to 20 ms; never less than the last look took, so that half of a core is the most.
        """
        calm = (self._looked_ns - self._born_ns) // CALM
        return max(FASTEST_NS, min(SLOWEST_NS, calm), self._cost_ns) / _SECOND

    def quiet(self) -> bool:
        """
        Whether nothing was born and nothing ended since the last look, and nobody has waited long to be looked at: a
        third of the cost of a look, on a host where nothing happens.
        """
        if self._epoll is None or self._absent or self._unlisted or self._unaccounted:
            return False
        now = _now()
        if self._due and self._due[0][0] + PATIENCE_NS <= now:
            return False
        try:
            if procfs.last_pid(self._loadavg) != self._last_pid or self._epoll.poll(0, 1):
                return False
        except (OSError, DecodeError):  # read() says so
            return False
        self._looked_ns = now
        return True

    def read(self, *, final: bool = False) -> list[Fact]:
        """
        What is new since the last look.

        Args:
            final: Tell of losses now, not at most once a second: for the last look before `close()`.
        """
        if self._epoll is None:
            return []
        facts: list[Fact] = []
        now = self._now_ns = _now()
        self._ended.clear()
        self._ends(facts)
        if not self._has_room():  # who is missed until there is some will be counted
            return facts
        births = self._counts_births and self._account_due(final)
        counted = procfs.born() if births else 0  # before the look for births: all that it counts can be seen there
        self._births(facts)
        self._checks(facts)
        if births:
            self._account(counted, facts)
        facts.sort(key=_time)
        self._cost_ns = _now() - now
        # Not before the last fact, so that the next look cannot tell of something earlier.
        self._looked_ns = now + self._cost_ns
        self._facts += len(facts)
        self._wakeups += bool(facts)
        return facts

    def coverage(self) -> dict[str, float]:
        """
        Of the births that the kernel counted, the share that was seen.
        """
        return {"fork": share(self._seen, procfs.born() - self._births_at_open)} if self._counts_births else {}

    def stats(self) -> SourceStats:
        """
        Counters so far; `lost` is an upper bound.
        """
        return SourceStats(facts=self._facts, wakeups=self._wakeups, lost=self._lost)

    def close(self) -> None:
        """
        Close all descriptors.
        """
        for fd in self._by_fd:
            with suppress(OSError):  # closed by somebody else
                os.close(fd)
        self._by_fd.clear()
        self._known.clear()
        self._due.clear()
        self._absent.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        loadavg, self._loadavg = self._loadavg, -1
        if loadavg >= 0:
            os.close(loadavg)

    def _has_room(self) -> bool:
        """
        Whether there are descriptors to look with; our own that wait for ends are given back for it.
        """
        while True:
            spare: list[int] = []
            try:
                spare.extend(os.dup(self._loadavg) for _ in range(AT_ONCE))
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if not self._by_fd:
                    return False
                self._max_pidfds = len(self._by_fd) // 2
                for fd in sorted(self._by_fd)[self._max_pidfds :]:
                    self._unwatch(fd)
            else:
                return True
            finally:
                for fd in spare:
                    os.close(fd)

    def _unwatch(self, fd: int) -> None:
        assert self._epoll is not None
        self._epoll.unregister(fd)  # closing is not enough where a forked child of ours has it, too
        self._by_fd.pop(fd).fd = -1
        os.close(fd)

    # Births

    def _births(self, facts: list[Fact]) -> None:
        last = procfs.last_pid(self._loadavg)
        again, self._absent = self._absent, []
        fresh = _between(self._last_pid, last, self._pid_max)
        if last != self._last_pid:
            self._last_pid = last
            self._born_ns = self._now_ns
            self._unlisted = self._unaccounted = True
        for pid in again:
            self._meet(pid, facts)
        if fresh is not None:
            self._absent = [pid for pid in fresh if not self._meet(pid, facts)]
        pause = max(SWEEP_NS, len(self._known) * LISTING_NS_PER_PROCESS)
        if fresh is None or (self._unlisted and self._now_ns - self._listed_ns >= pause):
            self._list(facts)

    def _list(self, facts: list[Fact]) -> None:
        """
        The safety net: processes that became visible too late, or were too many at once.
        """
        # What is born from here on moves the last pid, and makes another listing due.
        self._unlisted = procfs.last_pid(self._loadavg) != self._last_pid
        self._listed_ns = self._now_ns
        listed = procfs.pids()
        self._told = {pid: self._told[pid] for pid in listed if pid in self._told}
        for pid in listed:
            if pid not in self._known:
                self._meet(pid, facts)

    def _meet(self, pid: int, facts: list[Fact]) -> bool:
        """
        Look who has this number, and tell of a process that is new; False if nobody has it yet, or any more.
        """
        fd = pidfd.find(pid)
        if fd == pidfd.NOBODY:
            return False
        if fd == pidfd.THREAD:
            self._seen += 1
            return True
        read_ns = _now()
        details, state = procfs.look(pid)
        known = self._known.get(pid)
        start = self._told.get(pid) if known is None else known.start_ticks
        same = state is not None and start == state.start_ticks
        if state is None or state.exit_signal == -1 or same:
            if fd >= 0:
                os.close(fd)
            self._seen += state is not None and not same
            return state is not None
        self._seen += 1
        born_ns = min(max(state.start_ticks * NS_PER_TICK, self._looked_ns), self._now_ns)
        if known is not None:  # ended unnoticed, and its number is in use again
            self._end(known, born_ns, None, facts)
        elif pid in self._ended:  # ended just now: it cannot have been born before that
            born_ns = self._now_ns
        process = self._note(pid, state, self._now_ns)
        process.argv = details.argv
        self._watch(process, fd)
        _tell_birth(process, state, details, born_ns, read_ns, facts)
        return True

    def _note(self, pid: int, state: Stat, due_ns: int) -> _Known:
        process = self._known[pid] = _Known(pid, state)
        heapq.heappush(self._due, (due_ns, pid, state.start_ticks))
        return process

    def _watch(self, process: _Known, fd: int) -> None:
        """
        Let the end of a process wake us up, if there are descriptors left.
        """
        if fd < 0:
            return
        if len(self._by_fd) >= self._max_pidfds:
            os.close(fd)
            return
        assert self._epoll is not None
        self._epoll.register(fd, select.EPOLLIN)
        self._by_fd[fd] = process
        process.fd = fd

    # Execs, and ends of processes without a pidfd

    def _checks(self, facts: list[Fact]) -> None:
        due, now = self._due, self._now_ns
        slowest = max(SWEEP_NS, len(self._known) * SWEEP_NS_PER_PROCESS)
        for _ in range(MAX_CHECKS):
            if not due or due[0][0] > now:
                break
            _, pid, start = heapq.heappop(due)
            process = self._known.get(pid)
            if process is None or process.start_ticks != start:
                continue
            self._check(process, facts)
            if self._known.get(pid) is process:
                heapq.heappush(due, (now + min(_pause_ns(process, now), slowest), pid, start))

    def _check(self, process: _Known, facts: list[Fact]) -> None:
        state = procfs.stat(process.pid)
        if state is None or state.start_ticks != process.start_ticks or state.ended:
            if process.fd < 0:  # else the pidfd tells, and keeps the status
                self._end(process, self._now_ns, procfs.exit_status(process.pid, process.start_ticks), facts)
                if state is not None and not state.ended:
                    self._meet(process.pid, facts)  # the number is in use again
            return
        if state.ending or not _executed(process, state):
            return
        read_ns = _now()
        details, later = procfs.look(process.pid)
        if later is None or later.start_ticks != process.start_ticks or later.ending:
            return
        if not details.argv and not process.half_way:
            # The kernel clears the arguments before it sets the new ones: almost always the next look sees it whole.
            process.half_way = True
            return
        # A changed comm alone does not make an exec; where that is all we have, argv must have changed too.
        sure = process.unexecuted or process.half_way or (state.readable and process.image[2] != 0)
        if sure or details.argv != process.argv:
            facts.append(Exec(read_ns, process.pid, details, read_ns))
        process.comm, process.argv, process.image = later.comm, details.argv, later.image
        process.unexecuted = process.half_way = False

    # Ends

    def _ends(self, facts: list[Fact]) -> None:
        assert self._epoll is not None
        for fd, event in self._epoll.poll(0):
            process = self._by_fd[fd]
            process.ended_ns = process.ended_ns or self._now_ns
            status = pidfd.exit_status(fd)
            if status is None:
                status = procfs.exit_status(process.pid, process.start_ticks)
            waited = event & select.EPOLLHUP or self._now_ns - process.ended_ns >= REAP_NS
            if status is not None or waited:
                self._end(process, self._now_ns, status, facts)

    def _end(self, process: _Known, time_ns: int, status: int | None, facts: list[Fact]) -> None:
        del self._known[process.pid]
        self._ended.add(process.pid)
        self._told[process.pid] = process.start_ticks
        if process.fd >= 0:
            self._unwatch(process.fd)
        facts.append(Exit(time_ns, process.pid, status, start_ns=process.start_ticks * NS_PER_TICK))

    # Losses

    def finish(self) -> list[Fact]:
        """
        The last look, with the losses that would have been told within the next second.
        """
        return self.read(final=True)

    def _account_due(self, final: bool) -> bool:
        return final or (self._unaccounted and self._now_ns - self._accounted_ns >= _SECOND)

    def _account(self, counted: int, facts: list[Fact]) -> None:
        now = self._now_ns
        unseen = counted - self._births_at_open - self._seen - self._lost
        if unseen > 0:
            self._lost += unseen
            facts.append(Lost(now, 0, "scan", unseen, False, self._accounted_ns, now))
        self._accounted_ns = now
        self._unaccounted = False


def _tell_birth(process: _Known, state: Stat, details: Details, born_ns: int, read_ns: int, facts: list[Fact]) -> None:
    process.half_way = not (process.unexecuted or details.argv or state.kernel_thread)
    if process.unexecuted or process.half_way or state.kernel_thread:
        facts.append(Fork(born_ns, process.pid, state.ppid, state.start_ticks, details=details))
        return
    facts.append(Fork(born_ns, process.pid, state.ppid, state.start_ticks))
    facts.append(Exec(read_ns, process.pid, details, read_ns))


def _pause_ns(process: _Known, now: int) -> int:
    if process.half_way:
        return FASTEST_NS
    age = now - process.start_ticks * NS_PER_TICK
    return max(age >> 4 if process.unexecuted and age < _SECOND else age >> 2, FASTEST_NS)


def _executed(process: _Known, state: Stat) -> bool:
    """
    Whether a process has, for sure or perhaps, executed a program since it was last looked at.
    """
    if process.half_way:
        return True
    if process.unexecuted:
        return not state.flags & PF_FORKNOEXEC
    if state.readable and process.image[2]:
        return state.image != process.image
    return state.comm != process.comm


def _between(before: int, last: int, pid_max: int) -> Sequence[int] | None:
    """
    The numbers given out after `before`, up to `last`, or None where they are too many to try each.

    After the highest the kernel begins again, above RESERVED_PIDS.
    """
    if last >= before:
        fresh: Sequence[int] = range(before + 1, last + 1)
        return fresh if len(fresh) <= MAX_PROBES else None
    again = range(min(RESERVED_PIDS, last), last + 1)
    if pid_max - before + len(again) > MAX_PROBES:
        return None
    return [*range(before + 1, pid_max), *again]


def _time(fact: Fact) -> int:
    return fact.time_ns


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
