"""
Process events through an application's own structlog processors: one log, one form, one place where secrets go.

    python examples/structlog_pipeline.py

Importing procwatch configures no logging: what stands here is the application's.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
import structlog
from structlog.typing import EventDict, WrappedLogger

import procwatch


def no_passwords(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """
    A processor like any other: sees process events and the application's own lines alike.
    """
    if argv := fields.get("argv"):
        fields["argv"] = ["--password=***" if word.startswith("--password=") else word for word in argv]
    return fields


structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        no_passwords,
        structlog.processors.JSONRenderer(),
    ]
)
log = structlog.get_logger()


async def main() -> None:
    structlog.contextvars.bind_contextvars(app="shop")
    log.info("start")
    async for event in procwatch.watch():
        fields = msgspec.to_builtins(event)
        failed = event.event == "lost" or (event.event == "exit" and event.code != 0)
        (log.warning if failed else log.info)(fields.pop("event"), **fields)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
