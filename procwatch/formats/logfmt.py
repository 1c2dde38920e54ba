"""
logfmt: `key=value` pairs, one event a line, the native names; what is not known is left out.

`argv` is a command line as a shell would take it; an object is written with dots (`parent.pid=1`), a list with commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from procwatch.events import Event
from procwatch.formats.text import quote_all, safe

# Nothing that a reader would take for the end of a value, or for an escape.
_PLAIN = re.compile(r'[^\s"=\\]+')
_ESCAPED = re.compile(r'(["\\])')


def encode_into(event: Event, buffer: bytearray) -> None:
    """
    Append one event as one line.
    """
    pairs = _flat("", msgspec.to_builtins(event))
    buffer += (" ".join(f"{safe(key)}={value}" for key, value in pairs) + "\n").encode()


def _flat(prefix: str, fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        key = prefix + _key(name)
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, dict):
            yield from _flat(f"{key}.", value)
        elif isinstance(value, list) and isinstance(value[0], dict):
            for at, item in enumerate(value):
                yield from _flat(f"{key}.{at}.", item)
        else:
            yield key, _value(name, value)


def _key(name: str) -> str:
    """
    Labels of containers are names, too, and may be anything.
    """
    return re.sub(r'[\s"=]', "_", name)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        value = quote_all(value) if name == "argv" else ",".join(map(str, value))
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN.fullmatch(value) and safe(value) == value else _quoted(value)


def _quoted(text: str) -> str:
    return '"' + safe(_ESCAPED.sub(r"\\\1", text)) + '"'
