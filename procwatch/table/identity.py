"""
Who a process is: boot id, pid and start time, the same however it was found.

The start is counted in clock ticks since boot, because that is all that /proc/PID/stat tells (field 22, proc(5)): a
live event, a scan and a restarted agent must agree. The kernel rounds start_boottime down to the tick
(nsec_to_clock_t in kernel/time/time.c), and so do we.
"""

from __future__ import annotations

import os

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
NS_PER_TICK = 1_000_000_000 // CLOCK_TICKS


def ticks(boottime_ns: int) -> int:
    """
    CLOCK_BOOTTIME nanoseconds as the clock ticks that /proc would show.
    """
    return boottime_ns // NS_PER_TICK


def process_id(boot: str, pid: int, start_ticks: int) -> str:
    """
    The `id` of an event: first 8 hex digits of the boot id, pid, start tick.

    >>> process_id("1f3c9a2b", 4711, 123456)
    '1f3c9a2b-4711-123456'
    """
    return f"{boot}-{pid}-{start_ticks}"
