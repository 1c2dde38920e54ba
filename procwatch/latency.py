"""
How long events take, counted in buckets for batches, not for each event.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

# Upper bounds, seconds. Events gather for 20 ms under load by default, and forks wait up to 100 ms for their exec.
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in BOUNDS_S)


class Latency:
    """
    A histogram. A batch is in the order of its times, so that each bucket's share of it is found by halving.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)  # the last one: longer than all bounds
        self.sum_s = 0.0

    def add(self, batch: Sequence[Any], now_ns: int, time_ns: Callable[[Any], int]) -> None:
        """
        Count a batch that has arrived.

        Args:
            batch: Not empty, in the order of time.
            now_ns: When it arrived.
            time_ns: When an item happened, by the same clock.
        """
        end = len(batch)
        # The middle stands for all: to add up each event's own would cost more than all else here.
        self.sum_s += max(now_ns - time_ns(batch[end // 2]), 0) * end / 1e9
        for bucket, bound in enumerate(_BOUNDS_NS):
            begin = bisect_left(batch, now_ns - bound, hi=end, key=time_ns)
            self.counts[bucket] += end - begin
            end = begin
            if not end:
                return
        self.counts[-1] += end
