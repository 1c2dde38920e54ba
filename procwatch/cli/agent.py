"""
`procwatch agent`: the service.
"""

from __future__ import annotations

import asyncio
import os

import click


@click.command()
@click.option(
    "--config",
    "path",
    default="/etc/procwatch/procwatch.toml",
    show_default=True,
    envvar="PROCWATCH_CONFIG",
    metavar="FILE",
    help="TOML; see docs/config.md.",
)
def agent(path: str) -> None:
    """
    Run as a service, as a configuration file says. SIGHUP: take the file anew.
    """
    from procwatch.agent import Agent
    from procwatch.cli import log

    asyncio.run(Agent(path, os.environ, log.configure).run())
