"""
Taskstats: one fact for each process, whatever the kernel's version tells of its threads.
"""

from __future__ import annotations

from procwatch.facts import Accounted
from procwatch.sources import taskstats
from procwatch.sources.taskstats import Taskstats
from procwatch.wire.taskstats import Record


def record(tid: int, pid: int, last: bool | None, *, version: int = 16, user: int = 1000, group: int = 0) -> Record:
    return Record(tid, pid, last, version, 0, "x", 0, 0, 1, 5, user, 10, 100 + tid, 1, 2, 0, 0, group, group)


def accounted(source: Taskstats, *records: Record) -> list[Accounted]:
    return [source.account(one, 1_000_000) for one in records if source.is_end(one)]


class TestThreads:
    def test_are_summed(self) -> None:
        """
        Threads that ended before count to their process: times and bytes added up, memory the largest.
        """
        (fact,) = accounted(Taskstats(), record(71, 70, False), record(72, 70, False), record(70, 70, True))

        assert (fact.pid, fact.usage.cpu_user_ns, fact.usage.cpu_system_ns) == (70, 3_000_000, 30_000)
        assert (fact.usage.io_read_bytes, fact.usage.max_rss_bytes) == (3, 172 * 1024)

    def test_those_before_we_listened_are_in_the_kernels_sum(self) -> None:
        """
        Where the kernel's sum is larger than what was heard, it counts.
        """
        (fact,) = accounted(Taskstats(), record(70, 70, True, group=9000))

        assert (fact.usage.cpu_user_ns, fact.usage.cpu_system_ns) == (9_000_000, 9_000_000)

    def test_pid_is_free_again(self) -> None:
        """
        The next process of the same number begins with nothing.
        """
        first, second = accounted(
            Taskstats(), record(71, 70, False), record(70, 70, True), record(70, 70, True, user=4000)
        )

        assert (first.usage.cpu_user_ns, second.usage.cpu_user_ns) == (2_000_000, 4_000_000)

    def test_memory_is_bounded(self) -> None:
        """
        Of more processes than are remembered, the one whose last thread ended longest ago is forgotten.
        """
        source = Taskstats()
        for pid in range(taskstats.GROUPS + 1):
            assert not source.is_end(record(1, pid, False))
        (oldest, next_one) = accounted(source, record(0, 0, True), record(1, 1, True))

        assert (oldest.usage.cpu_user_ns, next_one.usage.cpu_user_ns) == (1_000_000, 2_000_000)


class TestOldKernels:
    def test_single_thread(self) -> None:
        """
        Before version 12 a record on its own is that of a process, or of a thread that nobody will look for.
        """
        (fact,) = accounted(Taskstats(), record(70, 70, None, version=8))

        assert (fact.usage.cpu_user_ns, fact.status) == (1_000_000, None)

    def test_several_threads(self) -> None:
        """
        Their times cannot be added up, so they are not told, unless the kernel did.
        """
        (unknown, known) = accounted(
            Taskstats(), record(72, 70, True, version=8), record(72, 70, True, version=9, group=5000)
        )

        assert unknown.usage.cpu_user_ns is None
        assert known.usage.cpu_user_ns == 5_000_000
