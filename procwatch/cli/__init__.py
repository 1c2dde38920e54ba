"""
The command line. One module a command; this one turns errors into one line and an exit code.
"""

from __future__ import annotations

import os
import sys

import click

from procwatch import __version__
from procwatch.cli.agent import agent
from procwatch.cli.bench import bench
from procwatch.cli.config import config
from procwatch.cli.doctor import doctor
from procwatch.cli.ps import ps
from procwatch.cli.tail import tail
from procwatch.cli.watch import watch
from procwatch.errors import ConfigError, ProcwatchError
from procwatch.formats.text import safe


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="procwatch")
def cli() -> None:
    """
    See every process that runs on this host, even one that lives 150 µs.
    """


cli.add_command(watch)
cli.add_command(ps)
cli.add_command(doctor)
cli.add_command(bench)
cli.add_command(agent)
cli.add_command(config)
cli.add_command(tail)


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
    click.echo(f"procwatch: {safe(message)}", err=True)
    sys.exit(code)
