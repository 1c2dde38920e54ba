"""
Values as users write them, checked in one place for the command line, the library and the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from procwatch.errors import ConfigError
from procwatch.events import KINDS

MIN_BUFFER = 4 << 10
MAX_BUFFER = 1 << 30
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30, "gib": 1 << 30,
          "kb": 10**3, "mb": 10**6, "gb": 10**9}  # fmt: skip


def size(text: int | str) -> int:
    """
    A number of bytes, from 4096, "64KiB", "1MiB", "1.5 GiB".

    Raises:
        ConfigError: Not a size.

    >>> size("1MiB")
    1048576
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: give bytes, or a number with KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def buffer_bytes(text: int | str | None) -> int | None:
    """
    The size of a kernel buffer, or None for each source's own.

    Raises:
        ConfigError: Not a size, or one that no kernel takes.
    """
    if text is None:
        return None
    value = size(text)
    if not MIN_BUFFER <= value <= MAX_BUFFER:
        raise ConfigError(f"a buffer of {text} cannot be: 4KiB to 1GiB")
    return value


def event_kinds(kinds: Collection[str] | str) -> frozenset[str]:
    """
    Kinds of events, from a list or from "exec,exit".

    Raises:
        ConfigError: No such kind, or none at all.
    """
    names = [name.strip() for name in kinds.split(",")] if isinstance(kinds, str) else list(kinds)
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"no event kind {name!r}: choose of {', '.join(KINDS)}")
    if not names:
        raise ConfigError(f"no event kinds: choose of {', '.join(KINDS)}")
    return frozenset(names)
