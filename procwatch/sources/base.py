"""
What a source is: one kernel mechanism, read by one class that knows nothing of the others.
"""

from __future__ import annotations

import socket
from typing import ClassVar, Protocol, runtime_checkable

from msgspec import Struct

from procwatch.errors import SourceUnavailable
from procwatch.facts import Fact

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; CAP_NET_ADMIN


def set_receive_buffer(receiver: socket.socket, size: int) -> None:
    """
    Ask for a receive buffer of `size` bytes: beyond net.core.rmem_max if we may, else as much as is allowed.
    """
    size = min(size, 0x3FFFFFFF)  # the kernel doubles it, in an int
    try:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


class SourceStats(Struct, frozen=True):
    """
    Counters of one source since it was opened.
    """

    facts: int = 0  # handed downstream
    wakeups: int = 0  # calls of read() that found something
    lost: int = 0  # dropped by the kernel or by us, as far as known
    undecoded: int = 0  # messages that were not what the kernel's headers promise


class Source(Protocol):
    """
    Read one mechanism of the kernel.

    `open()` raises SourceUnavailable with a reason and a remedy and leaves nothing open then. `read()` never blocks
    and never raises on content. All are called from one thread.
    """

    name: ClassVar[str]

    def probe(self) -> SourceUnavailable | None:
        """
        Say why this source cannot work here, or None; cheap, and leaves nothing open.
        """

    def open(self) -> None:
        """
        Begin to listen.

        Raises:
            SourceUnavailable: It cannot work here; nothing is left open.
        """

    def fileno(self) -> int | None:
        """
        The descriptor that is readable when `read()` has something, or None: then `delay_s()` tells when to look.
        """

    def delay_s(self) -> float:
        """
        With a descriptor: how long to let facts gather after a wake-up before `read()`, 0 for none.
        Without one: when to call `read()` next.
        """

    def read(self) -> list[Fact]:
        """
        All that is there now, in the order of the kernel's time, losses marked where they happened.
        """

    def stats(self) -> SourceStats:
        """
        Counters so far.
        """

    def close(self) -> None:
        """
        Stop listening and free everything; may be called twice.
        """


@runtime_checkable
class Ticking(Protocol):
    """
    A source without a descriptor that can say cheaply that it has nothing.
    """

    def quiet(self) -> bool:
        """
        Whether `read()` would give nothing now.
        """
