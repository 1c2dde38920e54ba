"""
`procwatch bench`: what watching costs here, and how much is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from procwatch.errors import ConfigError
from procwatch.sources.select import LADDER

if TYPE_CHECKING:
    from procwatch.bench import Result

_ROW = "{:<16} {:>7} {:>7} {:>7} {:>7} {:>7} {:>10} {:>8} {:>8} {:>8} {:>8}"
_HEAD = ("", "exe", "argv", "cwd", "cgroup", "lost", "CPU ms/1k", "slowdown", "p50 ms", "p99 ms", "MiB")


@click.command()
@click.option("--count", type=int, default=5000, show_default=True, metavar="N", help="Processes for each backend.")
@click.option("--backend", "backends", type=click.Choice(list(LADDER)), multiple=True, help="Only this one.")
@click.option("--no-peers", is_flag=True, help="Leave out other tools, even if they are installed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench(count: int, backends: tuple[str, ...], no_peers: bool, as_json: bool) -> None:
    """
    Run storms of the shortest processes beside each backend: how much is seen, and what it costs.
    """
    from procwatch.bench import bench as measure

    if count < 1:
        raise ConfigError(f"--count {count} cannot be: 1 or more")

    def tell(text: str) -> None:
        if sys.stderr.isatty():
            click.echo(text, err=True)

    result = measure(count, list(backends) or None, with_peers=not no_peers, tell=tell)
    if as_json:
        from msgspec import json

        click.echo(json.encode(result).decode())
    else:
        click.echo("\n".join(_lines(result)))


def _lines(result: Result) -> Iterator[str]:
    yield _ROW.format(*_HEAD)
    for row in result.backends:
        shares = (f"{share:.1%}" for share in (row.exe, row.argv, row.cwd, row.cgroup))
        latencies = ("-" if ms is None else f"{ms:.1f}" for ms in (row.latency_ms.p50, row.latency_ms.p99))
        cost = (f"{row.cpu_ms_per_1k:.1f}", f"{row.slowdown:.2f}")
        yield _ROW.format(row.backend, *shares, row.lost, *cost, *latencies, row.max_rss_bytes >> 20)
    for peer in result.peers:
        cost = (f"{peer.cpu_ms_per_1k:.1f}", f"{peer.slowdown:.2f}")
        yield _ROW.format(
            peer.name, f"{peer.exe:.1%}", "-", "-", "-", peer.lost, *cost, "-", "-", peer.max_rss_bytes >> 20
        )
