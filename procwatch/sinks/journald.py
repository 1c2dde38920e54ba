"""
systemd's journal, by its native protocol: every field of an event is a field of the entry, with its exact bytes.

    journalctl PROCWATCH_EVENT=exec PROCWATCH_EXE=/usr/bin/curl
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from struct import Struct
from typing import Any

import msgspec

from procwatch.errors import SinkUnavailable
from procwatch.events import Event
from procwatch.sinks.base import Common, QueueSink, Record
from procwatch.table.draft import Draft

DEFAULT_PATH = "/run/systemd/journal/socket"
TIMEOUT_S = 2.0
_LENGTH = Struct("<Q")
_INFO, _WARNING = b"6", b"4"  # syslog(3)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class JournaldSink(QueueSink):
    """
    Writes entries to the journal.

    MESSAGE is the line of the chosen format. PROCWATCH_EVENT, PROCWATCH_EXE and so on are the fields of native JSON,
    those of an object with an underscore (PROCWATCH_PARENT_PID); PROCWATCH_ARGV comes once for each argument. While
    journald is away entries are dropped and told.

    Args:
        common: See Common.
        path: Its socket.
    """

    name = "journald"
    default_format = "logfmt"

    def __init__(
        self,
        common: Common,
        *,
        path: str = DEFAULT_PATH,
    ) -> None:
        super().__init__(common)
        self._path = path
        self._socket: socket.socket | None = None

    def _open(self) -> None:
        try:
            found = stat.S_ISSOCK(os.stat(self._path).st_mode)
        except OSError:
            found = False
        if not found:
            raise SinkUnavailable(self.name, f"no journald listens on {self._path}", "choose another sink")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(TIMEOUT_S)

    def _encode_item(self, item: Event | Draft, buffer: bytearray) -> None:
        event = self._maker.event(item)
        line = bytearray()
        self._encode(event, line)
        _field(buffer, "MESSAGE", bytes(line).rstrip(b"\n"))
        _field(buffer, "PRIORITY", _WARNING if event.event == "lost" else _INFO)
        _field(buffer, "SYSLOG_IDENTIFIER", b"procwatch")
        for name, value in _flat("PROCWATCH", msgspec.to_builtins(event)):
            _field(buffer, name, value)

    def _write(self, records: list[Record]) -> int:
        assert self._socket is not None
        for at, record in enumerate(records):
            try:
                self._send(self._socket, record.data)
            except OSError as error:
                self._fail(error)
                return at
        return len(records)

    def _send(self, connection: socket.socket, data: bytes) -> None:
        try:
            connection.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            _send_large(connection, data, self._path)

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _send_large(connection: socket.socket, data: bytes, path: str) -> None:
    """
    More than a datagram takes goes as a sealed file in memory, whose descriptor is sent.
    """
    fd = os.memfd_create("procwatch-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        connection.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))], 0, path)
    finally:
        os.close(fd)


def _field(buffer: bytearray, name: str, value: bytes) -> None:
    key = name.encode()
    if b"\n" in value:
        buffer += key + b"\n" + _LENGTH.pack(len(value)) + value + b"\n"
    else:
        buffer += key + b"=" + value + b"\n"


def _flat(prefix: str, fields: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """
    Fields by the names that the journal allows: capitals, digits and underscores, at most 64.
    """
    for key, value in fields.items():
        name = f"{prefix}_{''.join(one if one.isalnum() and one.isascii() else '_' for one in key).upper()}"[:64]
        if isinstance(value, dict):
            yield from _flat(name, value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    yield from _flat(name, item)
                else:
                    yield name, _bytes(item)
        elif value is not None:
            yield name, _bytes(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return str(value).encode("utf-8", "surrogateescape")
