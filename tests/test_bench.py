"""
bench: small storms, real agents; the figures are of what they claim to be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from procwatch import bench, peers, storms
from procwatch.cli import cli
from procwatch.sources.select import LADDER, Options
from tests.conftest import need

KEYS = {"backend", "exe", "argv", "cwd", "cgroup", "lost", "cpu_ms_per_1k", "slowdown", "latency_ms"}


def test_contract():
    """
    A row for each backend that works here, with all keys; shares are between 0 and 1.
    """
    result = CliRunner().invoke(cli, ["bench", "--json", "--count", "30", "--no-peers"])
    data = json.loads(result.stdout)

    working = [backend for backend, ((_, make), *_) in LADDER.items() if make(Options()).probe() is None]
    assert [row["backend"] for row in data["backends"]] == working
    for row in data["backends"]:
        assert set(row) >= KEYS
        assert all(0 <= row[name] <= 1 for name in ("exe", "argv", "cwd", "cgroup"))
        assert row["cpu_ms_per_1k"] > 0
        assert row["slowdown"] > 0
        assert set(row["latency_ms"]) == {"p50", "p99"}


def test_ebpf_sees_all():
    """
    The best rung has every field of every exec, in bounded time.
    """
    need(LADDER["ebpf"][0][1](Options()).probe() is None, "needs eBPF")
    (row,) = bench.bench(60, ["ebpf"], with_peers=False).backends

    assert (row.exe, row.argv, row.cwd, row.cgroup, row.lost) == (1, 1, 1, 1, 0)
    assert row.latency_ms.p50 is not None
    assert row.latency_ms.p99 is not None
    assert 0 < row.latency_ms.p50 <= row.latency_ms.p99
    assert row.max_rss_bytes > 1 << 20


def test_table_for_people():
    """
    One line for each backend, below a heading.
    """
    result = CliRunner().invoke(cli, ["bench", "--count", "3", "--backend", "scan", "--no-peers"])

    heading, row = result.stdout.splitlines()
    assert result.exit_code == 0
    assert heading.split()[:2] == ["exe", "argv"]
    assert row.startswith("scan")


def test_no_such_count():
    """
    Nothing to measure is a mistake of the user.
    """
    result = CliRunner().invoke(cli, ["bench", "--count", "0"])

    assert result.exit_code != 0
    assert "--count 0" in str(result.exception)


def test_peer_is_measured():
    """
    Another tool runs beside the same storm; one that ends at once is left out.
    """
    printer = peers.Peer("printer", [sys.executable, "-c", "import time; time.sleep(60)"])
    with storms.installed() as tiny, bench._storm(tiny) as storm:
        row = bench._measure_peer(printer, storm, 3)
        assert bench._measure_peer(peers.Peer("none", ["false"]), storm, 3) is None

    assert row is not None
    assert (row.exe, row.lost) == (0, 6)  # with those that warm up
    assert {peer.name for peer in peers.installed()} <= {"execsnoop", "execsnoop-bpfcc", "forkstat", "bpftrace"}


def test_storm_runs_that_many():
    """
    Every process of a storm is started, has the mark and its number as arguments, and is waited for.
    """
    with storms.installed() as tiny:
        seconds = storms.storm(tiny, 5, "mark")

    assert seconds > 0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_program_ends_with_its_input():
    """
    The program of the storms waits for its input, and ends with code 0.
    """
    with storms.installed() as tiny, subprocess.Popen([tiny], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
        process.communicate(b"x")

    assert process.returncode == 0


def test_another_machine(monkeypatch: pytest.MonkeyPatch):
    """
    Where no program is known for the machine, an ordinary one serves.
    """
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6.0", "v", "vax")))
    with storms.installed() as path:
        assert os.path.basename(path) != "tiny"
        assert storms.storm(path, 2, os.devnull) > 0
