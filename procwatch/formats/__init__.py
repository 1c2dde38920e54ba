"""
The only place where an event becomes text. `FORMATS` has, by the name that users write, what makes an encoder: a
function that appends one event, or the draft of one, to a buffer as a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from procwatch.events import Event
from procwatch.table.draft import Draft, Maker

if TYPE_CHECKING:
    from typing import Protocol

    class _Format(Protocol):
        def encode_into(self, event: Event, buffer: bytearray) -> None: ...


__all__ = ["FORMATS", "Encode"]

Encode = Callable[[Event | Draft, bytearray], None]


def _json(maker: Maker) -> Encode:
    from procwatch.formats.native import Lines

    return Lines(maker).encode_into


def _ecs(maker: Maker) -> Encode:
    from procwatch.formats import ecs

    return _of_events(ecs, maker)


def _otel(maker: Maker) -> Encode:
    from procwatch.formats import otel

    return _of_events(otel, maker)


def _logfmt(maker: Maker) -> Encode:
    from procwatch.formats import logfmt

    return _of_events(logfmt, maker)


def _console(maker: Maker) -> Encode:
    from procwatch.formats.console import Console

    return _of_events(Console(), maker)


def _of_events(form: _Format, maker: Maker) -> Encode:
    return lambda item, buffer: form.encode_into(maker.event(item), buffer)


FORMATS: Mapping[str, Callable[[Maker], Encode]] = {
    "json": _json,
    "ecs": _ecs,
    "otel": _otel,
    "logfmt": _logfmt,
    "console": _console,
}
