"""
OTLP logs over HTTP, to an OpenTelemetry Collector or whoever speaks it: each event a log record with the attributes of
formats/otel.py.

At least once: a request that was not answered is sent again. On its way an event is kept as native JSON, which the
spool can hold and which is read back here; so what is not UTF-8 arrives as U+FFFD.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from msgspec import structs
from msgspec.json import Decoder

from procwatch.errors import ConfigError
from procwatch.events import AnyEvent, Event
from procwatch.formats import otel
from procwatch.formats.native import Lines
from procwatch.sinks.base import Record
from procwatch.sinks.outbox import SenderSink, Spooled

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord

# Of native JSON; a request is about twice as large. A Collector takes 20 MiB.
REQUEST_BYTES = 2 << 20
# What may be otherwise the next time: RFC 9110, and the OTLP specification.
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class OtlpSink(SenderSink):
    """
    Sends events as log records.

    Args:
        common: See Spooled. `encode` is not used: the form is OTLP's.
        endpoint: URL, as "http://collector:4318/v1/logs".
        headers: Of each request, for access tokens.
        compression: "gzip" or "none".
        timeout_s: For one request, with the exporter's own attempts to repeat it.
        resource: More attributes of the resource, besides service.name, service.version, host.name and os.type.
        tls_ca: File with the certificates to trust; None: those of the system.
        tls_cert, tls_key: Files of our own certificate.

    Raises:
        ConfigError: A value that cannot be; opentelemetry is not installed.
    """

    name = "otlp"
    default_format = "otel"

    def __init__(
        self,
        common: Spooled,
        *,
        endpoint: str = "http://localhost:4318/v1/logs",
        headers: dict[str, str] | None = None,
        compression: Literal["gzip", "none"] = "gzip",
        timeout_s: float = 10.0,
        resource: dict[str, str] | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> None:
        super().__init__(structs.replace(common, encode=Lines(common.maker).encode_into))
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint={endpoint!r} cannot be: http://HOST:4318/v1/logs, or https")
        if compression not in ("gzip", "none"):
            raise ConfigError(f"compression={compression!r} cannot be: gzip or none")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s} cannot be: more than 0")
        self._endpoint = endpoint
        self._headers = headers
        self._compression = compression
        self._timeout_s = timeout_s
        self._about = {**otel.resource(common.maker.host), **(resource or {})}
        self._tls = (tls_ca, tls_cert, tls_key)
        self._decode = Decoder(AnyEvent).decode
        self._exporter: Any = None
        self._session: Any = None
        self._parts: tuple[Any, Any, Any] | None = None  # class of records, resource, scope

    def _open(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http import Compression
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.sdk._logs import ReadableLogRecord
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as error:
            raise ConfigError("the sink otlp needs opentelemetry: install procwatch[otlp]") from error
        from procwatch import __version__

        # It would write to the agent's standard error; stats() has the reason.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http").setLevel(logging.CRITICAL)
        self._session = _session()
        ca, certificate, key = self._tls
        self._exporter = OTLPLogExporter(
            endpoint=self._endpoint,
            certificate_file=ca,
            client_certificate_file=certificate,
            client_key_file=key,
            headers=self._headers,
            timeout=self._timeout_s,
            compression=Compression.Gzip if self._compression == "gzip" else Compression.NoCompression,
            session=self._session,
        )
        self._parts = (ReadableLogRecord, Resource(self._about), InstrumentationScope("procwatch", __version__))
        super()._open()

    def _send(self, records: list[Record]) -> int:
        from opentelemetry.sdk._logs.export import LogRecordExportResult

        assert self._exporter is not None
        size = count = 0
        for record in records:
            size += len(record.data)
            if count and size > REQUEST_BYTES:
                break
            count += 1
        batch = [self._log_record(self._decode(record.data)) for record in records[:count]]
        self._session.status, self._session.reason = 0, ""
        if self._exporter.export(batch) is LogRecordExportResult.SUCCESS:
            return count
        reason = self._session.reason or "the exporter failed"
        if 400 <= self._session.status < 600 and self._session.status not in _AGAIN:
            self._fail(OSError(reason))
            self._reject(records[:count])
            return count
        raise ConnectionError(reason)

    def _log_record(self, event: Event) -> ReadableLogRecord:
        from opentelemetry._logs import LogRecord, SeverityNumber

        assert self._parts is not None
        make, about, scope = self._parts
        number, text = otel.severity(event)
        record = LogRecord(
            timestamp=event.time_ns,
            observed_timestamp=event.time_ns,
            severity_number=SeverityNumber(number),
            severity_text=text,
            body=otel.body(event),
            attributes=otel.attributes(event),
            event_name=otel.event_name(event),
        )
        made: ReadableLogRecord = make(record, about, scope)
        return made

    def _abandon(self) -> None:
        if self._exporter is not None:
            self._exporter.shutdown()

    def _end(self) -> None:
        if self._exporter is not None and not self._abandoned:
            self._exporter.shutdown()
        if self._session is not None:
            self._session.close()
        super()._end()


def _session() -> Any:
    """
    A requests.Session that remembers how the last request ended: the exporter only says that it failed.
    """
    import requests

    class Session(requests.Session):
        status = 0
        reason = ""

        def request(self, *args: Any, **options: Any) -> requests.Response:
            try:
                response = super().request(*args, **options)
            except requests.RequestException as error:
                self.status, self.reason = 0, str(error)
                raise
            self.status, self.reason = response.status_code, f"HTTP {response.status_code} {response.reason}"
            return response

    return Session()
