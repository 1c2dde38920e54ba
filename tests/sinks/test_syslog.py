"""
syslog, with a real rsyslogd, and a TLS receiver that counts octets.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import json

from procwatch import events
from procwatch.errors import ConfigError
from procwatch.sinks.syslog import SyslogSink
from tests.sinks.kit import MAKER, draft, drafts, idle, make, opened, until
from tests.sinks.servers import answers, free_port, program
from tests.sinks.test_nats import make_certificates

pytestmark = pytest.mark.usefixtures("no_leaks")

HEAD = re.compile(rb"<(\d+)>1 (\S+) (\S+) (\S+) (\S+) (\S+) - (.*)", re.DOTALL)


class Rsyslog:
    """
    A real rsyslogd that writes what it understood to a file, on every transport.
    """

    def __init__(self, folder: Path) -> None:
        self.tcp = free_port()
        self.udp = free_port(socket.SOCK_DGRAM)
        self.unix = folder / "dev-log"
        self.output = folder / "received"
        self._folder = folder
        self._program = program("rsyslogd", "rsyslog")
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """
        Until it answers.
        """
        conf = self._folder / "rsyslog.conf"
        conf.write_text(
            f"""
            global(workDirectory="{self._folder}")
            module(load="imtcp") module(load="imudp") module(load="imuxsock" SysSock.Use="off")
            input(type="imtcp" port="{self.tcp}" address="127.0.0.1")
            input(type="imudp" port="{self.udp}" address="127.0.0.1")
            input(type="imuxsock" Socket="{self.unix}" CreatePath="on" UseSpecialParser="off" IgnoreTimestamp="off"
                  ParseHostname="on" UsePIDFromSystem="off" RateLimit.Interval="0")
            template(name="all" type="string"
                     string="%timereported:::date-rfc3339% %hostname% %app-name% %msgid% %pri% %msg%\\n")
            action(type="omfile" file="{self.output}" template="all" asyncWriting="off" flushOnTXEnd="on")
            """
        )
        command = [self._program, "-n", "-f", str(conf), "-i", str(self._folder / "pid")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await answers(self.tcp)
        await until(self.unix.exists)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """
        End it.
        """
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def received(self) -> list[list[str]]:
        """
        Time, host, program, kind, priority and message of each.
        """
        if not self.output.exists():
            return []
        lines = self.output.read_text().split("\n")[:-1]  # the last one may be half written
        return [words for line in lines if (words := line.split(" ", 5))[2] == "procwatch"]

    def pids(self) -> list[int]:
        """
        Of the events, as they came.
        """
        return [json.decode(words[5])["pid"] for words in self.received()]


@pytest.fixture
async def rsyslog(tmp_path: Path) -> AsyncIterator[Rsyslog]:
    """
    One that answers.
    """
    server = Rsyslog(tmp_path)
    await server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("scheme", ["tcp", "udp", "unix"])
async def test_rsyslogd_receives_what_was_sent(rsyslog: Rsyslog, scheme: str):
    """
    With its time, host, kind and priority, in order.
    """
    address = {
        "tcp": f"tcp://127.0.0.1:{rsyslog.tcp}",
        "udp": f"udp://127.0.0.1:{rsyslog.udp}",
        "unix": f"unix://{rsyslog.unix}",
    }[scheme]
    async with opened(SyslogSink, address=address, facility="local3") as sink:
        for first in range(1, 501, 25):  # UDP and rsyslogd's buffer for it: a little at a time
            sink.put(drafts(first, first + 24))
            while len(rsyslog.received()) < first + 24:
                await asyncio.sleep(0.002)
    assert (sink.stats().written, sink.stats().dropped) == (500, 0)
    assert rsyslog.pids() == list(range(1, 501))
    stamp, host, name, kind, priority, _ = rsyslog.received()[0]
    assert (host, name, kind, priority) == ("web-1", "procwatch", "exec", str((19 << 3) | 6))
    assert stamp.startswith("2023-11-14T22:13:20.000001")


async def test_over_tcp_nothing_is_lost_when_the_server_goes_and_comes_back(rsyslog: Rsyslog, tmp_path: Path):
    """
    It waits in the spool meanwhile. syslog has no ids: what was under way may come twice.
    """
    options = {"address": f"tcp://127.0.0.1:{rsyslog.tcp}", "spool": str(tmp_path / "spool")}
    async with opened(SyslogSink, **options) as sink:
        sink.put(drafts(1, 100))
        await until(lambda: len(rsyslog.received()) == 100)
        rsyslog.stop()
        sink.put(drafts(101, 1000))
        await until(lambda: sink.stats().failures)
        await rsyslog.start()
        sink.put(drafts(1001, 1100))
        await idle(sink)
        await until(lambda: len(set(rsyslog.pids())) == 1100)
    found = rsyslog.pids()
    assert [*dict.fromkeys(found)] == list(range(1, 1101))


async def test_a_message_is_as_the_standard_has_it():
    """
    Over UDP, read as it comes: six digits of the second, and a warning for a loss.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        address = f"udp://127.0.0.1:{receiver.getsockname()[1]}"
        async with opened(SyslogSink, address=address, max_bytes=2000) as sink:
            lost = events.Lost(
                time=MAKER.clock.stamp(7), host="web-1", count=1, exact=True, where="x", since=None, until=None
            )
            sink.put([draft(1), lost, draft(2, argv=["x" * 100] * 100)])
            found = [await asyncio.to_thread(receiver.recv, 65536) for _ in range(3)]
    heads = [HEAD.fullmatch(one) for one in found]
    parts = [head.groups() for head in heads if head is not None]
    assert [part[0] for part in parts] == [b"30", b"28", b"30"]
    assert parts[0][1:4] == (b"2023-11-14T22:13:20.000001Z", b"web-1", b"procwatch")
    assert [part[5] for part in parts] == [b"exec", b"lost", b"exec"]
    assert len(found[2]) <= 2000
    assert json.decode(parts[2][6])["argv_truncated"] is True


