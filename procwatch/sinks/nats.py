"""
Events to NATS JetStream: each event one message, subject `PREFIX.HOST.KIND`, exactly once.

Many messages are under way at a time; each is confirmed by itself, and what was not confirmed is sent again over the
next connection, in order. JetStream knows a message that it has already by its `Nats-Msg-Id`, for as long as the
stream's duplicate window. After a longer outage that is not enough: so we also ask for the last message of this host in
the stream, and what is older than the window and stands before that one is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from msgspec import json

from procwatch import options
from procwatch.errors import ConfigError
from procwatch.events import ContainerEvent, Event, Lost, ProcessEvent
from procwatch.sinks.base import Record
from procwatch.sinks.outbox import OutboxSink, Spooled
from procwatch.sinks.shorten import shortened
from procwatch.table.draft import Draft

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

# Messages under way. Beyond the product of rate and round trip more of them bring nothing.
WINDOW = 2048
CONNECT_S = 5.0
# Nothing was confirmed for so long: the connection is dead, whatever TCP says.
ACK_S = 10.0
_TOO_LARGE = 10054  # err_code of JetStream: message size exceeds maximum allowed
_TOKEN = re.compile(r"[^\w-]", re.ASCII)


class _Refused(ConnectionError):
    """
    The server does not take a message, or not now.
    """


class NatsSink(OutboxSink):
    """
    Publishes lines to a JetStream stream.

    Args:
        common: See Spooled.
        servers: URLs, as "nats://10.0.0.1:4222" or "tls://nats.example.com"; one of them is enough.
        prefix: First part of the subjects. The host is the second, with "_" for each character that is no letter,
            digit, "-" or "_"; the kind of event is the third.
        stream: Its name.
        create: Make the stream when it is not there; its options below count only then.
        stream_max_bytes: It drops the oldest messages beyond this size: bytes, or as "100GiB"; 0: no limit.
        stream_max_age_s: And those older than so many seconds; 0: none.
        replicas: Servers that keep it.
        duplicate_window_s: For how long the stream knows a message again.
        max_bytes: An event that is longer loses arguments from its end (`argv_truncated` says so): the servers'
            max_payload, or less.
        credentials: File with JWT and key of a user.
        nkey: File with the seed of a user.
        user, password, token: Other ways to log in.
        tls_ca: File with the certificates to trust; None: those of the system.
        tls_cert, tls_key: Files of our own certificate.

    Raises:
        ConfigError: A value that cannot be; nats-py is not installed.
    """

    name = "nats"

    def __init__(
        self,
        common: Spooled,
        *,
        servers: list[str],
        prefix: str = "procwatch",
        stream: str = "procwatch",
        create: bool = True,
        stream_max_bytes: int | str = 0,
        stream_max_age_s: float = 0,
        replicas: int = 1,
        duplicate_window_s: float = 120,
        max_bytes: int | str = "1MB",
        credentials: str | None = None,
        nkey: str | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> None:
        super().__init__(common)
        if not servers:
            raise ConfigError("servers=[] cannot be: at least one, as nats://localhost:4222")
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", prefix, re.ASCII):
            raise ConfigError(f"prefix={prefix!r} cannot be: letters, digits, '-', '_', and dots between them")
        if not re.fullmatch(r"[\w-]+", stream, re.ASCII):
            raise ConfigError(f"stream={stream!r} cannot be: letters, digits, '-' and '_'")
        if replicas < 1 or duplicate_window_s <= 0 or stream_max_age_s < 0:
            raise ConfigError("replicas is 1 or more, duplicate_window_s more than 0, stream_max_age_s 0 or more")
        self._servers = servers
        self._prefix = prefix
        self._subject = f"{prefix}.{_TOKEN.sub('_', common.maker.host)}"
        self._stream = stream
        self._create = create
        self._stream_max_bytes = options.size(stream_max_bytes)
        self._stream_max_age_s = stream_max_age_s
        self._replicas = replicas
        self._duplicate_window_s = duplicate_window_s
        self._max_bytes = options.size(max_bytes)
        self._login: dict[str, Any] = {
            name: value
            for name, value in (
                ("user_credentials", credentials),
                ("nkeys_seed", nkey),
                ("user", user),
                ("password", password),
                ("token", token),
            )
            if value is not None
        }
        self._tls = (tls_ca, tls_cert, tls_key)
        self._under_way: deque[Record] = deque()  # sent and not confirmed
        self._stored: set[int] = set()  # numbers of those that are confirmed behind one that is not
        self._head = self._next = 0  # numbers on this connection: of the oldest under way, and of the next
        self._refused_by = ""
        self._refusals = False  # there were some since all that is under way was sent first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()  # for the sender: something to send, something confirmed, or the end
        self._queued = asyncio.Event()  # for the filler

    # On the loop

    def _open(self) -> None:
        try:
            import nats  # noqa: F401
        except ImportError as error:
            raise ConfigError("the sink nats needs the package nats-py: install procwatch[nats]") from error
        for name in (*self._tls, self._login.get("user_credentials"), self._login.get("nkeys_seed")):
            if name is not None and not os.access(name, os.R_OK):
                raise ConfigError(f"{name} cannot be read")
        self._tls_context()
        super()._open()

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(self._queued.set)

    def _encode_item(self, item: Event | Draft, buffer: bytearray) -> None:
        buffer += f"{self._subject}.{item.event} {self._id(item)}\n".encode()
        start = len(buffer)
        self._encode(item, buffer)
        if len(buffer) - start > self._max_bytes:
            buffer[start:] = shortened(self._maker.event(item), self._encode, self._max_bytes)
        buffer.pop()  # a message needs no newline

    def _id(self, item: Event | Draft) -> str:
        """
        What no other event has: two of one process and one kind have different times.
        """
        if isinstance(item, Draft):
            who = item.who.id
        elif isinstance(item, ProcessEvent):
            who = item.id
        elif isinstance(item, ContainerEvent):
            who = f"{self._subject}-{_TOKEN.sub('_', item.container.id)}"
        elif isinstance(item, Lost):
            who = f"{self._subject}-{_TOKEN.sub('_', item.where)}-{item.count}"
        else:
            who = self._subject
        return f"{who}-{item.event}-{self._time_ns(item)}"

    # In the thread, which has a loop of its own

    def _work(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        filler = asyncio.create_task(self._keep_filling())
        try:
            while not self._abandoned:
                try:
                    await self._connected()
                    return
                except Exception as error:  # whatever the library raises: try again
                    self._fail(error)
                if self._closing and (self._spool is not None or not self._outbox.pending):
                    return
                self._back_off()
                await self._pause()
        finally:
            filler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await filler
            self._fill()
            if self._spool is not None and self._failed_gap.count:
                self._deliver([])
            self._loop = None

    async def _pause(self) -> None:
        while (wait := self._retry_at - time.monotonic()) > 0 and not self._closing:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait)
        if self._closing:  # a last try, or some
            await asyncio.sleep(0.05)

    async def _keep_filling(self) -> None:
        while True:
            self._fill()
            self._news.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._queued.wait(), self._outbox.sync_in_s())
            self._queued.clear()

    async def _connected(self) -> None:
        """
        Connect, and send until all is closed.

        Raises:
            Exception: The connection cannot be made, or ended.
        """
        from nats.aio.client import Client

        client = Client()
        try:
            await self._connect(client)
            stream = client.jetstream(timeout=CONNECT_S)
            window_s = await self._find_stream(stream)
            if not self._under_way:
                self._under_way.extend(self._outbox.read(WINDOW))
            await self._skip_stored(stream, window_s)
            await self._send(client)
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), CONNECT_S)

    async def _connect(self, client: Client) -> None:
        failures: list[Exception] = []

        async def failed(error: Exception) -> None:
            failures.append(error)
            if f'"{self._subject}.'.lower() in str(error).lower():  # a message that this user may not publish
                self._refused_by = str(error)
                self._news.set()

        async def closed() -> None:
            self._news.set()

        try:
            await asyncio.wait_for(
                client.connect(
                    servers=self._servers,
                    name=f"procwatch {self._maker.host}",
                    allow_reconnect=False,  # what is under way must be sent again first
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(CONNECT_S),
                    ping_interval=20,
                    error_cb=failed,
                    closed_cb=closed,
                    tls=self._tls_context(),
                    **self._login,
                ),
                CONNECT_S * (1 + len(self._servers)),
            )
        except Exception as error:
            raise (failures[-1] if failures else error) from error

    def _tls_context(self) -> ssl.SSLContext | None:
        ca, certificate, key = self._tls
        if not any(self._tls) and not any(server.startswith(("tls://", "wss://")) for server in self._servers):
            return None
        try:
            context = ssl.create_default_context(cafile=ca)
            if certificate is not None:
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls_ca, tls_cert or tls_key cannot be used: {error}") from error
        return context

    async def _find_stream(self, stream: JetStreamContext) -> float:
        """
        Its duplicate window, seconds; it is made if need be.
        """
        from nats.js.api import StreamConfig
        from nats.js.errors import BadRequestError, NotFoundError

        try:
            info = await stream.stream_info(self._stream)
        except NotFoundError:
            if not self._create:
                raise
            config = StreamConfig(
                name=self._stream,
                subjects=[f"{self._prefix}.>"],
                max_bytes=self._stream_max_bytes or None,
                max_age=self._stream_max_age_s or None,
                num_replicas=self._replicas,
                duplicate_window=self._duplicate_window_s,
            )
            try:
                info = await stream.add_stream(config)
            except BadRequestError:  # another host was quicker
                info = await stream.stream_info(self._stream)
        except TimeoutError:  # a user who may publish, and ask for nothing
            return float("inf")
        return info.config.duplicate_window or 0.0

    async def _skip_stored(self, stream: JetStreamContext, window_s: float) -> None:
        """
        Confirm what is there already and too old for the stream to know it again.
        """
        old_ns = time.time_ns() - int(min(window_s, 1e9) / 2 * 1e9)
        if self._refusals or not self._under_way or self._under_way[0].time_ns > old_ns:
            return
        try:
            last = await stream.get_last_msg(self._stream, f"{self._subject}.>")
        except Exception:  # there is none, or we may not ask
            return
        known = (last.headers or {}).get("Nats-Msg-Id", "").encode()
        ids = [_parted(record)[1] for record in self._under_way]
        if known not in ids:
            return
        stored = 0
        for record in list(self._under_way)[: ids.index(known) + 1]:
            if record.time_ns > old_ns:
                break
            stored += 1
            self._under_way.popleft()
        self._confirm(stored)

    async def _send(self, client: Client) -> None:
        """
        Publish what is under way, then what comes, until all is closed.
        """
        inbox = client.new_inbox()
        limit = client.max_payload
        await client.subscribe(f"{inbox}.*", cb=self._answered)
        self._refused_by = ""
        self._head = self._next = 0
        self._stored.clear()
        for record in list(self._under_way):
            await self._publish(client, record, inbox, limit)
        resent = self._next
        heard = time.monotonic()
        while True:
            self._news.clear()
            if self._advance():
                heard = time.monotonic()
                self._fill()  # memory has room again
            if self._head >= resent:
                self._refusals = False
            if self._refused_by:
                self._refusals = True
                raise _Refused(self._refused_by)
            if client.is_closed:
                raise client.last_error or ConnectionError("the connection was closed")
            while room := WINDOW - len(self._under_way):
                records = self._outbox.read(min(room, 256))
                for record in records:
                    self._under_way.append(record)
                    await self._publish(client, record, inbox, limit)
                if not records:
                    break
            if self._abandoned or (self._closing and not self._records and not self._outbox.pending):
                return
            if self._under_way and time.monotonic() - heard > ACK_S:
                raise TimeoutError("no answer from the server")
            if not self._under_way:
                heard = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), ACK_S if self._under_way else None)

    async def _publish(self, client: Client, record: Record, inbox: str, limit: int) -> None:
        subject, message_id, body = _parted(record)
        if len(body) + 256 > limit:  # with its headers
            self._failures += 1
            self._error = f"an event of {len(body)} bytes is larger than the server's max_payload of {limit}"
            self._reject([record])
            self._stored.add(self._next)
            self._news.set()
        else:
            await client.publish(
                subject.decode(), body, reply=f"{inbox}.{self._next}", headers={"Nats-Msg-Id": message_id.decode()}
            )
        self._next += 1

    async def _answered(self, message: Msg) -> None:
        """
        The stream has a message, or does not want it.
        """
        number = int(message.subject.rpartition(".")[2])
        if b'"error"' not in message.data and message.data:
            self._stored.add(number)
        else:
            error: dict[str, Any] = json.decode(message.data)["error"] if message.data else {}
            if error.get("err_code") == _TOO_LARGE:
                self._failures += 1
                self._error = str(error.get("description"))
                self._reject([self._under_way[number - self._head]])
                self._stored.add(number)
            else:
                self._refused_by = str(error.get("description") or f"no stream takes {self._subject}")
        self._news.set()

    def _advance(self) -> bool:
        """
        Confirm the oldest, as far as all of them are stored.
        """
        count = 0
        while self._head in self._stored:
            self._stored.remove(self._head)
            self._head += 1
            self._under_way.popleft()
            count += 1
        if count:
            self._confirm(count)
        return count > 0

    def _abandon(self) -> None:
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)


def _parted(record: Record) -> tuple[bytes, bytes, bytes]:
    """
    Subject, id and body.
    """
    head, _, body = record.data.partition(b"\n")
    subject, _, message_id = head.partition(b" ")
    return subject, message_id, body
