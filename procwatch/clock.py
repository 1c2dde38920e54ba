"""
From the kernel's clock to wall-clock text.

Facts carry CLOCK_BOOTTIME, which runs on through suspend and is never set. Events carry RFC 3339 in UTC.
"""

from __future__ import annotations

import time


class Clock:
    """
    Writes CLOCK_BOOTTIME stamps as RFC 3339, UTC, nine digits.

    The distance between the two clocks is measured once, so that times stay in order when the wall clock is set.
    """

    def __init__(self, offset_ns: int | None = None) -> None:
        if offset_ns is None:
            offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.offset_ns = offset_ns
        self._second = -1
        self._text = ""

    def stamp(self, boottime_ns: int) -> str:
        """
        >>> Clock(offset_ns=0).stamp(1_500_000_000)
        '1970-01-01T00:00:01.500000000Z'
        """
        second, ns = divmod(boottime_ns + self.offset_ns, 1_000_000_000)
        if second != self._second:  # formatting the date anew for each event costs more than building the event
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._text}{ns:09d}Z"

    @staticmethod
    def now_ns() -> int:
        """
        CLOCK_BOOTTIME now.
        """
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
