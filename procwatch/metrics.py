"""
The agent in numbers, for Prometheus: on a port of this host, or in a file for node_exporter's textfile collector.

Nothing is counted for each event here: what the stages count anyway is read when somebody asks. Labels have few values:
kinds of events, sources, sinks, places of loss; never a process, a user or a container. docs/metrics.md lists all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate

import aiofiles
import psutil
from msgspec import Struct

from procwatch import __version__
from procwatch.errors import ConfigError, ProcwatchError
from procwatch.latency import BOUNDS_S, Latency
from procwatch.pipeline import Stats
from procwatch.sinks import SinkStats
from procwatch.sources.select import LADDER

try:
    from prometheus_client.core import (
        CollectorRegistry,
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import choose_encoder, generate_latest
except ImportError as missing:
    raise ConfigError("metrics need prometheus-client: pip install 'procwatch[metrics]'") from missing

# A request that is longer, or takes longer, is not one of a Prometheus.
_MAX_REQUEST = 8192
_REQUEST_S = 5.0


class Vitals(Struct):
    """
    What the agent knows of itself now.
    """

    backend: str
    stats: Stats
    lost: dict[str, int]  # by place
    names: dict[str, int]
    sinks: dict[str, tuple[SinkStats, Latency]]
    started_s: float  # since 1970
    reloads: dict[str, int]  # by result


class _Family(Struct, frozen=True):
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    text: str
    labels: tuple[str, ...] = ()


_C, _G, _H = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
FAMILIES: dict[str, _Family] = {
    "procwatch_build_info": _Family(_G, "1, with the version of the agent.", ("version",)),
    "procwatch_start_time_seconds": _Family(_G, "When the agent started, seconds since 1970."),
    "procwatch_rung": _Family(_G, "1 for the rung of the ladder that runs, 0 for the others.", ("rung",)),
    "procwatch_events_total": _Family(_C, "Events that were told.", ("event", "backend")),
    "procwatch_lost_total": _Family(_C, "Events that the kernel or we dropped before the sinks.", ("where",)),
    "procwatch_coverage_ratio": _Family(_G, "Share of what the kernel itself counted that was told.", ("event",)),
    "procwatch_processes": _Family(_G, "Live processes in the table."),
    "procwatch_source_facts_total": _Family(_C, "Facts that a source gave.", ("source",)),
    "procwatch_source_wakeups_total": _Family(_C, "Reads that found something.", ("source",)),
    "procwatch_source_lost_total": _Family(_C, "Facts that a source lost.", ("source",)),
    "procwatch_source_undecoded_total": _Family(_C, "Messages that were not what the kernel promises.", ("source",)),
    "procwatch_proc_reads_total": _Family(_C, "Looks at /proc after an exec."),
    "procwatch_proc_hits_total": _Family(_C, "Looks that found the process still there."),
    "procwatch_disagreements_total": _Family(_C, "Execs of which two sources named different files."),
    "procwatch_containers": _Family(_G, "Containers that are known."),
    "procwatch_cgroups": _Family(_G, "Cgroups that are remembered."),
    "procwatch_lookups_pending": _Family(_G, "Cgroups whose container is being looked up."),
    "procwatch_lookups_refused_total": _Family(_C, "Names and hashes given up because too many waited."),
    "procwatch_sink_written_total": _Family(_C, "Events that the other end has.", ("sink",)),
    "procwatch_sink_dropped_total": _Family(_C, "Events that this sink lost.", ("sink",)),
    "procwatch_sink_failures_total": _Family(_C, "Times that writing or connecting failed.", ("sink",)),
    "procwatch_sink_pending": _Family(_G, "Events that wait, in memory and in the spool.", ("sink",)),
    "procwatch_sink_pending_peak": _Family(_G, "Most that ever waited.", ("sink",)),
    "procwatch_sink_latency_seconds": _Family(
        _H, "From the kernel's stamp until the event was written, or in the outbox of a network sink.", ("sink",)
    ),
    "procwatch_cpu_seconds_total": _Family(_C, "CPU time of the agent.", ("mode",)),
    "procwatch_resident_memory_bytes": _Family(_G, "Resident memory of the agent."),
    "procwatch_open_files": _Family(_G, "Descriptors that the agent has open."),
    "procwatch_threads": _Family(_G, "Threads of the agent."),
    "procwatch_config_reloads_total": _Family(_C, "Reloads of the configuration.", ("result",)),
}


class Metrics:
    """
    Everything in FAMILIES, as text.

    Args:
        look: Gives what the agent knows now.
    """

    def __init__(self, look: Callable[[], Vitals]) -> None:
        self._look = look
        self._process = psutil.Process()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """
        In Prometheus' text format.
        """
        return generate_latest(self._registry)

    def answer(self, accept: str) -> tuple[str, bytes]:
        """
        Content type and text, in the format that the header `Accept` asks for.
        """
        encode, kind = choose_encoder(accept)
        return kind, encode(self._registry)

    def collect(self) -> Iterator[Metric]:
        """
        Called by the registry.
        """
        vitals = self._look()
        values = {**_of_events(vitals), **self._of_agent(vitals)}
        for name, family in FAMILIES.items():
            metric = family.kind(name.removesuffix("_total"), family.text, labels=family.labels)
            if isinstance(metric, HistogramMetricFamily):
                for sink, (_, latency) in vitals.sinks.items():
                    metric.add_metric([sink], _buckets(latency), latency.sum_s)
            else:
                for labels, value in values[name].items():
                    metric.add_metric(labels, value)
            yield metric

    def _of_agent(self, vitals: Vitals) -> dict[str, dict[tuple[str, ...], float]]:
        with self._process.oneshot():
            cpu = self._process.cpu_times()
            memory, threads, files = (
                self._process.memory_info().rss,
                self._process.num_threads(),
                self._process.num_fds(),
            )
        return {
            "procwatch_build_info": {(__version__,): 1},
            "procwatch_start_time_seconds": {(): vitals.started_s},
            "procwatch_cpu_seconds_total": {("user",): cpu.user, ("system",): cpu.system},
            "procwatch_resident_memory_bytes": {(): memory},
            "procwatch_open_files": {(): files},
            "procwatch_threads": {(): threads},
            "procwatch_config_reloads_total": {(result,): count for result, count in vitals.reloads.items()},
        }


def _of_events(vitals: Vitals) -> dict[str, dict[tuple[str, ...], float]]:
    stats, names = vitals.stats, vitals.names
    sources = {(name,): counts for name, counts in stats.sources.items()}
    sinks = {(name,): counts for name, (counts, _) in vitals.sinks.items()}
    return {
        "procwatch_rung": {(rung,): rung == vitals.backend for rung in LADDER},
        "procwatch_events_total": {(kind, vitals.backend): count for kind, count in stats.events.items()},
        "procwatch_lost_total": {(where,): count for where, count in vitals.lost.items()},
        "procwatch_coverage_ratio": {(kind,): share for kind, share in stats.coverage.items()},
        "procwatch_processes": {(): stats.processes},
        "procwatch_source_facts_total": {name: counts.facts for name, counts in sources.items()},
        "procwatch_source_wakeups_total": {name: counts.wakeups for name, counts in sources.items()},
        "procwatch_source_lost_total": {name: counts.lost for name, counts in sources.items()},
        "procwatch_source_undecoded_total": {name: counts.undecoded for name, counts in sources.items()},
        "procwatch_proc_reads_total": {(): stats.proc_reads},
        "procwatch_proc_hits_total": {(): stats.proc_hits},
        "procwatch_disagreements_total": {(): stats.disagreements},
        "procwatch_containers": {(): names.get("containers", 0)},
        "procwatch_cgroups": {(): names.get("cgroups", 0)},
        "procwatch_lookups_pending": {(): names.get("pending", 0)},
        "procwatch_lookups_refused_total": {(): names.get("refused", 0)},
        "procwatch_sink_written_total": {name: counts.written for name, counts in sinks.items()},
        "procwatch_sink_dropped_total": {name: counts.dropped for name, counts in sinks.items()},
        "procwatch_sink_failures_total": {name: counts.failures for name, counts in sinks.items()},
        "procwatch_sink_pending": {name: counts.pending for name, counts in sinks.items()},
        "procwatch_sink_pending_peak": {name: counts.peak for name, counts in sinks.items()},
    }


def _buckets(latency: Latency) -> list[tuple[str, float]]:
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(map(float, latency.counts)), strict=True))


class Port:
    """
    Answers `GET /metrics` on one address. No more of HTTP than a scraper needs, on the agent's own loop: a library's
    server would read the counters from another thread while they change.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    async def open(self, address: str, port: int) -> int:
        """
        Listen; gives the port, which is another one for 0.

        Raises:
            ProcwatchError: It is in use, or not ours to use.
        """
        try:
            self._server = await asyncio.start_server(self._serve, address, port, limit=_MAX_REQUEST)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ProcwatchError(f"metrics: cannot listen on {address}:{port}: {reason}") from error
        chosen: int = self._server.sockets[0].getsockname()[1]
        return chosen

    async def close(self) -> None:
        """
        Listen no more.
        """
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S):
                request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                writer.write(self._answer(request))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    def _answer(self, request: str) -> bytes:
        first, *headers = request.split("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return _response("405 Method Not Allowed", "text/plain", b"only GET\n")
        if path not in ("/metrics", "/"):
            return _response("404 Not Found", "text/plain", b"see /metrics\n")
        accept = [value for name, _, value in (line.partition(":") for line in headers) if name.lower() == "accept"]
        return _response("200 OK", *self._metrics.answer(",".join(accept)))


def _response(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


async def write_textfile(metrics: Metrics, path: str) -> None:
    """
    Write the text beside `path` and put it in place at once, mode 0644 for the collector; off the loop.

    Raises:
        OSError: It cannot be written.
    """
    new = f"{path}.{os.getpid()}.new"
    try:
        async with aiofiles.open(new, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            await file.write(metrics.text())
        os.replace(new, path)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise
