"""
The formats are a promise: a change of any byte shows here. `python -m tests.formats.samples` writes the files anew.
"""

from __future__ import annotations

import pytest

from procwatch.formats import FORMATS
from tests.formats.samples import GOLDEN, lines


@pytest.mark.parametrize("form", ["json", "ecs", "otel", "logfmt"])
def test_lines_are_as_they_were(form: str):
    """
    One event of each shape.
    """
    assert lines(form) == (GOLDEN / f"{form}.txt").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_every_event(form: str):
    """
    A line each; for people, `ready` is several.
    """
    written = lines(form).splitlines()
    assert len(written) >= len(lines("json").splitlines())
