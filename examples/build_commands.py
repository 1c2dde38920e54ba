"""
Which programs does this build really run, how often, and how long do they live?

    python examples/build_commands.py make -j4

Runs the command, watches it and all its descendants, and prints a table when it has ended. A process belongs to the
build when its parent does; ids and not pids are compared, because a pid may be used again within one build.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict

import procwatch
from procwatch.events import Exec, Fork


def belongs(event: Exec | Fork, pid: int, family: set[str]) -> bool:
    """
    Whether this is the build itself, or a child of one of its processes.
    """
    return event.pid == pid or (event.parent is not None and event.parent.id in family)


async def main(command: list[str]) -> int:
    lived: dict[str, list[int]] = defaultdict(list)
    family: set[str] = set()
    lost = 0
    async with procwatch.Watcher(events=["exec", "fork", "exit"]) as watcher:
        build = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        ended = asyncio.create_task(build.wait())
        ended.add_done_callback(lambda _: watcher.stop())  # takes what the kernel has queued, then ends the loop below
        async for event in watcher:
            if event.event == "lost":
                lost += event.count
            elif event.event == "exit" and event.id in family:
                lived[event.exe or f"<{event.missing['exe']}>"].append(event.duration_ns or 0)
            elif event.event in ("exec", "fork") and belongs(event, build.pid, family):
                family.add(event.id)

    print(f"{'times':>5} {'total':>9} {'longest':>9}  program")
    for exe, each in sorted(lived.items(), key=lambda item: -sum(item[1])):
        print(f"{len(each):>5} {sum(each) / 1e6:>6.1f} ms {max(each) / 1e6:>6.1f} ms  {exe}")
    if lost:
        print(f"{lost} events were lost, so this may be short of some")
    return await ended


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
