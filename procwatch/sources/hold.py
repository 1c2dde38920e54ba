"""
Hold mode: fanotify permission events (FAN_OPEN_EXEC_PERM, Linux 5.0). Each exec waits until its arguments, directory,
cgroup and ids have been read, and is then allowed, always. What it costs and risks: docs/hold.md.

The work is done by processes of their own (`holder`); this end receives their facts.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from typing import Any, ClassVar

from procwatch.errors import SourceUnavailable
from procwatch.facts import Fact, Lost
from procwatch.sources import holder, libc
from procwatch.sources.base import SourceStats
from procwatch.sources.fanotify import Fanotify, unavailable
from procwatch.wire import execve

BUFFER_BYTES = 16 << 20
# Larger than any message: an argv of 128 KiB, of which each byte may become six, and four paths.
MESSAGE_BYTES = 1 << 20
START_S = 30.0  # a busy host takes its time to import; a holder that dies is known at once
BATCH = 8192
OLDEST = (5, 7)
SO_SNDBUFFORCE = 32


class Hold:
    """
    The path of each file that is executed, and what its process was about to do with it.

    If the holder is lost, by the watchdog's hand or otherwise, one `Lost` says so, and fanotify's notifications go on
    in its place: paths only.

    Args:
        alone: Be woken by the facts themselves; else it is drained with the lead source.
        deadline_s: After so long an exec goes on, whatever has been read.
        only: Hold only execs of files on the filesystem of this path.
    """

    name: ClassVar[str] = "hold"

    def __init__(self, *, alone: bool = False, deadline_s: float = 0.05, only: str = "") -> None:
        self._alone = alone
        self._deadline_s = deadline_s
        self._only = only
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._limits: list[str] = []
        self._instead: Fanotify | None = None
        self._buffer = memoryview(bytearray(MESSAGE_BYTES))
        self._facts = self._wakeups = self._lost = self._undecoded = 0

    def probe(self) -> SourceUnavailable | None:
        """
        Make a group for permission events; no mark, so that nothing is held.
        """
        if os.uname().machine not in execve.CALLS:
            return SourceUnavailable(self.name, f"not made for {os.uname().machine}", "use the other sources")
        release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
        if release < OLDEST:
            return SourceUnavailable(self.name, "arguments cannot be read during an exec", "needs Linux 5.7 or newer")
        try:
            group = libc.fanotify_init(holder.GROUP_FLAGS, holder.EVENT_FLAGS)
        except OSError as error:
            if error.errno == errno.EINVAL:
                remedy = "needs a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS=y"
                return SourceUnavailable(self.name, "the kernel has no permission events", remedy)
            return unavailable(self.name, error)
        os.close(group)
        return None

    def open(self) -> None:
        """
        Start the holder, and wait until it holds.

        Raises:
            SourceUnavailable: No permission events, too old a kernel, or no permission.
        """
        problem = self.probe()
        if problem is not None:
            raise problem
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
            command = [sys.executable, "-m", holder.__name__, str(theirs.fileno()), str(self._deadline_s), self._only]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        ours.setblocking(False)
        try:
            self._limits = self._await_ready()
        except SourceUnavailable:
            self.close()
            raise

    def _await_ready(self) -> list[str]:
        """
        Wait for the first message that is no fact; what was held before is not of interest yet.

        Returns:
            What could not be marked.
        """
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        end = time.monotonic() + START_S
        while (left := end - time.monotonic()) > 0 and poll.poll(left * 1000):
            match self._receive():
                case (holder.READY, list(limits)):
                    return limits
                case (holder.FAILED, int(number)):
                    raise unavailable(self.name, OSError(number, ""))
                case None:
                    break
        raise SourceUnavailable(self.name, "the holder process did not start", "see its message on stderr")

    def _receive(self) -> Fact | tuple[str, Any] | None:
        """
        One message; None at the end. Raises BlockingIOError when there is none now.
        """
        assert self._socket is not None
        try:
            count = self._socket.recv_into(self._buffer)
        except ConnectionResetError:
            return None
        return holder.unpack(bytes(self._buffer[:count])) if count else None

    @property
    def limits(self) -> list[str]:
        """
        What programs it does not see.
        """
        return self._instead.limits if self._instead is not None else self._limits

    def seen(self, pid: int, namespace: int) -> None:
        """
        A process was seen in a mount namespace (an inode number): hold there too, if it is a new one.
        """
        if self._instead is not None:
            self._instead.seen(pid, namespace)
        elif self._socket is not None:
            try:
                self._socket.send(json.dumps((pid, namespace)).encode())
            except OSError:
                pass

    def fileno(self) -> int | None:
        """
        The socket when alone; else None: the exec that netlink tells of is reason enough to read.
        """
        if self._instead is not None:
            return self._instead.fileno()
        return self._socket.fileno() if self._alone and self._socket is not None else None

    def delay_s(self) -> float:
        """
        Alone: let facts gather, wake-ups are the cost.
        """
        return 0.01 if self._alone else 1.0

    def read(self) -> list[Fact]:
        """
        What the holder told.
        """
        if self._instead is not None:
            return self._instead.read()
        facts: list[Fact] = []
        if self._socket is None:
            return facts
        for _ in range(BATCH):
            try:
                message = self._receive()
            except BlockingIOError:
                break
            if message is None:
                self._go_on_without(facts)
                break
            if isinstance(message, Fact):
                facts.append(message)
                if isinstance(message, Lost):
                    self._lost += message.count
        if facts:
            self._wakeups += 1
            self._facts += len(facts)
        return facts

    def _go_on_without(self, facts: list[Fact]) -> None:
        """
        The holder is gone, and with it the waiting.
        """
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        facts.append(Lost(now, 0, "hold", 1, False, now, now))
        self._lost += 1
        self.close()
        instead = Fanotify(alone=self._alone)
        try:
            instead.open()
        except SourceUnavailable as error:
            self._limits = [f"everything: the holder ended, and {error}"]
        else:
            self._instead = instead

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        more = self._instead.stats() if self._instead is not None else SourceStats()
        return SourceStats(
            self._facts + more.facts,
            self._wakeups + more.wakeups,
            self._lost + more.lost,
            self._undecoded + more.undecoded,
        )

    def close(self) -> None:
        """
        Let the holder go, and with it all that waits.
        """
        if self._instead is not None:
            self._instead.close()
        if self._socket is not None:
            self._socket.close()  # the holder's sign to leave
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
