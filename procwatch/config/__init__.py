"""
The configuration of the service: TOML in, checked values out. docs/config.md and contrib/procwatch.toml explain it.

What is allowed stands in one place each: for the top level in `Config`, for `[metrics]` in `Metrics`, for `filter` in
the constructor of `Filter`, and for `[[sinks]]` in the constructor of the sink's class and the `common` of it. Checking
reads these types, so there is no second list that could differ.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

from procwatch.config.check import PREFIX, Checker, Invalid, Problem, variables
from procwatch.config.model import RELOADED, Config, Metrics, SinkTable
from procwatch.config.text import find_lines
from procwatch.errors import ConfigError

__all__ = [
    "PATH",
    "RELOADED",
    "Config",
    "Invalid",
    "Metrics",
    "Problem",
    "SinkTable",
    "parse",
    "read",
    "unknown_variables",
]

PATH = "/etc/procwatch/procwatch.toml"
# Names the file, for the command line.
FILE_VARIABLE = "PROCWATCH_CONFIG"


def read(path: str, environ: Mapping[str, str]) -> Config:
    """
    The configuration in a file, with what the environment overrides.

    Raises:
        Invalid: With every problem that was found.
        ConfigError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse(data, path, environ)


def parse(data: bytes, name: str, environ: Mapping[str, str]) -> Config:
    """
    The same for the contents of a file.

    Raises:
        Invalid: With every problem that was found.
    """
    try:
        text = data.decode()
        tables = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Invalid([Problem(f"{name}:{line}", "not UTF-8: TOML is always")]) from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise Invalid([_syntax(name, str(error), data)]) from error
    checker = Checker(name, find_lines(text))
    checker.override(tables, environ)
    config = checker.config(tables)
    if checker.problems:
        raise Invalid(sorted(checker.problems, key=_by_line))
    return config


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """
    Variables that begin like ours and are not. Only worth a warning: for a Service that is called "procwatch"
    Kubernetes sets PROCWATCH_PORT and more in each pod.
    """
    known = variables()
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known and name != FILE_VARIABLE)


def _syntax(name: str, message: str, data: bytes) -> Problem:
    """
    tomllib ends its messages with "(at line 3, column 5)" or "(at end of document)".
    """
    at = re.search(r"\(at line (\d+), column \d+\)", message)
    line = at[1] if at else len(data.splitlines()) or 1
    text = re.sub(r" \(at [^)]*\)$", "", message)
    return Problem(f"{name}:{line}", f"not TOML: {text}")


def _by_line(problem: Problem) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0
