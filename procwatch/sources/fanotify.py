"""
fanotify, notifying: the kernel queues an event for each file that is opened to be executed (FAN_OPEN_EXEC, Linux 5.0).

Facts about it that shaped this file and table/opens.py, tried on Linux 6.18:

- An event is an open descriptor, so the full path is there, however short the process lived: 100 % of 150 µs processes.
- It carries no time. The opens of an exec are queued before netlink tells of the exec: whoever drains netlink first and
  this second has them all.
- A queued event swallows a later one of the same file by the same process. Of `sh -c "exec sh -c true"` only one open
  of sh is told, and one of ld.so for all three programs.
- The process is told by its thread group, also when another thread executes, and also when it is dead when we read.
  So FAN_REPORT_PIDFD would bring a second descriptor and 3 µs for each event, and no news: it is not asked for.
- Queued events keep their file and its mount busy, so they must not lie there. They come with a netlink event that
  causes a read; failed execs are the exception, and for them the thread of `marks` makes `fileno()` readable after a
  second.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from procwatch.errors import DecodeError, SourceUnavailable
from procwatch.facts import Fact, Lost
from procwatch.sources import libc
from procwatch.sources.base import SourceStats
from procwatch.sources.files import Files
from procwatch.sources.marks import Marks
from procwatch.wire import fanotify

# Events in one read(2): each brings a descriptor, and all are open at once.
EVENTS = 2048
# Reads in one go, when each was full.
READS = 64
# What reading says of a descriptor that is no fanotify group (any more).
_BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTCONN, errno.EISDIR)
EVENT_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_LARGEFILE", 0)


class Fanotify:
    """
    The path of each file that is executed.

    It is drained with the lead source's wake-ups; its own descriptor only speaks up when nobody has come for a second.
    `limits` names the filesystems that it cannot hear.

    Args:
        alone: Be woken by the opens themselves.
        unlimited: Let the kernel queue as many events as come (100 bytes each), not fs.fanotify.max_queued_events.
    """

    name: ClassVar[str] = "fanotify"

    def __init__(self, *, alone: bool = False, unlimited: bool = True) -> None:
        self._alone = alone
        self._unlimited = unlimited
        self._group: int | None = None
        self._idle = -1  # eventfd: readable when events have lain for a second
        self._read_ns = 0
        self._bytes = fanotify.EVENT_BYTES * EVENTS
        self._pid = 0
        self._links = -1
        self._files = Files()
        self._marks: Marks | None = None
        self._facts = self._wakeups = self._lost = self._undecoded = 0

    def probe(self) -> SourceUnavailable | None:
        """
        Make a group and mark the root filesystem.
        """
        try:
            group = libc.fanotify_init(libc.FAN_CLOEXEC | libc.FAN_CLASS_NOTIF, EVENT_FLAGS)
        except OSError as error:
            return unavailable(self.name, error)
        try:
            libc.fanotify_mark(group, libc.FAN_MARK_ADD | libc.FAN_MARK_FILESYSTEM, fanotify.FAN_OPEN_EXEC, "/")
        except OSError as error:
            return unavailable(self.name, error)
        finally:
            os.close(group)
        return None

    def open(self) -> None:
        """
        Begin to listen on every filesystem.

        Raises:
            SourceUnavailable: No fanotify, too old a kernel, or no permission.
        """
        flags = libc.FAN_CLOEXEC | libc.FAN_NONBLOCK | libc.FAN_CLASS_NOTIF | libc.FAN_UNLIMITED_MARKS
        flags |= libc.FAN_UNLIMITED_QUEUE if self._unlimited else 0
        try:
            self._group = libc.fanotify_init(flags, EVENT_FLAGS)
        except OSError as error:
            raise unavailable(self.name, error) from error
        self._idle = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._marks = Marks(self._group, fanotify.FAN_OPEN_EXEC, self._rouse)
        self._links = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = Files(self._links)
        self._pid = os.getpid()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._bytes = fanotify.EVENT_BYTES * max(16, min(EVENTS, limit // 4))
        try:
            self._marks.open()
        except OSError as error:
            self.close()
            raise unavailable(self.name, error) from error

    @property
    def limits(self) -> list[str]:
        """
        What programs it does not see.
        """
        return self._marks.limits if self._marks is not None else []

    def seen(self, pid: int, namespace: int) -> None:
        """
        A process was seen in a mount namespace (an inode number): listen on its filesystems too, if it is a new one.
        """
        if self._marks is not None:
            self._marks.seen(pid, namespace)

    def fileno(self) -> int | None:
        """
        The group when alone; else what becomes readable when events have lain for a second.
        """
        return self._group if self._alone else self._idle

    def descriptors(self) -> list[int]:
        """
        The group, what wakes, and where paths are read.
        """
        return [] if self._group is None else [self._group, self._idle, self._links]

    def delay_s(self) -> float:
        """
        Alone: let opens gather, wake-ups are the cost.
        """
        return 0.01 if self._alone else 0.0

    def read(self) -> list[Fact]:
        """
        The opens in the kernel's queue.

        One read(2) only, unless it was full: more events come in while these are described, of execs that netlink was
        not asked for yet.
        """
        group = self._group
        if group is None:
            return []
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._calm(now)
        facts: list[Fact] = []
        for _ in range(READS):
            try:
                data = os.read(group, self._bytes)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _BROKEN:
                    raise
                # The first file could not be opened for us (a stale handle, no descriptor left): dropped
                self._lose(now, facts)
                continue
            self._take(data, now, facts)
            if len(data) < self._bytes:
                break
        if facts:
            self._wakeups += 1
            self._facts += len(facts)
            self._files.next_batch()
        return facts

    def _take(self, data: bytes, now: int, facts: list[Fact]) -> None:
        events: Sequence[tuple[int, int, int]] | None
        try:
            events = fanotify.decode_usual(data) or fanotify.decode(data)
        except DecodeError:
            self._undecoded += 1
            return
        describe, close = self._files.describe, os.close
        own, put = self._pid, facts.append
        for mask, fd, pid in events:
            if fd < 0:
                if mask & fanotify.FAN_Q_OVERFLOW:
                    self._lose(now, facts)
                continue
            try:
                if pid > 0 and pid != own:  # 0: of a pid namespace that we cannot see into
                    put(describe(fd, pid, now))
            finally:
                close(fd)

    def _lose(self, now: int, facts: list[Fact]) -> None:
        """
        The kernel tells that events were dropped, not how many.
        """
        self._lost += 1
        if facts and isinstance(facts[-1], Lost):
            facts[-1].count += 1
            return
        facts.append(Lost(now, 0, "fanotify_queue", 1, False, self._read_ns, now))

    def _calm(self, now: int) -> None:
        self._read_ns = now
        try:
            os.eventfd_read(self._idle)
        except BlockingIOError:
            pass

    def _rouse(self) -> None:
        """
        Ask for a read when events lie and nobody came (called by the thread of `marks`).
        """
        group = self._group
        if group is None or time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._read_ns < 1_000_000_000:
            return
        poll = select.poll()
        poll.register(group, select.POLLIN)
        if poll.poll(0):
            os.eventfd_write(self._idle, 1)

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        return SourceStats(self._facts, self._wakeups, self._lost, self._undecoded)

    def close(self) -> None:
        """
        Stop listening.
        """
        if self._group is None:
            return
        group, self._group = self._group, None
        if self._marks is not None:
            self._marks.close()
        for fd in (group, self._idle, self._links):
            with suppress(OSError):  # closed by somebody else
                os.close(fd)


def unavailable(name: str, error: OSError) -> SourceUnavailable:
    """
    Why fanotify cannot work here.
    """
    if error.errno in (errno.EPERM, errno.EACCES):
        return SourceUnavailable(name, "needs CAP_SYS_ADMIN in the initial user namespace", "run as root on the host")
    if error.errno == errno.ENOSYS:
        return SourceUnavailable(name, "the kernel has no fanotify", "needs a kernel with CONFIG_FANOTIFY=y")
    if error.errno == errno.EINVAL:
        return SourceUnavailable(name, "the kernel is too old or lacks a part of fanotify", "needs Linux 5.0 or newer")
    if error.errno == errno.EMFILE:
        return SourceUnavailable(
            name, "too many fanotify groups", "raise the sysctl fs.fanotify.max_user_groups, or the limit of open files"
        )
    return SourceUnavailable(name, os.strerror(error.errno or 0))
