"""
Where lines go, and in which form: shared by the commands that print events.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from procwatch.errors import ConfigError, ProcwatchError
from procwatch.events import Event
from procwatch.formats.text import safe
from procwatch.policy.filter import Filter
from procwatch.sinks.stream import open_file
from procwatch.table.draft import Draft, Maker

if TYPE_CHECKING:
    from procwatch.formats.native import Lines

FORMATS = ("auto", "json", "console")
Encode = Callable[[Event | Draft, bytearray], None]

format_option: Callable[[Any], Any] = click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="auto",
    show_default=True,
    help="console on a terminal and JSON otherwise, or one of them.",
)


_FILTERS: tuple[tuple[str, str, str], ...] = (
    ("container", "NAME|ID", "Only in this container."),
    ("pod", "NAMESPACE/NAME", "Only in this pod; wildcards."),
    ("user", "NAME|UID", "Only of this user."),
    ("unit", "NAME", "Only in this systemd unit; wildcards."),
    ("exe", "GLOB", "Only of this executable."),
)


def filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """
    The options that choose processes, the same for every command; each but --under may be given several times.
    """
    command = click.option("--under", type=int, metavar="PID", help="Only this process and its descendants.")(command)
    for name, metavar, text in reversed(_FILTERS):
        command = click.option(f"--{name}", multiple=True, metavar=metavar, help=text)(command)
    return command


def take_filter(options: dict[str, Any]) -> Filter:
    """
    The filter that the options say, taken out of them. A user who is not there may come yet, so that is only said.
    """
    for user in options["user"]:
        if not (user.isdecimal() or _is_known(user)):
            click.echo(f"procwatch: --user {safe(user)}: there is no such user, yet", err=True)
    return Filter(**{name: options.pop(name) for name, _, _ in _FILTERS})


def _is_known(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def as_json(form: str, fd: int) -> bool:
    """
    Whether native JSON is the format; `auto` asks the descriptor.
    """
    return form == "json" or (form == "auto" and not os.isatty(fd))


def native_lines(form: str, fd: int, maker: Maker) -> Lines | None:
    """
    The writer of native JSON, if that is the format.
    """
    if not as_json(form, fd):
        return None
    from procwatch.formats import native

    return native.Lines(maker)


def colourful(fd: int) -> bool:
    """
    Whether to write colours: to a terminal, unless the user wants none (https://no-color.org).
    """
    return os.isatty(fd) and not os.environ.get("NO_COLOR")


def encoder(form: str, fd: int, maker: Maker, *, indent: bool = False) -> Encode:
    """
    The writer of one format.
    """
    lines = native_lines(form, fd, maker)
    if lines is not None:
        return lines.encode_into
    from procwatch.formats.console import Console

    console = Console(colour=colourful(fd), indent=indent)
    return lambda item, buffer: console.encode_into(maker.event(item), buffer)


@contextmanager
def opened(path: str | None) -> Iterator[int]:
    """
    The descriptor to write to: standard output, or a file that is appended to, made with mode 0640; closed at the end.

    Raises:
        ConfigError: It cannot be written.
    """
    if path is None or path == "-":
        try:
            fd = sys.stdout.fileno()
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError("standard output is closed: give --output FILE") from error
        yield fd
        return
    try:
        fd = open_file(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {os.strerror(error.errno or 0)}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def cannot_write(error: OSError) -> ProcwatchError:
    """
    What to tell when the output fails later.
    """
    return ProcwatchError(f"cannot write: {os.strerror(error.errno or 0)}")
