"""
NATS JetStream, with a real server that is killed in the middle.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import json

from procwatch import events
from procwatch.errors import ConfigError
from procwatch.sinks.nats import NatsSink
from procwatch.table.draft import Maker
from tests.sinks.kit import ENCODE, MAKER, draft, drafts, idle, make, opened, stop, until
from tests.sinks.servers import NatsServer, nats_server, stream_messages

pytest.importorskip("nats")
pytestmark = pytest.mark.usefixtures("no_leaks")


def told(messages: list[Any]) -> list[Any]:
    """
    The pids of messages, and the counts of what was lost.
    """
    found = [json.decode(message.data) for message in messages]
    return [one.get("pid") or one.get("count") or one["event"] for one in found]


def ids(messages: list[Any]) -> list[str]:
    """
    Their ids.
    """
    return [message.headers["Nats-Msg-Id"] for message in messages]


async def test_each_event_is_one_message_with_its_subject_and_id(tmp_path: Path):
    """
    The stream is made on the way; host names have no dots in a subject.
    """
    async with nats_server(tmp_path / "nats") as server:
        maker = type(MAKER)("web-1.example.com", MAKER.clock)
        sink = NatsSink.of(maker=maker, encode=lambda item, buffer: buffer.extend(b"{}\n"), servers=[server.url])
        await sink.open()
        lost = events.Lost(
            time=MAKER.clock.stamp(5), host="h", count=3, exact=True, where="ring_buffer", since=None, until=None
        )
        sink.put([draft(7), draft(7, kind=events.Fork), lost, stop()])
        await sink.close()
        assert (sink.stats().written, sink.stats().pending) == (4, 0)
        messages = await stream_messages(server.url)
    host = "web-1_example_com"
    assert [message.subject for message in messages] == [
        f"procwatch.{host}.{kind}" for kind in ("exec", "fork", "lost", "stop")
    ]
    second = 1_700_000_000 * 10**9
    assert ids(messages) == [
        f"0123abcd-7-9-exec-{second + 7000}",
        f"0123abcd-7-9-fork-{second + 7000}",
        f"procwatch.{host}-ring_buffer-3-lost-{second + 5}",
        f"procwatch.{host}-stop-{second + 10**9}",
    ]


@pytest.mark.parametrize("spool", [True, False])
async def test_a_server_that_is_killed_in_the_middle_loses_nothing_and_doubles_nothing(tmp_path: Path, spool: bool):
    """
    kill -9 and started again, several times, while events come.
    """
    options = {"spool": str(tmp_path / "spool")} if spool else {}
    async with nats_server(tmp_path / "nats") as server:
        async with opened(NatsSink, servers=[server.url], **options) as sink:
            for first in range(1, 9001, 100):
                sink.put(drafts(first, first + 99))
                await asyncio.sleep(0)
                if first % 3000 == 1501:
                    await until(lambda: sink.stats().written > 0, "the first being there")
                    server.kill()
                elif first % 3000 == 2501:
                    await server.start()
            await until(lambda: sink.stats().written + sink.stats().dropped == 9000, "all being there")
            stats = sink.stats()
        assert (stats.written, stats.dropped) == (9000, 0)
        assert stats.failures > 0
        messages = await stream_messages(server.url)
    assert told(messages) == list(range(1, 9001))
    assert len(set(ids(messages))) == 9000


AGENT = """
import asyncio, sys
from procwatch.sinks.nats import NatsSink
from tests.sinks.kit import drafts, make

