"""
Where events go. `SINKS` has them by the name that the configuration uses; each is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from procwatch.sinks.base import QueueSink, Sink, SinkStats

__all__ = ["SINKS", "QueueSink", "Sink", "SinkStats"]

_PLACES = {
    "stdout": "procwatch.sinks.stdout:StdoutSink",
    "file": "procwatch.sinks.file:FileSink",
    "journald": "procwatch.sinks.journald:JournaldSink",
    "syslog": "procwatch.sinks.syslog:SyslogSink",
    "unix": "procwatch.sinks.unix:UnixSink",
    "otlp": "procwatch.sinks.otlp:OtlpSink",
    "nats": "procwatch.sinks.nats:NatsSink",
}


class _Sinks(Mapping[str, type[QueueSink]]):
    """
    Importing all of them would cost every start of the command line more than it does itself.
    """

    def __getitem__(self, name: str) -> type[QueueSink]:
        module, _, kind = _PLACES[name].partition(":")
        found: type[QueueSink] = getattr(import_module(module), kind)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


SINKS: Mapping[str, type[QueueSink]] = _Sinks()
