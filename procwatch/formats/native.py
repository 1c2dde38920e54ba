"""
Native JSON: one object a line, the fields of procwatch.events under their own names.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.json import Encoder

from procwatch.events import Event, raw_of

_encode = Encoder().encode
_encode_into = Encoder().encode_into


def encode(event: Event) -> bytes:
    """
    One event as one line, with its newline.
    """
    try:
        return _encode(event) + b"\n"
    except UnicodeEncodeError:
        return _encode_raw(event) + b"\n"


def encode_into(event: Event, buffer: bytearray) -> None:
    """
    The same at the end of a buffer: a batch is written at once.
    """
    at = len(buffer)
    try:
        _encode_into(event, buffer, at)
    except UnicodeEncodeError:
        buffer[at:] = _encode_raw(event)
    buffer += b"\n"


def _encode_raw(event: Event) -> bytes:
    """
    For an event with bytes that are not UTF-8: U+FFFD in their place, and the exact bytes in `raw`.
    """
    fields: dict[str, Any] = _replaced(msgspec.to_builtins(event))
    fields["raw"] = raw_of(event)
    return _encode(fields)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, list):
        return [_replaced(item) for item in value]
    if isinstance(value, dict):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    return value


def schema() -> dict[str, Any]:
    """
    JSON Schema (2020-12) of a line.
    """
    from procwatch.events import AnyEvent

    definition = msgspec.json.schema(AnyEvent)
    for fields in definition["$defs"].values():
        if "event" in fields.get("properties", {}):
            fields["properties"]["raw"] = {"type": "object", "description": "exact bytes, base64, of what is not UTF-8"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "procwatch native JSON, one event a line",
        **definition,
    }
