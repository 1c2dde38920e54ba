"""
syslog as RFC 5424 has it, over a Unix socket, UDP (RFC 5426), TCP with octet counting (RFC 6587) or TLS (RFC 5425).

syslog has no confirmations. Over TCP and TLS an event counts as sent when the other host's kernel has it; over UDP and
a Unix socket when ours has. When a connection breaks, what was not acknowledged is sent again: an event may come twice.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import time
from typing import Literal
from urllib.parse import urlsplit

from procwatch.errors import ConfigError
from procwatch.events import Event
from procwatch.sinks.base import Record
from procwatch.sinks.outbox import SenderSink, Spooled
from procwatch.sinks.shorten import shortened
from procwatch.table.draft import Draft

TIMEOUT_S = 5.0
Facility = Literal["kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
                   "ntp", "audit", "alert", "clock", "local0", "local1", "local2", "local3", "local4", "local5",
                   "local6", "local7"]  # fmt: skip
_FACILITIES: tuple[str, ...] = Facility.__args__  # type: ignore[attr-defined]
_INFO, _WARNING = 6, 4
_PORTS = {"udp": 514, "tcp": 601, "tls": 6514}
_MOST_UDP = 65_507


class SyslogSink(SenderSink):
    """
    Sends lines as syslog messages.

    Args:
        common: See Spooled.
        address: "unix:///dev/log", "udp://HOST:514", "tcp://HOST:601" or "tls://HOST:6514".
        facility: As "daemon" or "local0".
        max_bytes: A longer message loses arguments from its end (`argv_truncated` says so). rsyslog takes 8192 unless
            told otherwise.
        tls_ca: File with the certificates to trust; None: those of the system.
        tls_cert, tls_key: Files of our own certificate.

    Raises:
        ConfigError: A value that cannot be.
    """

    name = "syslog"

    def __init__(
        self,
        common: Spooled,
        *,
        address: str = "unix:///dev/log",
        facility: Facility = "daemon",
        max_bytes: int = 8192,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> None:
        super().__init__(common)
        url = urlsplit(address)
        try:
            port = url.port
        except ValueError as error:
            raise ConfigError(f"address={address!r} cannot be: {error}") from error
        place = url.path if url.scheme == "unix" else url.hostname
        if url.scheme not in ("unix", *_PORTS) or not place:
            raise ConfigError(f"address={address!r} cannot be: unix:///PATH, udp://HOST, tcp://HOST or tls://HOST")
        if facility not in _FACILITIES:
            raise ConfigError(f"facility={facility!r} cannot be: one of {', '.join(_FACILITIES)}")
        if max_bytes < 480:
            raise ConfigError(f"max_bytes={max_bytes} cannot be: 480 or more")
        self._scheme = url.scheme
        self._place = place
        self._port = port or _PORTS.get(url.scheme, 0)
        self._priority = _FACILITIES.index(facility) << 3
        self._max_bytes = min(max_bytes, _MOST_UDP) if url.scheme == "udp" else max_bytes
        self._tls = (tls_ca, tls_cert, tls_key)
        self._context: ssl.SSLContext | None = None
        self._socket: socket.socket | None = None
        self._reconnect = False
        host = common.maker.host.encode("ascii", "replace").replace(b" ", b"_")[:255] or b"-"
        self._sender = b" %b procwatch %d " % (host, os.getpid())

    def reopen(self) -> None:
        """
        Connect anew.
        """
        self._reconnect = True
        self._wake()

    def _open(self) -> None:
        if self._scheme == "tls":
            ca, certificate, key = self._tls
            try:
                self._context = ssl.create_default_context(cafile=ca)
                if certificate is not None:
                    self._context.load_cert_chain(certificate, key)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"tls_ca, tls_cert or tls_key cannot be used: {error}") from error
        super()._open()

    def _encode_item(self, item: Event | Draft, buffer: bytearray) -> None:
        # RFC 5424 allows six digits of a second.
        stamp = self._maker.clock.stamp(item.time_ns) if isinstance(item, Draft) else item.time
        severity = _WARNING if item.event == "lost" else _INFO
        head = b"<%d>1 %bZ" % (self._priority | severity, stamp[:26].encode())
        head += b"%b%b - " % (self._sender, item.event.encode())
        line = bytearray()
        self._encode(item, line)
        if len(head) + len(line) > self._max_bytes:
            line = bytearray(shortened(self._maker.event(item), self._encode, self._max_bytes - len(head)))
        message = head + line.rstrip(b"\n")
        if self._scheme in ("tcp", "tls"):
            buffer += b"%d " % len(message)
        buffer += message

    # In the thread

    def _send(self, records: list[Record]) -> int:
        try:
            connection = self._connected()
            if self._scheme in ("tcp", "tls"):
                connection.sendall(b"".join([record.data for record in records]))
                _acknowledged(connection)
                return len(records)
            return self._send_datagrams(connection, records)
        except OSError:
            self._disconnect()
            raise

    def _send_datagrams(self, connection: socket.socket, records: list[Record]) -> int:
        for at, record in enumerate(records):
            try:
                connection.send(record.data)
            except OSError:
                if not at:
                    raise
                self._disconnect()
                return at
        return len(records)

    def _connected(self) -> socket.socket:
        if self._socket is not None and (self._reconnect or _is_closed(self._socket)):
            self._disconnect()
        self._reconnect = False
        if self._socket is None:
            self._socket = self._connect()
        return self._socket

    def _connect(self) -> socket.socket:
        if self._scheme in ("unix", "udp"):
            family, address = socket.AF_UNIX, self._place
            if self._scheme == "udp":
                ((family, _, _, _, address), *_) = socket.getaddrinfo(  # type: ignore[assignment]
                    self._place, self._port, type=socket.SOCK_DGRAM
                )
            connection = socket.socket(family, socket.SOCK_DGRAM)
            try:
                connection.settimeout(TIMEOUT_S)
                connection.connect(address)
            except BaseException:
                connection.close()
                raise
            return connection
        connection = socket.create_connection((self._place, self._port), TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._context is None:
            return connection
        try:
            return self._context.wrap_socket(connection, server_hostname=self._place)
        except BaseException:
            connection.close()
            raise

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _end(self) -> None:
        self._disconnect()
        super()._end()


def _is_closed(connection: socket.socket) -> bool:
    """
    Whether the other end has closed a connection on which it never says anything.
    """
    if connection.type != socket.SOCK_STREAM:
        return False
    readable, _, _ = select.select([connection], [], [], 0)
    if not readable:
        return False
    connection.setblocking(False)
    try:
        return connection.recv(4096) == b""
    except (BlockingIOError, ssl.SSLWantReadError):  # a session ticket of TLS is no data
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(TIMEOUT_S)


def _acknowledged(connection: socket.socket) -> None:
    """
    Wait until the other host's kernel has all that was sent (SIOCOUTQ, tcp(7)).

    Raises:
        OSError: It was closed, or nothing was acknowledged in time.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]:
        if _is_closed(connection):
            raise ConnectionResetError("the connection was closed")
        if time.monotonic() > deadline:
            raise TimeoutError("nothing was acknowledged")
        time.sleep(0.001)  # there is no event for it
