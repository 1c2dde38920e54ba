"""
`procwatch config`: the agent's configuration.
"""

from __future__ import annotations

import os
import sys

import click

from procwatch.formats.text import safe


@click.group()
def config() -> None:
    """
    The agent's configuration.
    """


@config.command()
@click.argument("path", metavar="FILE", default="/etc/procwatch/procwatch.toml")
def check(path: str) -> None:
    """
    Print ok, or what is wrong in FILE, a line each; PROCWATCH_* variables count, too.
    """
    from procwatch.config import Invalid, read, unknown_variables

    for name in unknown_variables(os.environ):
        click.echo(f"{name}: no option is called like this environment variable", err=True)
    try:
        read(path, os.environ)
    except Invalid as error:
        for problem in error.problems:
            click.echo(safe(str(problem)), err=True)
        sys.exit(2)
    click.echo("ok")
