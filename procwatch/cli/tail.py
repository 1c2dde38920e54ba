"""
`procwatch tail`: what the agent on this host sees, from now on.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import click
from msgspec import DecodeError as NotAnEvent
from msgspec.json import Decoder

from procwatch import options
from procwatch.cli.output import FORMATS, cannot_write
from procwatch.errors import ConfigError, ProcwatchError
from procwatch.events import AnyEvent, Event
from procwatch.sinks.unix import DEFAULT_PATH

CHUNK = 1 << 18


@click.command()
@click.option("--socket", "path", default=DEFAULT_PATH, show_default=True, metavar="PATH", help="The agent's socket.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="console on a terminal and the agent's lines otherwise, or one of them.",
)
@click.option("--events", metavar="KIND,...", help="Only these kinds; ready, lost and stop always come.")
def tail(path: str, form: str, events: str | None) -> None:
    """
    Print what the agent on this host sees, from now on.
    """
    kinds = options.event_kinds(events) if events is not None else None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    as_lines = form == "json" or (form == "auto" and not sys.stdout.isatty())
    show = _Show(as_lines, kinds)
    with _connect(path) as connection:
        for lines in _batches(connection):
            try:
                sys.stdout.buffer.write(b"".join(map(show, lines)))
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise cannot_write(error) from error
    if show.last != "stop":
        raise ProcwatchError(f"the agent has closed the connection: {path}")


class _Show:
    """
    One line of the agent as it is to be printed.
    """

    def __init__(self, as_lines: bool, kinds: frozenset[str] | None) -> None:
        self._decode: Callable[[bytes], Event] = Decoder(AnyEvent).decode
        self._kinds = kinds | {"ready", "lost", "stop"} if kinds is not None else None
        self._encode: Callable[[Event], bytes] | None = None
        self.last = ""
        if not as_lines:
            from procwatch.formats.console import Console

            self._encode = Console(colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")).encode

    def __call__(self, line: bytes) -> bytes:
        try:
            event = self._decode(line)
        except NotAnEvent as error:
            raise ConfigError("the agent's socket does not speak native JSON: give its sink format = 'json'") from error
        self.last = event.event
        if self._kinds is not None and event.event not in self._kinds:
            return b""
        return line if self._encode is None else self._encode(event)


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:  # refused: the socket of one that was killed
        connection.close()
        raise ProcwatchError(f"no agent listens on {path}: start one, with a sink of type unix") from error
    except OSError as error:
        connection.close()
        raise ProcwatchError(f"cannot connect to {path}: {error.strerror or error}") from error
    return connection


def _batches(connection: socket.socket) -> Iterator[list[bytes]]:
    """
    Whole lines, as they come.
    """
    buffer = bytearray()
    while data := connection.recv(CHUNK):
        buffer += data
        whole = buffer.rfind(b"\n") + 1
        lines = bytes(buffer[:whole])
        del buffer[:whole]
        yield [line + b"\n" for line in lines.split(b"\n")[:-1]]
