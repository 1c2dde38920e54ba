"""
`procwatch ps`: the same fields for what runs now.
"""

from __future__ import annotations

import os

import click

from procwatch.cli.output import cannot_write, encoder, format_option, opened
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
    with opened(output) as fd:
        encode_into = encoder(form, fd, Maker("", Clock()))
        lines = bytearray()
        for event in snapshot():
            encode_into(event, lines)
        try:
            while lines:
                del lines[: os.write(fd, lines)]
        except BrokenPipeError:  # the reader has seen enough
            pass
        except OSError as error:
            raise cannot_write(error) from error
