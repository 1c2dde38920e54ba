"""
Times of events: of the kernel's clock that nobody sets, in the order in which things happened.
"""

from __future__ import annotations

import time

import pytest

from procwatch.clock import Clock

HOUR_NS = 3_600_000_000_000


@pytest.mark.parametrize("jump_ns", [-HOUR_NS, HOUR_NS])
def test_a_wall_clock_that_is_set_moves_nothing(jump_ns: int, monkeypatch: pytest.MonkeyPatch):
    """
    Set back or forward by an hour in the middle of a run: what happens a millisecond later is a millisecond later.
    """
    clock = Clock()
    now = clock.now_ns()
    before = clock.stamp(now)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + jump_ns)
    stamps = [clock.stamp(now + after) for after in range(0, 3_000_000_000, 1_000_000)]
    assert stamps[0] == before
    assert stamps == sorted(stamps)
    assert Clock().offset_ns - clock.offset_ns == pytest.approx(jump_ns, abs=1_000_000_000)


def test_times_go_on_through_suspend():
    """
    The kernel counts the hours of sleep in CLOCK_BOOTTIME, so the times after it are the wall clock's.
    """
    clock = Clock(offset_ns=1_700_000_000_000_000_000)
    assert clock.stamp(5) == "2023-11-14T22:13:20.000000005Z"
    assert clock.stamp(5 + HOUR_NS) == "2023-11-14T23:13:20.000000005Z"
