"""
The agent in numbers.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from procwatch import metrics
from procwatch.errors import ProcwatchError
from procwatch.latency import BOUNDS_S, Latency
from procwatch.metrics import FAMILIES, Metrics, Port, Vitals
from procwatch.pipeline import Stats
from procwatch.sinks import SinkStats
from procwatch.sources.base import SourceStats


def look() -> Vitals:
    latency = Latency()
    latency.add([0, 90, 99], 100_000_000, lambda item: item * 1_000_000)
    return Vitals(
        backend="netlink",
        stats=Stats(
            events={"exec": 5, "ready": 1},
            lost=3,
            processes=7,
            sources={"netlink": SourceStats(facts=9, wakeups=2, lost=3, undecoded=1)},
            proc_reads=5,
            proc_hits=4,
            disagreements=0,
            coverage={"fork": 0.75},
        ),
        lost={"netlink_socket": 3},
        names={"containers": 2, "cgroups": 4, "pending": 1, "refused": 0},
        sinks={"file": (SinkStats(written=5, dropped=1, pending=2, peak=3, failures=1), latency)},
        started_s=1.5,
        reloads={"ok": 2, "failed": 0},
    )


def samples(text: str) -> dict[str, float]:
    """
    Name and labels of each sample, with its value.
    """
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestText:
    """
    What a scraper reads.
    """

    def test_values(self):
        """
        Each number stands where it belongs.
        """
        found = samples(Metrics(look).text().decode())

        expected = {
            "procwatch_start_time_seconds": 1.5,
            "procwatch_rung,rung=netlink": 1,
            "procwatch_rung,rung=ebpf": 0,
            "procwatch_events_total,backend=netlink,event=exec": 5,
            "procwatch_lost_total,where=netlink_socket": 3,
            "procwatch_coverage_ratio,event=fork": 0.75,
            "procwatch_processes": 7,
            "procwatch_source_undecoded_total,source=netlink": 1,
            "procwatch_proc_hits_total": 4,
            "procwatch_containers": 2,
            "procwatch_sink_dropped_total,sink=file": 1,
            "procwatch_sink_pending_peak,sink=file": 3,
            "procwatch_sink_latency_seconds_bucket,le=0.001,sink=file": 1,
            "procwatch_sink_latency_seconds_bucket,le=0.01,sink=file": 2,
            "procwatch_sink_latency_seconds_bucket,le=+Inf,sink=file": 3,
            "procwatch_sink_latency_seconds_count,sink=file": 3,
            "procwatch_config_reloads_total,result=ok": 2,
        }
        assert {name: found[name] for name in expected} == expected
        assert found["procwatch_resident_memory_bytes"] > 1 << 20

    def test_all_families_are_there(self):
        """
        Whatever is told, it is in FAMILIES, with that type and those labels, and all of these are told.
        """
        families = {family.name: family for family in text_string_to_metric_families(Metrics(look).text().decode())}

        assert set(families) == {name.removesuffix("_total") for name in FAMILIES}
        for name, family in FAMILIES.items():
            told = families[name.removesuffix("_total")]
            labels = {label for sample in told.samples for label in sample.labels} - {"le"}
            assert (labels, told.documentation) == (set(family.labels), family.text)

    def test_documented(self):
        """
        docs/metrics.md has exactly these, with their types and labels.
        """
        rows = re.findall(r"(?m)^\| `(procwatch_\w+)` \| (\w+) \| (.*?) ?\|", Path("docs/metrics.md").read_text())
        documented = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}

        kinds = {"CounterMetricFamily": "counter", "GaugeMetricFamily": "gauge", "HistogramMetricFamily": "histogram"}
        assert documented == {name: (kinds[one.kind.__name__], one.labels) for name, one in FAMILIES.items()}

    def test_units_in_names(self):
        """
        A counter's name ends in _total, and times and sizes say their unit.
        """
        for name, family in FAMILIES.items():
            assert name.endswith("_total") == (family.kind is CounterMetricFamily)
            assert not re.search(r"_(ms|ns|kb|mib)\b", name)

    def test_dashboard(self):
        """
        The dashboard asks for nothing else.
        """
        dashboard = json.loads(Path("contrib/grafana/procwatch.json").read_text())
        asked = {
            name.removesuffix("_bucket")
            for panel in dashboard["panels"]
            for target in panel["targets"]
            for name in re.findall(r"procwatch_\w+", target["expr"])
        }

        assert asked <= set(FAMILIES)
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


class TestPort:
    """
    The port.
    """

    @staticmethod
    async def ask(request: bytes) -> tuple[str, bytes]:
        """
        Head and body of the answer.
        """
        port = Port(Metrics(look))
        number = await port.open("127.0.0.1", 0)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            writer.write(request)
            writer.write_eof()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            return head.decode(), body
        finally:
            await port.close()

    async def test_metrics(self, no_leaks: None):
        """
        GET /metrics gives the text.
        """
        head, body = await self.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

        assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=")
        assert f"Content-Length: {len(body)}" in head
        assert samples(body.decode())["procwatch_processes"] == 7

    async def test_openmetrics(self):
        """
        Who asks for OpenMetrics gets that.
        """
        head, body = await self.ask(b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n")

        assert "Content-Type: application/openmetrics-text" in head
        assert body.endswith(b"# EOF\n")

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /other HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
            (b"\xff\x00\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
            (b"GET /metrics", ""),
            (b"x" * 100_000, ""),
        ],
    )
    async def test_others(self, request_: bytes, status: str):
        """
        Anything else is refused, or ends.
        """
        try:
            head, _ = await self.ask(request_)
        except ConnectionError:
            head = ""

        assert head.partition("\r\n")[0] == status

    async def test_in_use(self):
        """
        A port that is in use is one line.
        """
        one, other = Port(Metrics(look)), Port(Metrics(look))
        number = await one.open("127.0.0.1", 0)
        with pytest.raises(ProcwatchError, match=rf"^metrics: cannot listen on 127\.0\.0\.1:{number}: Address already"):
            await other.open("127.0.0.1", number)
        await one.close()


class TestTextfile:
    """
    The file.
    """

    async def test_whole(self, tmp_path: Path):
        """
        It is put in place whole, for others to read.
        """
        path = tmp_path / "procwatch.prom"
        await metrics.write_textfile(Metrics(look), str(path))

        assert samples(path.read_text())["procwatch_processes"] == 7
        assert path.stat().st_mode & 0o777 == 0o644
        assert list(tmp_path.iterdir()) == [path]

    async def test_no_place(self, tmp_path: Path):
        """
        A directory that is not there raises, and leaves nothing.
        """
        with pytest.raises(FileNotFoundError):
            await metrics.write_textfile(Metrics(look), str(tmp_path / "a" / "b"))


@given(st.lists(st.integers(0, 20_000_000_000), min_size=1, max_size=40).map(sorted), st.integers(0, 3))
def test_latency(times: list[int], more: int):
    """
    Halving a batch counts the same as looking at each event.
    """
    now = times[-1] + more
    latency = Latency()
    latency.add(times, now, lambda time_ns: time_ns)

    within: Callable[[float], int] = lambda bound: sum(now - time_ns <= int(bound * 1e9) for time_ns in times)  # noqa: E731
    cumulative = [sum(latency.counts[: bucket + 1]) for bucket in range(len(latency.counts))]
    assert cumulative == [*map(within, BOUNDS_S), len(times)]
