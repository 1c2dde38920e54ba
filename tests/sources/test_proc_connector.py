"""
ProcConnector: the kernel's stamps, in one order however the reader is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from procwatch.sources.proc_connector import Offset

SLEPT = 5_000_000_000


def clocks(delays: Iterable[int], slept: int = 0) -> Iterator[int]:
    """
    CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC and so on, with so many nanoseconds before each reading.
    """
    now = 1_000_000_000
    for number, delay in enumerate(delays):
        now += delay
        yield now + slept if number % 3 == 1 else now


def offset_of(*readings: Iterator[int]) -> Offset:
    stream = iter([value for one in readings for value in one])

    def read(clock: int) -> int:
        assert clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
        return next(stream)

    return Offset(read)


class TestOffset:
    def test_an_interruption_between_two_readings_does_not_move_the_stamps(self) -> None:
        """
        Else an exit that was read at that moment would be told before its own fork.
        """
        quiet = clocks([50] * 3 * (1 + Offset.TRIES))
        offset = offset_of(quiet, clocks([50, 50, 8_000_000]), clocks([50, 8_000_000, 50]))

        assert [offset.learn() for _ in range(3)] == [0, 0, 0]

    def test_the_first_is_the_best_of_several(self) -> None:
        """
        Also where the reader is interrupted at the very start.
        """
        first = clocks([50, 8_000_000, 50])
        offset = offset_of(first, clocks([50] * 3 * Offset.TRIES))

        assert offset.learn() == 0

    def test_sleep_of_the_machine_moves_them(self) -> None:
        """
        CLOCK_MONOTONIC stands still then, and CLOCK_BOOTTIME does not.
        """
        count = 1 + Offset.TRIES
        offset = offset_of(clocks([50] * 3 * count), clocks([50] * 3 * count, SLEPT))

        assert [offset.learn(), offset.learn()] == [0, SLEPT]
