"""
OTLP logs, to a real HTTP server that decodes the protobuf.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from procwatch import events
from procwatch.errors import ConfigError
from procwatch.sinks.otlp import OtlpSink
from tests.sinks.kit import MAKER, draft, drafts, idle, make, opened, stop, until

pytest.importorskip("opentelemetry.sdk._logs")
logs_service = pytest.importorskip("opentelemetry.proto.collector.logs.v1.logs_service_pb2")
pytestmark = pytest.mark.usefixtures("no_leaks")


class Receiver(ThreadingHTTPServer):
    """
    Answers with the status that it is told to, and keeps what it took.
    """

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.requests: list[Any] = []
        self.headers: list[Any] = []

    @property
    def url(self) -> str:
        """
        Where it listens.
        """
        return f"http://127.0.0.1:{self.server_address[1]}/v1/logs"

    def records(self) -> list[Any]:
        """
        All log records, in order.
        """
        return [
            record
            for request in self.requests
            for of_resource in request.resource_logs
            for of_scope in of_resource.scope_logs
            for record in of_scope.log_records
        ]

    def pids(self) -> list[int]:
        """
        Of the log records, as they came.
        """
        return [attributes(record)["process.pid"] for record in self.records()]


class Handler(BaseHTTPRequestHandler):
    """
    One request.
    """

    server: Receiver
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """
        Decode it.
        """
        data = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            if self.headers["Content-Encoding"] == "gzip":
                data = gzip.decompress(data)
            request = logs_service.ExportLogsServiceRequest()
            request.ParseFromString(data)
            self.server.requests.append(request)
            self.server.headers.append(self.headers)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """
        Nothing.
        """


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """
    One that listens.
    """
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(of: Any) -> dict[str, Any]:
    """
    As a dictionary.
    """
    found = {}
    for one in of.attributes:
        value = getattr(one.value, one.value.WhichOneof("value"))
        found[one.key] = [item.string_value for item in value.values] if hasattr(value, "values") else value
    return found


async def test_events_are_log_records_with_their_attributes(receiver: Receiver):
    """
    Resource, scope, name, severity, body, and the attributes of the conventions.
    """
    options = {"endpoint": receiver.url, "headers": {"authorization": "Bearer x"}, "resource": {"cloud.region": "eu"}}
    async with opened(OtlpSink, **options) as sink:
        lost = events.Lost(
            time=MAKER.clock.stamp(5), host="web-1", count=3, exact=True, where="x", since=None, until=None
        )
        sink.put([draft(7, argv=["true", "größe"]), lost, stop()])
        await idle(sink)
    (of_resource,) = receiver.requests[0].resource_logs
    about = attributes(of_resource.resource)
    assert (about["service.name"], about["host.name"], about["cloud.region"]) == ("procwatch", "web-1", "eu")
    assert of_resource.scope_logs[0].scope.name == "procwatch"
    assert receiver.headers[0]["authorization"] == "Bearer x"
    first, second, third = receiver.records()
    assert (first.event_name, first.severity_text, first.body.string_value) == (
        "procwatch.exec", "INFO", "exec 7 true 'größe'",
    )  # fmt: skip
    assert first.time_unix_nano == 1_700_000_000 * 10**9 + 7000
    found = attributes(first)
    assert found["process.executable.path"] == "/bin/true"
    assert found["process.command_args"] == ["true", "größe"]
    assert found["procwatch.id"] == "0123abcd-7-9"
    assert (second.severity_text, attributes(second)["procwatch.count"]) == ("WARN", 3)
    assert third.event_name == "procwatch.stop"


async def test_a_server_that_fails_is_tried_again(receiver: Receiver, tmp_path: Path):
    """
    Nothing is lost, and the order stays.
    """
    receiver.statuses = [503, 500, 429]
    async with opened(OtlpSink, endpoint=receiver.url, spool=str(tmp_path / "spool"), timeout_s=0.3) as sink:
        sink.put(drafts(1, 3000))
        await idle(sink)
        assert sink.stats().failures > 0
        assert "HTTP 5" in sink.stats().error or "HTTP 4" in sink.stats().error
    assert receiver.pids() == list(range(1, 3001))


async def test_what_the_server_refuses_for_good_is_dropped_and_told(receiver: Receiver):
    """
    A request that can never succeed does not stop the others.
    """
    receiver.statuses = [400]
    async with opened(OtlpSink, endpoint=receiver.url) as sink:
        sink.put(drafts(1, 10))
        await idle(sink)
        assert (sink.stats().dropped, sink.stats().error) == (10, "HTTP 400 Bad Request")
        sink.put(drafts(11, 12))
        await idle(sink)
    lost, *others = receiver.records()
    assert attributes(lost)["procwatch.count"] == 10
    assert [attributes(one)["process.pid"] for one in others] == [11, 12]
    assert sink.stats().written == 3


async def test_nobody_there_keeps_it_in_the_spool(receiver: Receiver, tmp_path: Path):
    """
    For the next agent.
    """
    options = {"spool": str(tmp_path / "spool"), "timeout_s": 0.3}
    async with opened(OtlpSink, endpoint="http://127.0.0.1:1/v1/logs", **options) as sink:
        sink.put(drafts(1, 50))
        await until(lambda: sink.stats().failures)
    assert sink.stats().dropped == 0
    async with opened(OtlpSink, endpoint=receiver.url, **options) as sink:
        await until(lambda: sink.stats().written == 50)
    assert receiver.pids() == list(range(1, 51))


async def test_large_events_go_in_requests_of_their_own(receiver: Receiver):
    """
    No request is larger than a Collector takes.
    """
    async with opened(OtlpSink, endpoint=receiver.url, compression="none") as sink:
        sink.put([draft(number, argv=["x" * 100_000] * 10) for number in range(1, 8)])
        await idle(sink)
    assert receiver.pids() == list(range(1, 8))
    assert len(receiver.requests) >= 3


@pytest.mark.parametrize(
    ("options", "error"),
    [({"endpoint": "x"}, "endpoint"), ({"compression": "zip"}, "compression"), ({"timeout_s": 0}, "timeout_s")],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], error: str):
    """
    With the value.
    """
    with pytest.raises(ConfigError, match=error):
        make(OtlpSink, **options)
