"""
`procwatch doctor`: what works here, and what would make the rest work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from procwatch.formats.text import safe

if TYPE_CHECKING:
    from procwatch.doctor import Examination, Verdict

_WIDTH = 10
_TITLES = {"short": "0.1 ms"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """
    Try each source with real processes: what works, which fields come back, why not, and what to do.

    Exit code 0 if anything works well enough to run.
    """
    from procwatch.doctor import examine

    examination = examine()
    report = examination.report
    if as_json:
        from msgspec import json

        click.echo(json.encode(report).decode())
    else:
        click.echo("\n".join(_lines(examination)))
    sys.exit(0 if report.choice is not None else 1)


def _lines(examination: Examination) -> Iterator[str]:
    report = examination.report
    yield f"kernel {safe(report.kernel)}, user {safe(report.user)}"
    yield f"auto would choose: {report.choice or 'nothing, nothing works'}"
    yield ""
    names = list(dict.fromkeys(name for seen in examination.cases.values() for name in seen))
    yield _row("source", "works", *(_TITLES.get(name, name) for name in names))
    for verdict in report.sources:
        seen = examination.cases.get(verdict.name, {})
        marks = ("yes" if seen[name] else "-" for name in names if name in seen)
        yield _row(verdict.name, "yes" if verdict.works else "no", *marks)
    everything = {field for verdict in report.sources for field in verdict.fields}
    yield ""
    for verdict in report.sources:
        yield from _details(verdict, everything)
    yield ""
    for note in examination.notes:
        yield safe(f"{note.topic}: {note.text}" + (f" -> {note.remedy}" if note.remedy else ""))


def _row(*cells: str) -> str:
    return "".join(cell.ljust(_WIDTH) for cell in cells).rstrip()


def _details(verdict: Verdict, everything: set[str]) -> Iterator[str]:
    """
    What comes back, or which few fields do not; why, and what to do.
    """
    lacking = sorted(everything - set(verdict.fields))
    if verdict.works:
        few = len(lacking) < len(verdict.fields)
        what = f"all fields but {', '.join(lacking)}" if few and lacking else ", ".join(verdict.fields)
        yield f"{verdict.name}: {what if lacking else 'all fields'}"
    else:
        yield f"{verdict.name}: does not work"
    if verdict.reason is not None:
        yield f"  why     {safe(verdict.reason)}"
    if verdict.remedy is not None:
        yield f"  remedy  {safe(verdict.remedy)}"
