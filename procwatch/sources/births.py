"""
The kernel's own total of births, to compare with what a source told of.
"""

from __future__ import annotations

from collections.abc import Callable

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

    def _both(self) -> tuple[int, int]:
        born = told = 0
        for _ in range(TRIES):
            told = self._told()
            born = self._born()
            if self._told() == told:
                break
        return born, told

    def share(self) -> float:
        """
        0 to 1; 1 when nothing was born.
        """
        born, told = (now - start for now, start in zip(self._both(), self._start, strict=True))
        return share(told, born)


def share(told: int, total: int) -> float:
    """
    >>> share(3, 4), share(0, 0), share(5, 4)
    (0.75, 1.0, 1.0)
    """
    return min(told / total, 1.0) if total > 0 else 1.0
