"""
What the service manager is told, sd_notify(3): one datagram a message, to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """
    Does nothing where no service manager listens.

    Args:
        environ: Of the process, with NOTIFY_SOCKET and WATCHDOG_USEC if systemd set them.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # "@name" stands for the abstract namespace, unix(7).
        self._address = "\0" + path[1:] if path.startswith("@") else path
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "")
        # Seconds between two signs of life, half of what the manager waits for, as it advises; None: none wanted.
        self.watchdog_s = int(usec) / 2_000_000 if ours and usec.isdecimal() and int(usec) else None

    def ready(self, status: str) -> None:
        """
        All sources and sinks are open.
        """
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """
        A reload begins; `ready` ends it.
        """
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """
        The end has begun.
        """
        self._send("STOPPING=1")

    def alive(self, status: str) -> None:
        """
        A sign of life, with one line for `systemctl status`.
        """
        self._send(f"WATCHDOG=1\nSTATUS={status}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as to:
                to.sendto(message.encode(), self._address)
        except OSError:
            pass  # a manager that is away cannot be told
