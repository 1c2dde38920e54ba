"""
For other ends that take so much and no more.
"""

from __future__ import annotations

from msgspec import structs

from procwatch.events import Event, ProcessEvent
from procwatch.sinks.base import Encode


def shortened(event: Event, encode: Encode, limit: int) -> bytes:
    """
    The line of an event without the last arguments, so many that it is not longer than `limit`.

    `argv_truncated` says so. Where arguments are not what makes it long, it stays longer.
    """
    buffer = bytearray()
    if not isinstance(event, ProcessEvent) or event.argv is None:
        encode(event, buffer)
        return bytes(buffer)
    argv = event.argv
    while True:
        # An argument that is long by itself is cut; else half of them go.
        argv = argv[: len(argv) // 2] if len(argv) > 1 else [one[: len(one) // 2] for one in argv]
        buffer.clear()
        encode(structs.replace(event, argv=argv, argv_truncated=True), buffer)
        if len(buffer) <= limit or not any(argv):
            return bytes(buffer)
