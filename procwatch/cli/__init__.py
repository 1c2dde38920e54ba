"""
The command line. One module a command; this one turns errors into one line and an exit code.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from procwatch import __version__
from procwatch.errors import ConfigError, ProcwatchError

COMMANDS = ("watch", "ps", "doctor", "bench", "agent", "config", "tail")


class Commands(click.Group):
    """
    Loads a command when it is called: each would otherwise pay for what the others import.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """
        In the order in which a user meets them.
        """
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """
        The command, or None when there is none of that name.
        """
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"procwatch.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="procwatch")
def cli() -> None:
    """
    See every process that runs on this host, even one that lives 150 µs.
    """


def main() -> None:
    """
    Run the command line: exit code 0, 1 when it cannot work here, 2 when asked for something impossible, 3 when
    something was lost and `--strict` forbids it.
    """
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        _fail(error.format_message() + hint, 2)
    except ConfigError as error:
        _fail(str(error), 2)
    except ProcwatchError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader is gone, which is its right; nothing more may be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    from procwatch.formats.text import safe

    click.echo(f"procwatch: {safe(message)}", err=True)
    sys.exit(code)