@asynccontextmanager
async def tls_receiver(folder: Path) -> AsyncIterator[tuple[int, bytearray]]:
    """
    Accepts TLS and keeps what it gets.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    received = bytearray()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            received.extend(data)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], received


async def test_tls_with_counted_octets(tmp_path: Path):
    """
    Several on one connection; who presents another certificate gets nothing.
    """
    make_certificates(tmp_path)
    async with tls_receiver(tmp_path) as (port, received):
        address = f"tls://localhost:{port}"
        async with opened(SyslogSink, address=address, tls_ca=str(tmp_path / "ca.pem")) as sink:
            for number in range(1, 51):
                sink.put([draft(number)])
                await idle(sink)
            assert sink.stats().failures == 0
        found = []
        rest = bytes(received)
        while rest:
            length, _, rest = rest.partition(b" ")
            message, rest = rest[: int(length)], rest[int(length) :]
            head = HEAD.fullmatch(message)
            assert head is not None
            found.append(json.decode(head[7])["pid"])
        assert found == list(range(1, 51))
        received.clear()
        async with opened(SyslogSink, address=address) as sink:
            sink.put([draft(1)])
            await until(lambda: sink.stats().failures)
            assert "certificate" in sink.stats().error.lower()
        assert not received


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"address": "http://x"}, "address"),
        ({"address": "tcp://"}, "address"),
        ({"address": "tcp://x:99999"}, "address"),
        ({"facility": "local9"}, "facility"),
        ({"max_bytes": 10}, "max_bytes"),
        ({"address": "tls://x", "tls_ca": "/no/such"}, "tls_ca"),
    ],
)
async def test_options_that_cannot_be_are_named(options: dict[str, Any], error: str):
    """
    With the value.
    """
    with pytest.raises(ConfigError, match=error):
        await make(SyslogSink, **options).open()
