"""
procwatch: every process that runs on a Linux host.

One way through, each arrow a function call downward; no stage imports another, only the pipeline sees them all:

    kernel -> sources -> table -> formats -> sinks
    bytes     facts      events   text       bytes
       wire/ decodes         enrich/ gives names

    watch(), Watcher   the stream of events on asyncio;  watch_sync() without it
    snapshot()         what runs now
    events, facts      the types at the two borders
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from procwatch.errors import (
        ConfigError,
        DecodeError,
        InternalError,
        ProcwatchError,
        SourceLost,
        SourceUnavailable,
    )
    from procwatch.events import DEFAULT_KINDS, KINDS, AnyEvent, Event
    from procwatch.policy.filter import Filter
    from procwatch.watcher import Subscription, Watcher, snapshot, watch, watch_sync

_HOMES = {
    "ConfigError": "errors",
    "DecodeError": "errors",
    "InternalError": "errors",
    "ProcwatchError": "errors",
    "SourceLost": "errors",
    "SourceUnavailable": "errors",
    "DEFAULT_KINDS": "events",
    "KINDS": "events",
    "AnyEvent": "events",
    "Event": "events",
    "Filter": "policy.filter",
    "Subscription": "watcher",
    "Watcher": "watcher",
    "snapshot": "watcher",
    "watch": "watcher",
    "watch_sync": "watcher",
}
__all__ = [  # noqa: RUF022  the order of _HOMES
    "ConfigError",
    "DecodeError",
    "InternalError",
    "ProcwatchError",
    "SourceLost",
    "SourceUnavailable",
    "DEFAULT_KINDS",
    "KINDS",
    "AnyEvent",
    "Event",
    "Filter",
    "Subscription",
    "Watcher",
    "snapshot",
    "watch",
    "watch_sync",
]


def __getattr__(name: str) -> Any:
    """
    Load what is asked for, when it is asked for: `import procwatch` alone must cost nothing.
    """
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"procwatch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'procwatch' has no attribute {name!r}")
