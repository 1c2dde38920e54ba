"""
Watch beside an asyncio application that keeps its loop busy.

    python examples/beside_busy_app.py [TICKS]

While the application computes, events wait in the kernel's buffer, nothing is lost as long as that has room. A consumer
that is too slow has a queue of its own and loses only its own events: it gets a `lost` event in their place, the other
consumers do not notice.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import Counter

import procwatch


async def application(ticks: int) -> None:
    """
    Work that blocks the loop for some milliseconds at a time.
    """
    for _ in range(ticks):
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 20_000)
        await asyncio.sleep(0)


async def count(subscription: procwatch.Subscription, seen: Counter[str]) -> None:
    async for event in subscription:
        seen[event.event] += 1


async def slow(subscription: procwatch.Subscription) -> int:
    """
    Writes each event somewhere slow, and counts what it could not take.
    """
    missed = 0
    async for event in subscription:
        if event.event == "lost" and event.where == "consumer":
            missed += event.count
        await asyncio.sleep(0.01)
    return missed


async def main(ticks: int) -> None:
    seen: Counter[str] = Counter()
    async with procwatch.Watcher(buffer="64MiB") as watcher, asyncio.TaskGroup() as tasks:
        print("watching by", watcher.ready.backend)
        tasks.create_task(count(watcher.subscribe(), seen))
        behind = tasks.create_task(slow(watcher.subscribe(queue=16)))
        await application(ticks)
        watcher.stop()
    print(f"seen {dict(seen)}; the slow one missed {behind.result()}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 1000))
