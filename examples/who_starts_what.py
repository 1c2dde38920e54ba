"""
Find who keeps starting things: pairs of parent and program, the most frequent first. No asyncio needed.

    python examples/who_starts_what.py [SECONDS]
"""

from __future__ import annotations

import sys
from collections import Counter

import procwatch


def main(seconds: float) -> None:
    pairs: Counter[tuple[str, str]] = Counter()
    for event in procwatch.watch_sync(events=["exec"], for_s=seconds):
        if event.event == "ready":
            print(f"watching by {event.backend} for {seconds:g} s")
        elif event.event == "exec":
            parent = event.parent
            by = (parent.exe or parent.comm or "?") if parent else "?"
            pairs[by, event.exe or event.comm or f"<{event.missing['exe']}>"] += 1
    for (by, what), times in pairs.most_common(20):
        print(f"{times:>6}  {by} -> {what}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 10)