async def main():
    sink = make(NatsSink, servers=[sys.argv[1]], spool=sys.argv[2])
    await sink.open()
    first = int(sys.argv[3])
    for at in range(first, first + 3000, 100):
        sink.put(drafts(at, at + 99))
        await asyncio.sleep(0.001)
    print("all", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_an_agent_that_is_killed_goes_on_where_it_was(tmp_path: Path):
    """
    What the spool has is sent by the next one, in order, and nothing twice.
    """

    def agent(server: NatsServer, first: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", AGENT, server.url, str(tmp_path / "spool"), str(first)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)

    async with nats_server(tmp_path / "nats") as server:
        for first in (1, 3001):
            running = agent(server, first)
            assert running.stdout is not None
            if first == 1:
                await asyncio.to_thread(running.stdout.readline)
                server.kill()  # and the server, too
            else:
                await server.start()
                await asyncio.to_thread(running.stdout.readline)
            running.send_signal(signal.SIGKILL)
            running.wait()
            running.stdout.close()
        async with opened(NatsSink, servers=[server.url], spool=str(tmp_path / "spool")) as sink:
            sink.put(drafts(6001, 6010))
            await idle(sink)
        messages = await stream_messages(server.url)
    found = told(messages)
    assert found == sorted(set(found))
    assert found[-10:] == list(range(6001, 6011))
    # What an agent had taken and not yet spooled dies with it: a few milliseconds.
    assert len(found) > 5000


async def test_after_an_outage_longer_than_the_window_nothing_is_sent_twice(tmp_path: Path):
    """
    The stream would not know the messages again: the last one of this host tells where to go on.
    """
    spool = str(tmp_path / "spool")
    async with nats_server(tmp_path / "nats") as server:
        options = {"servers": [server.url], "spool": spool, "duplicate_window_s": 0.1}
        async with opened(NatsSink, **options) as sink:
            sink.put(drafts(1, 500))
            await idle(sink)
        cursor = tmp_path / "spool" / "cursor"
        cursor.write_bytes(b"%016x\n" % 200)  # as if the confirmations of the last 300 had not arrived
        await asyncio.sleep(0.2)  # longer than the window: this is what the test is about
        async with opened(NatsSink, **options) as sink:
            sink.put(drafts(501, 600))
            await idle(sink)
        messages = await stream_messages(server.url)
    assert told(messages) == list(range(1, 601))


async def test_a_stream_that_is_full_is_waited_for(tmp_path: Path):
    """
    One that refuses the newest: nothing is lost, and it goes on when there is room.
    """
    import nats
    from nats.js.api import DiscardPolicy, StreamConfig

    async with nats_server(tmp_path / "nats") as server:
        client = await nats.connect(server.url)
        js = client.jetstream()
        config = StreamConfig(
            name="procwatch", subjects=["procwatch.>"], max_msgs=100, discard=DiscardPolicy.NEW, duplicate_window=60
        )
        await js.add_stream(config)
        async with opened(NatsSink, servers=[server.url], spool=str(tmp_path / "spool")) as sink:
            sink.put(drafts(1, 300))
            await until(lambda: sink.stats().failures > 0, "the refusal")
            assert "maximum messages" in sink.stats().error
            config.max_msgs = 1000
            await js.update_stream(config)
            await idle(sink)
        await client.close()
        messages = await stream_messages(server.url)
    assert told(messages) == list(range(1, 301))


async def test_an_event_that_is_too_long_loses_arguments_and_says_so(tmp_path: Path):
    """
    And nothing stops because of it.
    """
    async with nats_server(tmp_path / "nats") as server:
        async with opened(NatsSink, servers=[server.url], max_bytes=4096) as sink:
            sink.put([draft(1, argv=["sh", "-c", "x" * 100] * 100), draft(2), draft(3, argv=["y" * 10_000])])
            await idle(sink)
        messages = await stream_messages(server.url)
    found = [json.decode(message.data) for message in messages]
    assert all(len(message.data) <= 4096 for message in messages)
    assert [one["argv_truncated"] for one in found] == [True, False, True]
    assert found[0]["argv"][:3] == ["sh", "-c", "x" * 100]


async def test_an_event_that_no_server_takes_is_told(tmp_path: Path):
    """
    Longer than max_payload.
    """
    conf = tmp_path / "nats.conf"
    conf.write_text("max_payload: 8192\n")
    async with nats_server(tmp_path / "nats", "-c", str(conf)) as server:
        async with opened(NatsSink, servers=[server.url]) as sink:
            sink.put([draft(1), draft(2, argv=["x" * 10_000]), draft(3)])
            await idle(sink)
            sink.put([draft(4)])
            await idle(sink)
        assert (sink.stats().written, sink.stats().dropped) == (4, 1)
        messages = await stream_messages(server.url)
    assert told(messages)[:2] == [1, 3]
    assert sorted(map(str, told(messages)[2:])) == ["1", "4"]


async def test_logging_in_and_tls(tmp_path: Path):
    """
    A user with a password, over TLS, with a certificate of our own; a wrong password is told.
    """
    make_certificates(tmp_path)
    conf = tmp_path / "nats.conf"
    conf.write_text(
        f"""
        authorization {{ user: agent, password: secret }}
        tls {{
            cert_file: "{tmp_path}/server.pem"
            key_file: "{tmp_path}/server.key"
            ca_file: "{tmp_path}/ca.pem"
            verify: true
        }}
        """
    )
    async with nats_server(tmp_path / "nats", "-c", str(conf)) as server:
        options: dict[str, Any] = {
            "servers": [f"tls://localhost:{server.port}"],
            "tls_ca": f"{tmp_path}/ca.pem",
            "tls_cert": f"{tmp_path}/server.pem",
            "tls_key": f"{tmp_path}/server.key",
            "user": "agent",
        }
        async with opened(NatsSink, **options, password="secret") as sink:
            sink.put(drafts(1, 10))
            await idle(sink)
            assert sink.stats().written == 10
        async with opened(NatsSink, **options, password="wrong") as sink:
            await until(lambda: sink.stats().failures)
            assert "uthorization" in sink.stats().error


async def test_a_host_that_may_speak_only_for_itself(tmp_path: Path):
    """
    What docs/fleet.md says is enough; another host's name is refused.
    """
    conf = tmp_path / "nats.conf"
    conf.write_text(
        """
        authorization { users: [
            { user: admin, password: a }
            { user: web-1, password: w, permissions: {
                publish: ["procwatch.web-1.>", "$JS.API.STREAM.INFO.procwatch", "$JS.API.STREAM.MSG.GET.procwatch"]
                subscribe: ["_INBOX.>"]
            } }
        ] }
        """
    )
    import nats

    async with nats_server(tmp_path / "nats", "-c", str(conf)) as server:
        admin = {"user": "admin", "password": "a"}
        client = await nats.connect(server.url, **admin)
        await client.jetstream().add_stream(name="procwatch", subjects=["procwatch.>"])
        await client.close()
        options: dict[str, Any] = {
            "servers": [server.url], "user": "web-1", "password": "w", "create": False,
            "spool": str(tmp_path / "spool"),
        }  # fmt: skip
        for first in (1, 101):  # the second one asks for the last message
            async with opened(NatsSink, **options) as sink:
                sink.put(drafts(first, first + 99))
                await idle(sink)
        assert told(await stream_messages(server.url, **admin)) == list(range(1, 201))
        other = NatsSink.of(maker=Maker("db-1", MAKER.clock), encode=ENCODE, **{**options, "spool": None})
        await other.open()
        other.put(drafts(1, 1))
        await until(lambda: other.stats().failures, "the refusal")
        await other.close()
        assert "ermissions" in other.stats().error
        assert (other.stats().dropped, other.stats().pending) == (1, 0)
        assert len(await stream_messages(server.url, **admin)) == 200


def make_certificates(folder: Path) -> None:
    """
    A certificate of localhost, which is its own authority.
    """
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "server.key", "-out", "server.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    (folder / "ca.pem").write_bytes((folder / "server.pem").read_bytes())


async def test_nobody_there_does_not_hold_up_closing(tmp_path: Path):
    """
    With a spool everything is kept; without one what is lost is counted.
    """
    nowhere = ["nats://127.0.0.1:1"]
    async with opened(NatsSink, servers=nowhere, spool=str(tmp_path / "spool")) as sink:
        sink.put(drafts(1, 100))
        await until(lambda: sink.stats().failures)
    assert (sink.stats().written, sink.stats().dropped) == (0, 0)
    async with nats_server(tmp_path / "nats") as server:
        async with opened(NatsSink, servers=[server.url], spool=str(tmp_path / "spool")) as sink:
            await until(lambda: sink.stats().written == 100, "what was spooled being there")
        assert told(await stream_messages(server.url)) == list(range(1, 101))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"servers": []}, "servers"),
        ({"prefix": "a b"}, "prefix"),
        ({"stream": "a.b"}, "stream"),
        ({"replicas": 0}, "replicas"),
        ({"spool": "/x", "spool_bytes": "1KiB"}, "spool_bytes"),
        ({"tls_ca": "/no/such"}, "/no/such"),
    ],
)
async def test_options_that_cannot_be_are_named(options: dict[str, Any], error: str):
    """
    With the value.
    """
    with pytest.raises(ConfigError, match=error):
        await make(NatsSink, **{"servers": ["nats://x"], **options}).open()
