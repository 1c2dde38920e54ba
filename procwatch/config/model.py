"""
What can be set, with defaults. docs/config.md says what each is for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from procwatch import formats, sinks
from procwatch.enrich.runtimes import Roots
from procwatch.events import DEFAULT_KINDS
from procwatch.policy.filter import NAMES_WAIT_MS, Filter
from procwatch.sources.select import BACKENDS, OPTIONAL
from procwatch.table.draft import Maker

# Arguments of Watcher that are called the same there.
_PLAIN = (
    "backend", "events", "initial", "buffer", "latency_ms", "fork_hold_ms", "ancestors", "without", "hold",
    "hash_wait_ms", "file_facts",
)  # fmt: skip

Backend = Literal[BACKENDS]  # type: ignore[valid-type]
Optional = Literal[OPTIONAL]  # type: ignore[valid-type]
Milliseconds = Annotated[float, Meta(ge=0, le=86_400_000)]
Port = Annotated[int, Meta(ge=0, le=65_535)]


class Metrics(Struct, frozen=True, kw_only=True):
    """
    `[metrics]`: without the table there are none.
    """

    address: str = "127.0.0.1"
    port: Port = 9123  # 0: no port
    textfile: str = ""  # "": none
    interval_s: Annotated[float, Meta(ge=1, le=3600)] = 15.0


class SinkTable(Struct, frozen=True, kw_only=True):
    """
    One `[[sinks]]` table.
    """

    type: str
    name: str
    format: str = ""  # "": the sink's own, mostly "json"
    events: tuple[str, ...] | None = None  # None: all that there are
    filter: dict[str, list[str]] = {}
    options: dict[str, Any] = {}  # the rest: what the constructor of this type takes

    def make(self, maker: Maker) -> sinks.QueueSink:
        """
        The sink, not opened yet.

        Raises:
            ConfigError: A value that its constructor does not take.
        """
        keep = Filter(**self.filter) if self.filter else None
        kind = sinks.SINKS[self.type]
        return kind.of(
            maker=maker,
            encode=formats.FORMATS[self.format or kind.default_format](maker),
            events=None if self.events is None else frozenset(self.events),
            keep=keep,
            **self.options,
        )


class Config(Struct, frozen=True, kw_only=True):
    """
    The top level. Those in RELOADED take effect on SIGHUP, the others when the agent is started again.
    """

    backend: Backend = "auto"
    events: tuple[str, ...] = DEFAULT_KINDS
    initial: bool = False
    buffer: int | str | None = None
    latency_ms: Milliseconds = 20.0
    fork_hold_ms: Milliseconds = 100.0
    container_wait_ms: Milliseconds | None = None
    ancestors: Annotated[int, Meta(ge=0, le=128)] = 0
    without: tuple[Optional, ...] = ()
    hold: bool = False
    hash: Literal["", "sha256"] = ""
    hash_wait_ms: Milliseconds = 0.0
    file_facts: bool = False
    filter: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    host: str = ""
    host_root: str = "/"
    state: str = "/var/lib/procwatch/state.json"
    user: str = ""
    keep_privileges: bool = False
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    metrics: Metrics | None = None
    sinks: tuple[SinkTable, ...] = (SinkTable(type="stdout", name="stdout"),)

    def watcher(self) -> dict[str, Any]:
        """
        The arguments of `Watcher`.
        """
        arguments = {name: getattr(self, name) for name in _PLAIN}
        return {
            **arguments,
            "roots": Roots(prefix=self.host_root),
            "hash": self.hash or None,
            "keep": self.keep(),
            "container_wait_ms": self.names_wait_ms(),
        }

    def keep(self) -> Filter | None:
        """
        The filter for all sinks.
        """
        return Filter(**self.filter) if self.filter else None

    def names_wait_ms(self) -> float:
        """
        How long events wait for the names of their container: a name that is not known yet must not hide an event.
        """
        if self.container_wait_ms is not None:
            return self.container_wait_ms
        filters = [self.filter, *(table.filter for table in self.sinks)]
        return NAMES_WAIT_MS if any(Filter(**one).needs_names for one in filters) else 0.0


# What a SIGHUP changes.
RELOADED = frozenset({"filter", "labels", "drain_s", "log_level", "log_format", "metrics", "sinks"})
