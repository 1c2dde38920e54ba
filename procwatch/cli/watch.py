"""
`procwatch watch`: every process as it starts and ends.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import click

from procwatch import tune
from procwatch.cli.output import cannot_write, encoder, filter_options, format_option, native_lines, opened, take_filter
from procwatch.events import DEFAULT_KINDS, KINDS
from procwatch.sinks.stream import StreamSink
from procwatch.sources.select import BACKENDS, OPTIONAL
from procwatch.watcher import Watcher

TREE_DEPTH = 64
LOST = 3  # exit code


@click.command()
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="How to watch.")
@format_option
@click.option(
    "--events",
    default=",".join(DEFAULT_KINDS),
    show_default=True,
    metavar="KIND,...",
    help=f"Which events: {', '.join(KINDS)}. ready, lost and stop always come.",
)
@click.option("--initial", is_flag=True, help="Begin with the processes that run already.")
@click.option(
    "--output", metavar="FILE", help="Append to FILE instead of standard output; SIGHUP and SIGUSR1 open it anew."
)
@click.option(
    "--buffer",
    metavar="SIZE",
    help="Kernel buffer of each source, such as 1MiB.  [default: 16MiB ebpf, 64MiB netlink, 32MiB taskstats]",
)
@click.option("--for", "for_s", type=float, metavar="SECONDS", help="Stop after so long.  [default: never]")
@click.option("--count", type=int, metavar="N", help="Stop after N events of processes.  [default: never]")
@click.option("--strict", is_flag=True, help="Stop at the first loss, with exit code 3.")
@click.option(
    "--latency-ms", type=float, default=20, show_default=True, metavar="N", help="How long lines may gather under load."
)
@click.option(
    "--fork-hold-ms",
    type=float,
    default=100,
    show_default=True,
    metavar="N",
    help="How long a fork waits for its exec, to be one line with it; 0: always two lines.",
)
@click.option("--without", default="", metavar="SOURCE,...", help=f"Leave sources out: {', '.join(OPTIONAL) or '-'}.")
@click.option("--ancestors", type=int, default=0, show_default=True, metavar="N", help="Add up to N ancestors.")
@click.option("--hold", is_flag=True, help="Make each exec wait until it has been read (netlink); see docs/hold.md.")
@filter_options
@click.option("--tree", is_flag=True, help="Console: indent each process below its parent.")
@click.option(
    "--container-wait",
    "container_wait_ms",
    type=float,
    metavar="MS",
    help="How long lines may wait for the names of a new container.  [default: 0; 1000 with --container or --pod]",
)
@click.option("--hash", type=click.Choice(["sha256"]), help="Hash each executable, from the file that ran.")
@click.option(
    "--hash-wait",
    "hash_wait_ms",
    type=float,
    default=0,
    show_default=True,
    metavar="MS",
    help="How long lines may wait for a new hash.",
)
@click.option("--file-facts", is_flag=True, help="Owner, mode and capabilities of each executable.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="The agent's own diagnostics, on standard error.",
)
@click.option("--log-format", type=click.Choice(["console", "json"]), default="console", show_default=True)
def watch(
    form: str, output: str | None, without: str, tree: bool, log_level: str, log_format: str, **options: Any
) -> None:
    """
    Print every process of this host as it starts and ends.
    """
    from procwatch.cli import log

    logger = log.configure(log_level, log_format)
    keep = take_filter(options)
    if tree:
        options["ancestors"] = max(options["ancestors"], TREE_DEPTH)
    watcher = Watcher(without=[name for name in without.split(",") if name], keep=keep or None, **options)
    path = None if output == "-" else output
    with opened(path) as fd:
        complete = asyncio.run(_watch(watcher, fd, path, form, tree, options["latency_ms"] / 1000, logger))
    if options["strict"] and not complete:
        click.echo("procwatch: events were lost, and --strict was asked for; a larger --buffer may help", err=True)
        sys.exit(LOST)


async def _watch(
    watcher: Watcher, fd: int, path: str | None, form: str, tree: bool, latency_s: float, logger: Any
) -> bool:
    """
    Watch to the end; whether nothing was lost.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    failures: list[OSError] = []

    def broken(error: OSError) -> None:
        if sink.file:
            logger.warning(f"{cannot_write(error)}; trying again, and beyond 64 MiB that wait lines are lost")
            return
        failures.append(error)
        ended.set()

    maker = watcher.maker
    lines = native_lines(form, fd, maker)
    encode = lines.encode_into if lines is not None else encoder(form, fd, maker, indent=tree)
    sink = StreamSink(fd, encode, maker, latency_s=latency_s, on_closed=ended.set, on_error=broken, path=path)
    watcher.add_draft_sink(sink, lines)
    watcher.on_end(ended.set)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, watcher, loop)
    if path is not None and sink.file:
        for number in (signal.SIGHUP, signal.SIGUSR1):  # as logrotate(8) sends after it has moved the file
            loop.add_signal_handler(number, sink.reopen)
    tune.before_start()
    async with watcher:
        ready = watcher.ready
        tune.after_start(ready.backend)
        logger.info("ready", backend=ready.backend, sources=ready.sources)
        for skipped in ready.skipped:
            logger.info("skipped", name=skipped.name, reason=skipped.reason, remedy=skipped.remedy)
        for name, words in watcher.kernel_words().items():
            logger.debug("the kernel's own words", name=name, log=words)
        await ended.wait()
    sink.finish()
    watcher.raise_failure()
    if error := sink.failure or next(iter(failures), None):
        raise cannot_write(error)
    return not sink.lost and "lost" not in watcher.stats().events


def _stop(watcher: Watcher, loop: asyncio.AbstractEventLoop) -> None:
    """
    The first signal: take what the kernel has queued and end. From now on a signal ends at once.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    watcher.stop()
