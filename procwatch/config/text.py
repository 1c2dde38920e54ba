"""
Words about a configuration: where a key stands, what a value may be, what somebody may have meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta

Place = tuple[str | int, ...]


def describe(kind: Any) -> str:
    """
    What a value of a type looks like, for a user.

    >>> describe(Annotated[int, Meta(ge=0, le=65535)]), describe(Literal["a", "b"]), describe(tuple[str, ...] | None)
    ('a whole number, 0 to 65535', '"a" or "b"', 'a list of texts')
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        *first, last = map(shown, arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin in (Union, UnionType):
        return " or ".join(describe(one) for one in arguments if one is not type(None))
    if origin in (list, tuple, frozenset):
        return f"a list of {_many(arguments[0])}"
    if origin is dict:
        return f"a table of {_many(arguments[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table"}
    return names.get(kind, "another value")


def _many(kind: Any) -> str:
    return {str: "texts", int: "whole numbers"}.get(kind) or describe(kind)


def _bounds(metas: tuple[Any, ...]) -> str:
    for meta in metas:
        if isinstance(meta, Meta) and meta.ge is not None:
            return f", {meta.ge} to {meta.le}" if meta.le is not None else f", {meta.ge} or more"
    return ""


def find_lines(text: str) -> dict[Place, int]:
    """
    On which line each key and each table stands, as far as one can tell without a parser: tomllib does not say it.

    >>> find_lines('a = 1\\n[[sinks]]\\ntype = "x"\\n[[sinks]]\\nmore.b = 2')[("sinks", 1, "more", "b")]
    5
    """
    lines: dict[Place, int] = {}
    table: Place = ()
    counts: dict[Place, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)([^\[\]]+)\]", line):
            table = _keys(header[2])
            if table[:1] == ("sinks",) and header[1] == "[" and ("sinks",) in counts:
                table = ("sinks", counts["sinks",] - 1, *table[1:])  # [sinks.filter] belongs to the last one
            if header[1] == "[[":
                lines.setdefault(table, number)
                counts[table] = counts.get(table, 0) + 1
                table = (*table, counts[table] - 1)
            lines.setdefault(table, number)
        elif assignment := re.match(r"\s*([\w.\-\"' ]+?)\s*=", line):
            keys = (*table, *_keys(assignment[1]))
            for end in range(len(table) + 1, len(keys) + 1):
                lines.setdefault(keys[:end], number)
    return lines


def _keys(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def nearest(word: Any, known: Collection[str]) -> str:
    close = get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
