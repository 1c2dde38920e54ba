"""
Every exec, fork and exit, complete, from programs in the kernel: the top rung of the ladder. See docs/ebpf.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
import time
from collections.abc import Callable
from importlib import resources
from operator import attrgetter
from typing import ClassVar

from procwatch.errors import ConfigError, DecodeError, SourceUnavailable
from procwatch.facts import Fact, Lost
from procwatch.sources.base import SourceStats
from procwatch.sources.births import Births, share
from procwatch.sources.ebpf import loader
from procwatch.sources.ebpf.ring import Counters, Ring
from procwatch.table.identity import NS_PER_TICK
from procwatch.wire.bpf_event import EXEC, EXIT, FORK, KINDS, TASK, Bytes, Decoder

MAX_ARGV = 8 << 20  # what the program's loop can reach; the kernel's own limit is 6 MiB, execve(2)
BATCH = 1024  # records after which the kernel gets its room back
MOST = 4 * BATCH  # records of one read(): what they become must fit into memory
# How often to ask whether the kernel skipped a program because another run of it was interrupted on that CPU. Up to
# 6.18 nothing interrupts them, so that the answer is 0; it costs a system call for each program.
LOOK_NS = 1_000_000_000

_CAPABILITIES = {38: "CAP_PERFMON", 39: "CAP_BPF"}
_CAP_SYS_ADMIN = 21
_RELEASE = (5, 17)  # relocation in the kernel, and bpf_loop()
_MEMORY_AT_EXIT = (6, 16)  # since then the tracepoint comes before the process gives its memory back
_BTF = "/sys/kernel/btf"
_LOCKDOWN = "/sys/kernel/security/lockdown"
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # include/linux/proc_ns.h

# System call numbers of execve and execveat, and where pt_regs has the number and the first two arguments when a call
# returns: arch/x86/include/asm/ptrace.h, arch/arm64/include/asm/ptrace.h.
_REGISTERS = {"x86_64": (59, 322, 120, 112, 104), "aarch64": (221, 281, 280, 272, 8)}
_SETTINGS = struct.Struct("<9I")

_BY_TIME = attrgetter("time_ns")
# Takes the records in data[begin:end], `most` of them at most, and says where to go on.
Walk = Callable[[Bytes, int, int, int], int]


class Ebpf:
    """
    Tracepoints of the scheduler, read through a ring buffer.

    Args:
        buffer_bytes: Size of the ring; rounded up to a power of two.
        gather_s: How long to let records gather after a wake-up.
        argv_limit: Bytes of arguments to read at most; `argv_truncated` beyond.
        exec_failed: Report execs that failed too: costs every system call of the host some 50 ns.
        mute_pid: A process of which nothing is said: our own. 0: none.
        forks: Report forks.
        every_fork: Not only those without which something would be told wrong: of a process that never executed
            anything and forks itself, or outlives its parent, or was put into another cgroup.
    """

    name: ClassVar[str] = "ebpf"

    def __init__(
        self,
        *,
        buffer_bytes: int = 16 << 20,
        gather_s: float = 0.02,
        argv_limit: int = 32768,
        exec_failed: bool = False,
        mute_pid: int = 0,
        forks: bool = True,
        every_fork: bool = True,
    ) -> None:
        if not 4096 <= buffer_bytes <= 1 << 30:
            raise ConfigError(f"a ring buffer of {buffer_bytes} bytes: choose 4 KiB to 1 GiB")
        if not 0 <= argv_limit <= MAX_ARGV:
            raise ConfigError(f"an argv limit of {argv_limit} bytes: choose 0 to {MAX_ARGV}")
        self._size = max(1 << (buffer_bytes - 1).bit_length(), os.sysconf("SC_PAGE_SIZE"))
        self._gather_s = gather_s
        self._argv_limit = argv_limit
        self._exec_failed = exec_failed
        self._mute_pid = mute_pid
        self._forks = forks
        self._every_fork = every_fork
        self.decoder = Decoder(peaks=_version(os.uname().release) < _MEMORY_AT_EXIT)
        self._closing = contextlib.ExitStack()
        self._ring: Ring | None = None
        self._counters: Counters | None = None
        self._ring_fd: int | None = None
        self._program_fds: dict[int, int] = {}
        self._lost: dict[int, int] = {}
        self._missed: dict[int, int] = {}
        self._look_ns = 0
        self._lost_words: list[int] = []
        self._births: Births | None = None
        self._last_ns = 0
        self._seen: dict[str, int] = {}
        self._stats = dict.fromkeys(SourceStats.__struct_fields__, 0)

    def probe(self) -> SourceUnavailable | None:
        """
        Say why this source cannot work here, or None; loads nothing.
        """
        if sys.byteorder == "big":
            return SourceUnavailable(self.name, "the programs are built for little-endian machines")
        release = os.uname().release
        if _version(release) < _RELEASE:
            return SourceUnavailable(self.name, f"kernel {release} is older than 5.17", "a newer kernel")
        if os.path.isdir("/sys/kernel") and not os.path.exists(f"{_BTF}/vmlinux"):
            reason = "the kernel does not describe its types (no /sys/kernel/btf/vmlinux)"
            return SourceUnavailable(self.name, reason, "a kernel built with CONFIG_DEBUG_INFO_BTF")
        if "[confidentiality]" in _text(_LOCKDOWN):
            reason = "kernel lockdown forbids programs to read the kernel's memory"
            return SourceUnavailable(self.name, reason, "boot without lockdown=confidentiality")
        if lacking := _lacking_capabilities():
            return SourceUnavailable(self.name, f"{' and '.join(lacking)} missing", "run as root or grant them")
        if _pid_namespace() not in (_INITIAL_PID_NAMESPACE, 0):
            reason = "it tells the host's pids, and /proc here has those of another pid namespace"
            remedy = "run on the host itself, or give the container the host's pid namespace"
            return SourceUnavailable(self.name, reason, remedy)
        try:
            os.close(loader.create_array(8))
        except loader.LoadError as error:
            return self._refused(error)
        return None

    def open(self) -> None:
        """
        Load the programs and attach them.

        Raises:
            SourceUnavailable: It cannot work here; nothing is left open. Its `__cause__` has the verifier's log.
        """
        if reason := self.probe():
            raise reason
        settings = self._settings()
        blob = loader.parse_blob(resources.files(__package__).joinpath("procwatch.bpf.bin").read_bytes())
        with contextlib.ExitStack() as stack:
            try:
                loaded = loader.load(blob, entries={"ring": self._size}, contents={"rodata": settings})
                stack.callback(loaded.close)
                ring = Ring(loaded.maps["ring"], self._size)
                stack.callback(ring.close)
                counters = Counters(loaded.maps["counters"])
                stack.callback(counters.close)
                for program, tracepoint in self._programs():
                    stack.callback(os.close, loader.attach(loaded.programs[program], tracepoint))
            except loader.LoadError as error:
                raise self._refused(error) from error
            except OSError as error:
                raise SourceUnavailable(self.name, f"the ring buffer cannot be mapped: {error.strerror}") from error
            self._ring, self._counters, self._ring_fd = ring, counters, loaded.maps["ring"]
            self._program_fds = {kind: loaded.programs[f"on_{name}"] for kind, name in KINDS.items()}
            self._lost = self._missed = dict.fromkeys(KINDS, 0)
            self._look_ns = 0
            self._last_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            self._closing = stack.pop_all()
            self._births = Births(self._born) if self._forks else None

    def _programs(self) -> list[tuple[str, str | None]]:
        """
        Which to run, and at which tracepoint where their types do not say it.
        """
        programs: list[tuple[str, str | None]] = [("on_exec", None), ("on_exit", None)]
        if self._forks:
            programs += [("on_fork", None), ("on_worker", None)]
        if self._exec_failed:
            programs.append(("on_exec_failed", "sys_exit"))
        return programs

    def _settings(self) -> bytes:
        registers = _REGISTERS.get(os.uname().machine, (0, 0, 0, 0, 0))
        if self._exec_failed and not any(registers):
            raise SourceUnavailable(self.name, f"failed execs cannot be seen on {os.uname().machine}", "leave them out")
        return _SETTINGS.pack(self._argv_limit, self._mute_pid, NS_PER_TICK, *registers, self._every_fork)

    def _refused(self, error: loader.LoadError) -> SourceUnavailable:
        if error.errno == errno.ENOSYS:
            return SourceUnavailable(self.name, "bpf(2) is not there: built out, or hidden by seccomp")
        if error.errno in (errno.EPERM, errno.EACCES) and not error.log:
            remedy = "run in the initial user namespace, with a seccomp profile that allows it"
            return SourceUnavailable(self.name, "bpf(2) is not permitted here", remedy)
        if error.errno in (errno.ENOMEM, errno.E2BIG):
            return SourceUnavailable(self.name, f"no memory for a ring of {self._size} bytes", "a smaller buffer")
        return SourceUnavailable(self.name, f"the kernel refused the programs ({error.strerror})", "report it as a bug")

    def fileno(self) -> int | None:
        """
        The ring: readable when it has records.
        """
        return self._ring_fd

    def delay_s(self) -> float:
        """
        Wake-ups are the cost, not records: let some gather.
        """
        return self._gather_s

    def read(self) -> list[Fact]:
        """
        What the ring holds, in the order of the kernel's time; then what it had no room for.

        At most `MOST` records: the ring stays readable while there are more.
        """
        facts: list[Fact] = []
        decode = self.decoder.decode
        lost = self.drain(lambda data, begin, end, most: decode(data, begin, end, facts, most))
        facts.sort(key=_BY_TIME)
        if lost is not None:
            facts.append(lost)
        self.took(len(facts))
        return facts

    def drain(self, walk: Walk) -> Lost | None:
        """
        Give what the ring holds to `walk`, some records at a time, and `MOST` of them at most.

        Returns:
            What the ring had no room for.
        """
        ring, counters = self._ring, self._counters
        assert ring is not None, "open() comes first"
        assert counters is not None
        lost = None
        for _ in range(MOST // BATCH):
            begin, end = ring.pending()
            if begin == end:
                break
            try:
                stop = walk(ring.data, begin, end, BATCH)
            except DecodeError:
                self._stats["undecoded"] += 1
                stop = end
            ring.release(stop - begin)
            if stop == begin:  # still being written: the next wake-up is for it
                break
            if stop == end:
                if lost is not None:
                    return lost
                lost = self._newly_lost(counters)
                if lost is None:  # else what had room meanwhile comes first
                    return None
        else:  # there may be more
            return lost
        return lost or self._newly_lost(counters)

    def took(self, facts: int) -> None:
        """
        Count what a drain gave.
        """
        if facts:
            self._stats["wakeups"] += 1
            self._stats["facts"] += facts

    def _newly_lost(self, counters: Counters) -> Lost | None:
        now, since = time.clock_gettime_ns(time.CLOCK_BOOTTIME), self._last_ns
        self._last_ns = now
        lost = counters.lost()
        if now < self._look_ns:
            if lost == self._lost_words:
                return None
        else:
            self._look_ns = now + LOOK_NS
            self._missed = {kind: loader.missed(fd) for kind, fd in self._program_fds.items()}
        self._lost_words = lost
        totals = {kind: lost[kind] + missed for kind, missed in self._missed.items()}
        if totals == self._lost:
            return None
        kinds = {KINDS[kind]: total - self._lost[kind] for kind, total in totals.items() if total > self._lost[kind]}
        self._lost = totals
        count = sum(kinds.values())
        self._stats["lost"] += count
        return Lost(now, 0, "ring_buffer", count, True, since, now, kinds)

    def kernel_counts(self) -> dict[str, int]:
        """
        Everything that the programs saw since they were attached, by kind, dropped or not.
        """
        if self._counters is not None:
            seen = self._counters.seen()
            self._seen = {name: seen[kind] + self._missed[kind] for kind, name in KINDS.items()}
        return self._seen

    def coverage(self) -> dict[str, float]:
        """
        Of what the programs saw, the share that was told; of forks, of what the kernel counted itself.
        """
        counters, births = self._counters, self._births
        if counters is None:
            return {}
        seen, full, total = counters.seen(), counters.lost(), self.kernel_counts()
        shares = {name: share(seen[kind] - full[kind], total[name]) for kind, name in ((EXEC, "exec"), (EXIT, "exit"))}
        return shares if births is None else births.shares() | shares

    def _born(self) -> int:
        assert self._counters is not None
        seen = self._counters.seen()
        return seen[FORK] + seen[TASK] - self._counters.lost()[FORK]

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """
        return SourceStats(**self._stats)

    def close(self) -> None:
        """
        Detach and free everything; may be called twice.
        """
        self.kernel_counts()
        self._ring = self._counters = self._ring_fd = None
        self._closing.close()


def _version(release: str) -> tuple[int, int]:
    """
    >>> _version("6.1.0-18-amd64"), _version("5.17-rc1")
    ((6, 1), (5, 17))
    """
    numbers = "".join(char if char.isdigit() else " " for char in release).split()
    return int(numbers[0]), int(numbers[1])


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no /proc: the start of the watcher says so
        return 0


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _lacking_capabilities() -> list[str]:
    status = dict(line.split(":", 1) for line in _text("/proc/self/status").splitlines() if ":" in line)
    effective = int(status.get("CapEff", "-1"), 16)  # no /proc: let the kernel say
    if effective >> _CAP_SYS_ADMIN & 1:
        return []
    return [name for bit, name in sorted(_CAPABILITIES.items(), reverse=True) if not effective >> bit & 1]
