"""
Every process of this host as it starts and ends, in ten lines.

    python examples/watch_all.py
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import procwatch


async def main() -> None:
    async for event in procwatch.watch():
        if event.event == "ready":
            print("watching by", event.backend)
        elif event.event == "exec":
            print(event.pid, event.exe or event.missing["exe"], event.argv)
        elif event.event == "exit":
            print(event.pid, "ended with", event.signal_name or event.code)
        elif event.event == "lost":
            print("lost", event.count)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
