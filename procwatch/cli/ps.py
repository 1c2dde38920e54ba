"""
`procwatch ps`: the same fields for what runs now.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import click

from procwatch.cli.output import as_json, cannot_write, colourful, filter_options, format_option, opened, take_filter
from procwatch.events import Container, Running
from procwatch.formats import native
from procwatch.formats.console import Console
from procwatch.formats.text import safe
from procwatch.watcher import snapshot


@click.command()
@format_option
@click.option("--output", metavar="FILE", help="Append to FILE instead of standard output.")
@filter_options
@click.option("--containers", is_flag=True, help="Print the containers that they run in instead.")
def ps(form: str, output: str | None, containers: bool, **options: Any) -> None:
    """
    Print the processes that run now.
    """
    keep = take_filter(options)
    with opened(output) as fd:
        events = snapshot(keep=keep or None, under=options["under"])
        lines = bytearray()
        if containers:
            _write_containers(events, as_json(form, fd), lines)
        elif as_json(form, fd):
            for event in events:
                native.encode_into(event, lines)
        else:
            lines += Console(colour=colourful(fd)).table(events)
        try:
            while lines:
                del lines[: os.write(fd, lines)]
        except BrokenPipeError:  # the reader has seen enough
            pass
        except OSError as error:
            raise cannot_write(error) from error


def _write_containers(events: list[Running], as_json: bool, lines: bytearray) -> None:
    """
    One line for each container, with the number of its processes.
    """
    known: dict[str, Container] = {}
    count: Counter[str] = Counter()
    for event in events:
        if event.container is not None:
            known[event.container.id] = event.container
            count[event.container.id] += 1
    if as_json:
        from msgspec import json, structs

        for container in known.values():
            lines += json.encode({**structs.asdict(container), "processes": count[container.id]}) + b"\n"
        return
    lines += f"{'ID':14} {'RUNTIME':11} {'NAME':24} {'POD':32} {'PROCESSES':>9}  IMAGE\n".encode()
    for one in known.values():
        pod = f"{one.pod.namespace or '?'}/{one.pod.name or '?'}" if one.pod is not None else "-"
        texts = [safe(text or "?") for text in (one.id[:12], one.runtime, one.name, pod, one.image)]
        row = f"{texts[0]:14} {texts[1]:11} {texts[2]:24} {texts[3]:32} {count[one.id]:>9}  {texts[4]}\n"
        lines += row.encode("utf-8", "replace")
