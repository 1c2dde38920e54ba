"""
A Unix socket that readers connect to: `procwatch tail`, or `socat - UNIX-CONNECT:PATH`.

Each reader has a bounded buffer of its own: one that is slow gets a `lost` event where it missed something, and no
other reader notices. Who connects gets the `ready` event first, then what happens from now on.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket

from procwatch import options
from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.events import Event, Ready
from procwatch.sinks.base import Common, Gap, QueueSink, Record
from procwatch.table.draft import Draft

DEFAULT_PATH = "/run/procwatch/tail.sock"
MAX_READERS = 64
_FIRST_PASSED_FD = 3  # sd_listen_fds(3)


class _Reader:
    """
    One connection.
    """

    __slots__ = ("buffer", "gap", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.buffer = bytearray()
        self.gap = Gap()


class UnixSink(QueueSink):
    """
    Serves lines to whoever connects.

    Args:
        common: See Common.
        path: The socket. One that systemd passes for it (a .socket unit) is taken.
        mode: Permissions of the socket: who may write to it may read the events.
        group: Group of the socket, by name; None: the agent's.
        reader_bytes: What may wait for one reader: bytes, or as "8MiB".

    Raises:
        ConfigError: A value that cannot be.
    """

    name = "unix"

    def __init__(
        self,
        common: Common,
        *,
        path: str = DEFAULT_PATH,
        mode: int = 0o660,
        group: str | None = None,
        reader_bytes: int | str = "8MiB",
    ) -> None:
        super().__init__(common)
        if len(os.fsencode(path)) > 107:
            raise ConfigError(f"path={path!r} cannot be: a socket's path has at most 107 bytes")
        if not 0 < mode <= 0o777:
            raise ConfigError(f"mode=0o{mode:o} cannot be: permissions as 0o660")
        self._path = path
        self._mode = mode
        self._group = group
        self._most = options.size(reader_bytes)
        self._readers: list[_Reader] = []
        self._greeting = b""
        self._listener: socket.socket | None = None
        self._passed = False
        self._selector: selectors.BaseSelector | None = None
        self._woken = -1  # an eventfd(2)

    # On the loop

    def put(self, batch: list[Event | Draft]) -> None:
        """
        Take a batch; while nobody listens it is not even written out.
        """
        for item in batch:
            if isinstance(item, Ready):
                self._greeting = self._record(item).data
        if self._readers:
            super().put(batch)

    def _wake(self) -> None:
        if self._woken >= 0:
            os.eventfd_write(self._woken, 1)

    def _open(self) -> None:
        listener = _passed(self._path)
        self._passed = listener is not None
        try:
            self._listener = listener or self._listen()
        except OSError as error:
            reason = f"cannot listen on {self._path}: {os.strerror(error.errno or 0)}"
            raise SinkUnavailable(self.name, reason, "its directory must be there and writable") from error
        self._listener.setblocking(False)
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), self._mode)  # before it has a name nobody can connect
            try:
                listener.bind(self._path)
            except OSError:
                self._remove_stale()
                listener.bind(self._path)
            if self._group is not None:
                shutil.chown(self._path, group=self._group)
            os.chmod(self._path, self._mode)  # whatever the umask is
            listener.listen(MAX_READERS)
        except LookupError as error:
            listener.close()
            raise ConfigError(f"group={self._group!r} cannot be: there is no such group") from error
        except BaseException:
            listener.close()
            raise
        return listener

    def _remove_stale(self) -> None:
        """
        Remove the socket of an agent that was killed.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            try:
                other.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
        raise SinkUnavailable(self.name, f"another procwatch listens on {self._path}", "give each its own")

    # In the thread

    def _sleep(self) -> None:
        assert self._selector is not None
        for key, _ in self._selector.select():
            if key.fileobj == self._woken:
                os.eventfd_read(self._woken)
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._serve(key.data)

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._selector is not None
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptors left
            self._fail(error)
            return
        if len(self._readers) >= MAX_READERS:
            connection.close()
            return
        connection.setblocking(False)
        reader = _Reader(connection)
        reader.buffer += self._greeting
        self._selector.register(connection, selectors.EVENT_READ, reader)
        self._readers.append(reader)
        self._send(reader)

    def _serve(self, reader: _Reader) -> None:
        try:
            if reader.socket.recv(4096) == b"":  # what a reader says is of no interest
                self._part(reader)
                return
        except BlockingIOError:
            pass
        except OSError:
            self._part(reader)
            return
        self._send(reader)

    def _part(self, reader: _Reader) -> None:
        assert self._selector is not None
        self._selector.unregister(reader.socket)
        reader.socket.close()
        self._readers.remove(reader)

    def _write(self, records: list[Record]) -> int:
        size = sum(len(record.data) for record in records)
        for reader in list(self._readers):
            if not reader.gap.count and len(reader.buffer) + size <= self._most:
                reader.buffer += b"".join([record.data for record in records])
            else:
                self._fill(reader, records)
            self._send(reader)
        return len(records)

    def _fill(self, reader: _Reader, records: list[Record]) -> None:
        """
        What there is room for, and the mark of what there was not.
        """
        for record in records:
            if len(reader.buffer) + len(record.data) > self._most:
                reader.gap.add(record.count, record.time_ns)
                self._failed += record.count
                continue
            self._tell_gap(reader)
            reader.buffer += record.data

    def _tell_gap(self, reader: _Reader) -> None:
        if reader.gap.count:
            reader.buffer += self._record(reader.gap.event(self._maker.host)).data
            reader.gap.clear()

    def _send(self, reader: _Reader) -> None:
        assert self._selector is not None
        try:
            while reader.buffer:
                del reader.buffer[: reader.socket.send(reader.buffer)]
                if not reader.buffer:
                    self._tell_gap(reader)
        except BlockingIOError:
            pass
        except OSError:
            self._part(reader)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if reader.buffer else 0)
        if self._selector.get_key(reader.socket).events != wanted:
            self._selector.modify(reader.socket, wanted, reader)

    def _end(self) -> None:
        for reader in list(self._readers):
            self._send(reader)
        for reader in list(self._readers):
            self._part(reader)
        if self._selector is not None:
            self._selector.close()
        if self._listener is not None:
            self._listener.close()
            if not self._passed:  # one that systemd made stays
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
        woken, self._woken = self._woken, -1
        os.close(woken)


def _passed(path: str) -> socket.socket | None:
    """
    The socket with this path among those that systemd has passed, sd_listen_fds(3).
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(os.environ.get("LISTEN_FDS", "0"))):
        try:
            found = socket.socket(fileno=fd)
        except OSError:  # a file or a FIFO
            continue
        if found.family == socket.AF_UNIX and found.getsockname() == path:
            return found
        found.detach()
    return None
