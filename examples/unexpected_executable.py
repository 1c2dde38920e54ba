"""
Alert when something runs that no package put there: a file outside the usual places, one that was deleted, one that
is only in memory. Says so, too, when it cannot know.

    python examples/unexpected_executable.py
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import procwatch
from procwatch.events import Exec

USUAL = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", "/opt/")


def alarm(event: Exec) -> str | None:
    """
    What is wrong with an exec, or None.
    """
    if event.exe is None:
        return f"a program that could not be seen ({event.missing.get('exe')})"
    if event.exe_memfd:
        return "a program that is only in memory"
    if event.exe_deleted:
        return "a program whose file is deleted"
    if not event.exe.startswith(USUAL):
        return "a program in an unusual place"
    return None


async def main() -> None:
    async for event in procwatch.watch(events=["exec"]):
        if event.event == "ready":
            print("watching by", event.backend)
        elif event.event == "lost":
            print(f"ALERT {event.count} events were lost: what ran then is not known")
        elif event.event == "exec" and (why := alarm(event)):
            by = event.parent.exe if event.parent else None
            # repr(): a path may hold control characters, and must not write to the terminal.
            print(f"ALERT {why}: {event.exe!r} {event.argv} uid {event.uid} started by {by!r}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
