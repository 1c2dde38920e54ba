"""
The kernel's own total of births, to compare with what a source told of.
"""

from __future__ import annotations

from collections.abc import Callable

from procwatch.errors import DecodeError
from procwatch.sources import procfs

# The two numbers must be of one moment; on a host where something is born all the time, they are nearly so.
TRIES = 10


class Births:
    """
    Births since now: of the kernel's total (`processes` in /proc/stat, proc(5)), what share was told.

    The total counts every task: processes, threads and threads of the kernel.

    Args:
        told: How many tasks a source has told of being born, or has at least counted.
        born: The kernel's total since boot.
    """

    def __init__(self, told: Callable[[], int], born: Callable[[], int] = procfs.born) -> None:
        self._told = told
        self._born = born
        self._start = self._both()

    def _both(self) -> tuple[int, int] | None:
        try:
            for _ in range(TRIES):
                told = self._told()
                born = self._born()
                if self._told() == told:
                    break
        except DecodeError:  # no such file: /proc is mounted with subset=pid
            return None
        return born, told

    def shares(self) -> dict[str, float]:
        """
        As `fork`, 0 to 1; empty where the kernel does not tell.
        """
        now, start = self._both(), self._start
        return {} if now is None or start is None else {"fork": share(now[1] - start[1], now[0] - start[0])}


def share(told: int, total: int) -> float:
    """
    >>> share(3, 4), share(0, 0), share(5, 4)
    (0.75, 1.0, 1.0)
    """
    return min(told / total, 1.0) if total > 0 else 1.0
