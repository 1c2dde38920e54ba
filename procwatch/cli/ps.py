"""
`procwatch ps`: the same fields for what runs now.
"""

from __future__ import annotations

import os
import sys

import click

from procwatch.cli.output import encoder, format_option, open_output
from procwatch.clock import Clock
from procwatch.table.draft import Maker
from procwatch.watcher import snapshot


@click.command()
@format_option
@click.option("--output", metavar="FILE", help="Append to FILE instead of standard output.")
def ps(form: str, output: str | None) -> None:
    """
    Print the processes that run now.
    """
    fd = open_output(output)
    encode_into = encoder(form, fd, Maker("", Clock()))
    lines = bytearray()
    for event in snapshot():
        encode_into(event, lines)
    with os.fdopen(fd, "wb", closefd=fd != sys.stdout.fileno()) as stream:
        stream.write(lines)
