"""
taskstats: the kernel's account of every task that ends (Documentation/accounting/taskstats.rst).

Facts about it that shaped this file, tried on Linux 6.18, the older ones from the kernel's source:

- The account is queued before netlink tells of the exit: whoever drains netlink first and this second has them all.
- There is one record for each thread. A process is over with the record that has AGROUP (version 12, Linux 5.19); its
  exit code is then the one that wait(2) gives, also when the first thread had ended long before. Older kernels mark
  only the last of several threads, and do not say which process a thread was of: of those, a record of an unknown
  number may come, which the table does not find, and the CPU time of a process with threads is left out.
- The kernel's sum over the threads had no user and system time for long, so they are summed here.
- hiwater_rss is of the memory that the last program had, unlike ru_maxrss of wait4(2), which counts what the parent had
  when it forked.
- CPU times are those of wait4(2) before scaling: they advance by the clock tick, and may differ by one.
- The device is encoded as st_dev is; of an overlay or btrfs it is the superblock's, where stat(2) shows another.
- Only the initial user, pid and network namespaces can listen.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import ClassVar

from procwatch.errors import DecodeError, SourceUnavailable
from procwatch.facts import Accounted, Fact, Lost, Usage
from procwatch.sources.base import SourceStats, set_receive_buffer
from procwatch.sources.libc import Datagrams, memory_device
from procwatch.wire import taskstats
from procwatch.wire.taskstats import Record

NETLINK_GENERIC = 16
GENL_ID_CTRL = 16
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8
ACK_TIMEOUT_S = 1.0
BATCH = 8192
SLOTS = 32  # taken by one system call
# Processes some of whose threads have ended, and whose times are summed.
GROUPS = 8192


class Taskstats:
    """
    What each process had used when it ended, and the device and inode of what it ran.

    Args:
        alone: Be woken by the records themselves; else it is drained with the lead source.
        buffer_bytes: Receive buffer; a record takes about 1.3 KB of it.
    """

    name: ClassVar[str] = "taskstats"

    def __init__(self, *, alone: bool = False, buffer_bytes: int = 32 << 20) -> None:
        self._alone = alone
        self._buffer_bytes = buffer_bytes
        self._socket: socket.socket | None = None
        self._slots = Datagrams(taskstats.SLOT, SLOTS)
        self._groups: dict[int, Record] = {}
        self._memory_dev = memory_device()
        self._told = 0  # losses
        self._told_before = 0  # of these, of earlier sockets
        self._read_ns = 0
        self._facts = self._wakeups = self._undecoded = 0

    def probe(self) -> SourceUnavailable | None:
        """
        Register and close.
        """
        other = Taskstats(buffer_bytes=4096)
        try:
            other.open()
        except SourceUnavailable as error:
            return error
        other.close()
        return None

    def open(self) -> None:
        """
        Register for the ends of tasks on all CPUs, also those that are plugged in later.

        Raises:
            SourceUnavailable: No such family, another namespace, or no permission.
        """
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._told_before = self._told
        try:
            self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_GENERIC)
            self._socket.settimeout(ACK_TIMEOUT_S)
            self._socket.bind((0, 0))
            self._register(self._find_family())
            set_receive_buffer(self._socket, self._buffer_bytes)
        except (OSError, DecodeError) as error:
            self.close()
            raise self._unavailable(error) from error
        self._socket.setblocking(False)

    def _find_family(self) -> int:
        # pyroute2 takes 0.2 s to import, and is used for these two messages only; its decoding takes 9 µs a message.
        from pyroute2.netlink.generic import CTRL_CMD_GETFAMILY, ctrlmsg

        message = ctrlmsg()
        message["cmd"], message["version"] = CTRL_CMD_GETFAMILY, 1
        message["attrs"] = [("CTRL_ATTR_FAMILY_NAME", "TASKSTATS")]
        answer = self._ask(message, GENL_ID_CTRL)
        family = ctrlmsg(answer)
        family.decode()
        return int(family.get_attr("CTRL_ATTR_FAMILY_ID"))

    def _register(self, family: int) -> None:
        """
        All possible CPUs; some kernels took only those that are there.
        """
        from pyroute2.netlink.taskstats import TASKSTATS_CMD_GET, tcmd

        for mask in ("possible", "present", "online"):
            message = tcmd()
            message["cmd"], message["version"] = TASKSTATS_CMD_GET, 1
            message["attrs"] = [("TASKSTATS_CMD_ATTR_REGISTER_CPUMASK", _cpus(mask))]
            try:
                self._ask(message, family)
            except OSError as error:
                if error.errno != errno.EINVAL or mask == "online":
                    raise
            else:
                return

    def _ask(self, message: object, kind: int) -> bytes:
        """
        Send a request and wait for its acknowledgement.

        Returns:
            What came before that: the answer, if it has one.
        """
        from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, nlmsg

        assert self._socket is not None
        assert isinstance(message, nlmsg)
        message["header"]["type"] = kind
        message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
        message.encode()
        self._socket.send(message.data)
        answer = b""
        while True:
            data = self._socket.recv(65536)
            code = taskstats.errors(data)
            if code:
                raise OSError(code, os.strerror(code))
            if code == 0:
                return answer
            answer = answer or data  # later ones are records already, of ends while we register

    def _unavailable(self, error: Exception) -> SourceUnavailable:
        number = error.errno if isinstance(error, OSError) else 0
        if number in (errno.EPERM, errno.EACCES):
            return SourceUnavailable(self.name, "needs CAP_NET_ADMIN", "run as root")
        if number == errno.ENOENT:
            return SourceUnavailable(
                self.name,
                "no such family in this network namespace",
                "run in the host's network namespace, on a kernel with CONFIG_TASKSTATS=y",
            )
        if number == errno.EINVAL:
            return SourceUnavailable(
                self.name,
                "only the initial user and pid namespaces can listen",
                "run on the host itself, or give the container the host's pid namespace",
            )
        return SourceUnavailable(self.name, os.strerror(number) if number else str(error) or type(error).__name__)

    def fileno(self) -> int | None:
        """
        The socket when alone; else None: an exit that netlink tells of is reason enough to read.
        """
        return self._socket.fileno() if self._alone and self._socket is not None else None

    def descriptors(self) -> list[int]:
        """
        The socket.
        """
        return [] if self._socket is None else [self._socket.fileno()]

    def delay_s(self) -> float:
        """
        Alone: let records gather, wake-ups are the cost.
        """
        return 0.01 if self._alone else 1.0

    def read(self) -> list[Fact]:
        """
        The processes that ended, one fact for each.
        """
        if self._socket is None:
            return []
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        facts: list[Fact] = []
        fd, slots = self._socket.fileno(), self._slots
        overrun = False
        for _ in range(BATCH // SLOTS):
            try:
                data, lengths = slots.receive(fd)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                overrun = True
                continue
            records, refused = taskstats.decode_slots(data, lengths)
            self._undecoded += refused
            facts += [
                self.account(record, now) for record in records if record.last is not False or self.is_end(record)
            ]
            if len(lengths) < SLOTS:
                break
        if overrun:
            self._lose(now, facts)
        self._read_ns = now
        if facts:
            self._wakeups += 1
            self._facts += len(facts)
        return facts

    def is_end(self, record: Record) -> bool:
        """
        Whether a process is over; if only a thread of it is, its usage is kept for then.
        """
        if record.last is not False:
            return True
        before = self._groups.pop(record.pid, None)
        if before is not None:
            _add(record, before)
        elif len(self._groups) >= GROUPS:  # the one whose last thread ended longest ago
            del self._groups[next(iter(self._groups))]
        self._groups[record.pid] = record
        return False

    def account(self, record: Record, now: int) -> Accounted:
        """
        The fact for a process that is over.
        """
        if self._groups and (before := self._groups.pop(record.pid, None)) is not None:
            _add(record, before)
        # What ended before we listened is in the kernel's sum only.
        user = max(record.user_us, record.group_user_us) * 1000
        system = max(record.system_us, record.group_system_us) * 1000
        # Before version 12 `pid` is the number of the last thread's group, and the other threads' times are unknown.
        several = record.version < taskstats.WITH_EXE and record.last is True
        known = not several or bool(record.group_user_us or record.group_system_us)
        elapsed = record.elapsed_us * 1000
        return Accounted(
            now,
            record.pid,
            Usage(
                user if known else None,
                system if known else None,
                record.max_rss_kib * 1024 or None,
                record.read_bytes,
                record.write_bytes,
            ),
            record.ppid,
            record.uid,
            record.gid,
            record.comm,
            record.exe_dev or None,
            record.exe_inode or None,
            record.status if record.version >= taskstats.WITH_EXE else None,
            now - elapsed,
            elapsed,
            record.exe_dev == self._memory_dev,
        )

    def _lose(self, now: int, facts: list[Fact]) -> None:
        """
        Tell what the socket had no room for: its drop counter is exact (SO_MEMINFO, Linux 4.12).
        """
        assert self._socket is not None
        info = self._socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
        count = struct.unpack_from("=9I", info)[SK_MEMINFO_DROPS] + self._told_before - self._told
        if count > 0:
            self._told += count
            facts.append(Lost(now, 0, "taskstats_socket", count, True, self._read_ns, now))

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        return SourceStats(self._facts, self._wakeups, self._told, self._undecoded)

    def close(self) -> None:
        """
        Close; the kernel forgets a listener that is gone.
        """
        if self._socket is not None:
            closing, self._socket = self._socket, None
            self._groups.clear()
            closing.close()


def _add(record: Record, before: Record) -> None:
    record.user_us += before.user_us
    record.system_us += before.system_us
    record.read_bytes += before.read_bytes
    record.write_bytes += before.write_bytes
    record.max_rss_kib = max(record.max_rss_kib, before.max_rss_kib)


def _cpus(name: str) -> str:
    with open(f"/sys/devices/system/cpu/{name}") as file:
        return file.read().strip()
