"""
The process connector: netlink messages on every fork, exec and exit (drivers/connector/cn_proc.c).

Facts about it that shaped this file, all tried on Linux 6.18:

- LISTEN is two-step. Every kernel takes 4 bytes and acknowledges them; the 8-byte form with a mask is Linux 6.6 and is
  dropped in silence before. We send 4 bytes and demand the acknowledgement, because a LISTEN from another user or pid
  namespace, or to a kernel without CONFIG_PROC_EVENTS, "succeeds" and then nothing ever comes.
- We ask for all kinds: `cn_msg.seq` counts every event of a CPU, also those that a mask keeps away, so only an unmasked
  listener can tell a gap from a filter. The rare kinds cost nothing.
- A full receive buffer gives one ENOBUFS, however many were dropped, and the socket works on. What was dropped is known
  exactly, twice: by the gaps in seq, which also say where, once the next event of that CPU arrives; and by the drop
  counter of SO_MEMINFO, which says so at once and thus finds a loss at the end of a burst.
- Closing without IGNORE leaves the kernel's listener count raised for good.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from typing import ClassVar

from procwatch.errors import DecodeError, SourceUnavailable
from procwatch.facts import Exec, Fact, Fork, Lost, Thread
from procwatch.sources.base import SourceStats, set_receive_buffer
from procwatch.sources.births import Births
from procwatch.sources.libc import Datagrams
from procwatch.wire import cn_proc
from procwatch.wire.cn_proc import Message

SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8
ACK_TIMEOUT_S = 1.0
# Of an acknowledgement before Linux 6.6. Later ones are numbered like events, and every listener gets them.
NO_CPU = 0xFFFFFFFF
# One read() hands over at most this many facts, so that a full 64 MiB buffer does not become one huge batch.
BATCH = 8192
SLOTS = 128  # taken by one system call
# How long messages gather while some processes live long enough to be found after it.
SOME_S = 0.01
# Inode numbers of the initial namespaces (include/linux/proc_ns.h).
_INITIAL = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}


class ProcConnector:
    """
    Fork, exec and exit of every process, with the kernel's stamp, from the process connector.

    Args:
        buffer_bytes: Receive buffer. Beyond net.core.rmem_max only with CAP_NET_ADMIN, else as much as is allowed.
        gather_s: How long to let messages gather, at most, when reading /proc promptly does not pay (see `delay_s`).
    """

    name: ClassVar[str] = "netlink"

    def __init__(self, *, buffer_bytes: int = 64 << 20, gather_s: float = 0.02) -> None:
        self._buffer_bytes = buffer_bytes
        self._gather_s = gather_s
        self._socket: socket.socket | None = None
        self._next_seq: dict[int, int] = {}
        self._last_ns: dict[int, int] = {}
        self._early: list[bytes] = []
        self._slots = Datagrams(cn_proc.SLOT, SLOTS)
        self._accounted = 0  # losses already told
        self._credit = 0  # of these, told by the drop counter and still to be seen as gaps
        self._drops_at_open = 0
        self._overrun = False
        self._facts = self._wakeups = self._undecoded = 0
        self._born = 0
        self._births: Births | None = None
        self._pace = Pace()
        self._offset = Offset()

    def probe(self) -> SourceUnavailable | None:
        """
        Open and close: only the acknowledgement proves that the kernel will send.
        """
        other = ProcConnector(buffer_bytes=1 << 20)
        try:
            other.open()
        except SourceUnavailable as error:
            return error
        other.close()
        return None

    def open(self) -> None:
        """
        Begin to listen.

        Raises:
            SourceUnavailable: No such protocol, a namespace that gets no events, or no permission.
        """
        try:
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            self._socket = socket.socket(socket.AF_NETLINK, kind, cn_proc.NETLINK_CONNECTOR)
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            set_receive_buffer(self._socket, self._buffer_bytes)
            self._socket.bind((0, cn_proc.CN_IDX_PROC))
            number = int.from_bytes(os.urandom(4), "little")
            self._socket.send(cn_proc.request(cn_proc.PROC_CN_MCAST_LISTEN, ack=number))
            self._await_acknowledgement(number)
        except OSError as error:
            self.close()
            raise self._unavailable(error) from error
        except SourceUnavailable:
            self.close()
            raise
        self._drops_at_open = self._drops() - self._accounted  # which is of earlier sockets too
        self._credit = 0
        self._births = Births(lambda: self._born)

    def _await_acknowledgement(self, number: int) -> None:
        """
        Wait for PROC_EVENT_NONE of our own request. While others listen, their acknowledgements and events come, even
        into a namespace that gets nothing once they are gone; so these prove nothing. Events are kept.
        """
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + ACK_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
            try:
                data = self._socket.recv(65536)
                messages = cn_proc.decode(data)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun = True  # a busy host
                continue
            except DecodeError:
                self._undecoded += 1
                continue
            self._early.append(data)
            for *_, ack in messages:
                if ack is not None and ack[0] == number:
                    if ack[1]:
                        raise OSError(ack[1], os.strerror(ack[1]))
                    return
        raise self._silent()

    def _silent(self) -> SourceUnavailable:
        for kind, initial in _INITIAL.items():
            try:
                inode = os.stat(f"/proc/self/ns/{kind}").st_ino
            except OSError:
                continue
            if inode != initial:
                return SourceUnavailable(
                    self.name,
                    f"the kernel sends process events only to the initial {kind} namespace, and this is another",
                    f"run on the host itself, or give the container the host's {kind} namespace",
                )
        return SourceUnavailable(
            self.name, "the kernel did not answer", "needs a kernel built with CONFIG_PROC_EVENTS=y"
        )

    def _unavailable(self, error: OSError) -> SourceUnavailable:
        if error.errno in (errno.EPERM, errno.EACCES):
            return SourceUnavailable(
                self.name, "needs CAP_NET_ADMIN", "run as root, or on Linux 6.6 or newer as any user"
            )
        if error.errno == errno.ECONNREFUSED:
            return SourceUnavailable(
                self.name,
                "no process connector in this network namespace",
                "run in the host's network namespace, on a kernel with CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y",
            )
        if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            return SourceUnavailable(
                self.name, "the kernel has no process connector", "needs CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y"
            )
        return SourceUnavailable(self.name, os.strerror(error.errno or 0), "")

    def fileno(self) -> int | None:
        """
        The socket.
        """
        return None if self._socket is None else self._socket.fileno()

    def delay_s(self) -> float:
        """
        0 while /proc can still be read after an event; else the gathering time, because wake-ups are the cost.
        """
        if not self._pace.too_short:
            return 0.0
        return self._gather_s if self._pace.hopeless else min(self._gather_s, SOME_S)

    def read(self) -> list[Fact]:
        """
        What the socket holds, at most BATCH messages.
        """
        if self._socket is None:
            return []
        offset = self._offset.learn()
        facts: list[Fact] = []
        for early in self._early:
            self._take(cn_proc.decode(early, offset), facts)
        self._early.clear()
        fd, slots = self._socket.fileno(), self._slots
        for _ in range(BATCH // SLOTS):
            try:
                data, lengths = slots.receive(fd)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun = True
                continue
            messages, refused = cn_proc.decode_slots(data, lengths, offset)
            self._undecoded += refused
            self._take(messages, facts)
            if len(lengths) < SLOTS:
                if self._overrun:
                    self._overrun = False
                    self._tail(facts)
                break
        if facts:
            self._wakeups += 1
            self._facts += len(facts)
            facts.sort(key=attrgetter("time_ns"))  # two CPUs stamp before they queue
            self._born += self._pace.learn(facts, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        return facts

    def _take(self, messages: list[Message], facts: list[Fact]) -> None:
        for cpu, seq, time_ns, fact, ack in messages:
            if ack is not None and cpu == NO_CPU:
                continue  # of another listener, on a kernel that does not number these
            expected = self._next_seq.get(cpu, seq)
            if seq != expected:
                self._gap(cpu, (seq - expected) & 0xFFFFFFFF, time_ns, facts)
            self._next_seq[cpu] = (seq + 1) & 0xFFFFFFFF
            self._last_ns[cpu] = time_ns
            if fact is not None:
                facts.append(fact)

    def _gap(self, cpu: int, count: int, until_ns: int, facts: list[Fact]) -> None:
        """
        Tell a gap in one CPU's numbers, less what the drop counter had told of it before.
        """
        if count > 0x7FFFFFFF:  # went backwards: two events of one CPU were queued in the other order
            return
        told = min(count, self._credit)
        self._credit -= told
        if count > told:
            self._lost(count - told, self._last_ns[cpu], until_ns, facts)

    def _tail(self, facts: list[Fact]) -> None:
        """
        After an overrun, with the socket drained: tell what was dropped and has not shown as a gap yet.
        """
        count = self._drops() - self._drops_at_open - self._accounted
        if count > 0:
            self._credit += count
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            self._lost(count, max(self._last_ns.values(), default=now), now, facts)

    def _lost(self, count: int, since_ns: int, until_ns: int, facts: list[Fact]) -> None:
        self._accounted += count
        facts.append(Lost(until_ns, 0, "netlink_socket", count, True, since_ns, until_ns))

    def _drops(self) -> int:
        """
        Messages that the socket had no room for (sk_drops); SO_MEMINFO is Linux 4.12.
        """
        assert self._socket is not None
        info = self._socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
        return int(struct.unpack_from("=9I", info)[SK_MEMINFO_DROPS])

    def coverage(self) -> dict[str, float]:
        """
        Of the births that the kernel counted, the share that was told.
        """
        return {} if self._births is None else self._births.shares()

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        return SourceStats(self._facts, self._wakeups, self._accounted, self._undecoded)

    def close(self) -> None:
        """
        Tell the kernel to stop, and close.
        """
        if self._socket is None:
            return
        closing, self._socket = self._socket, None
        with closing, suppress(OSError):
            closing.send(cn_proc.request(cn_proc.PROC_CN_MCAST_IGNORE))


class Offset:
    """
    CLOCK_BOOTTIME minus CLOCK_MONOTONIC: what is added to the kernel's stamps.

    The two clocks can only be read one after the other, and whoever is interrupted between them sees milliseconds too
    much. If that moved the stamps of one read and not of the next, an exit would be sorted before its own fork. The
    true difference changes only when the machine sleeps, so a value is kept as long as it can be true.

    Args:
        read: Gives a clock.
    """

    TRIES = 10

    def __init__(self, read: Callable[[int], int] = time.clock_gettime_ns) -> None:
        self._read = read
        self._ns: int | None = None

    def learn(self) -> int:
        """
        The difference now, ns.
        """
        least, most = self._bounds()
        if self._ns is None or not least <= self._ns <= most:
            for _ in range(self.TRIES):
                after = self._bounds()
                if after[1] - after[0] < most - least:
                    least, most = after
            self._ns = (least + most) // 2
        return self._ns

    def _bounds(self) -> tuple[int, int]:
        before = self._read(time.CLOCK_MONOTONIC)
        boot = self._read(time.CLOCK_BOOTTIME)
        return boot - self._read(time.CLOCK_MONOTONIC), boot - before


class Pace:
    """
    Whether processes live long enough for a prompt look at /proc to find them.

    A wake-up for each event costs more than all the rest, and only pays while the process is still there. From the
    kernel's own stamps we know how long the last ones lived after their exec, and from our own how long it takes from
    an exec to the end of our look at it (`reach_ns`: on a busy or slow machine many times more than on a quiet one).
    When nearly all are gone by then, it is better to let events gather. Now and then one look is prompt all the same,
    to learn whether that has changed.
    """

    LEAST_NS, MOST_NS = 150_000, 1_000_000
    RETRY = 50  # gatherings to one prompt look

    def __init__(self) -> None:
        self.reach_ns = 200_000.0
        self._execs: dict[int, Exec] = {}
        self._short = 0.0
        self._gathered = 0
        self._prompt = True

    @property
    def too_short(self) -> bool:
        """
        Whether to let events gather; asked once for each wake-up.
        """
        self._prompt = self._short <= 0.8
        if not self._prompt:
            self._gathered += 1
            self._prompt = self._gathered % self.RETRY == 0
        return not self._prompt

    @property
    def hopeless(self) -> bool:
        """
        Whether as good as nobody lives long enough to be found.
        """
        return self._short > 0.98

    def learn(self, facts: list[Fact], now_ns: int) -> int:
        """
        Look at new facts; one loop does all that must be known of each.

        Returns:
            How many tasks were born.
        """
        execs = self._execs
        births = 0
        for fact in facts:
            if type(fact) is Exec:
                execs[fact.pid] = fact
            elif type(fact) is Fork:
                births += 1
            elif type(fact) is Thread:
                if fact.born:
                    births += 1
                elif (begun := execs.pop(fact.pid, None)) is not None:
                    if self._prompt:
                        took_ns = (begun.read_ns or now_ns) - begun.time_ns
                        reach_ns = min(max(took_ns, self.LEAST_NS), self.MOST_NS)
                        self.reach_ns += (reach_ns - self.reach_ns) / 16
                    self._short += ((fact.time_ns - begun.time_ns < self.reach_ns) - self._short) / 32
        if len(execs) > 4096:  # the living are of no interest for long
            execs.clear()
        return births
