"""
logfmt lines can be read back.
"""

from __future__ import annotations

import re

from hypothesis import given

from procwatch.events import Event, ProcessEvent
from procwatch.formats import logfmt
from procwatch.formats.text import quote_all, safe
from tests.formats.any import any_event
from tests.formats.samples import EVENTS

PAIR = re.compile(r'([^\s="]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]*)(?: |$)')


def read(event: Event) -> dict[str, str]:
    """
    The pairs of its one line; all of the line is pairs.
    """
    buffer = bytearray()
    logfmt.encode_into(event, buffer)
    text = buffer.decode()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    pairs = {}
    at = 0
    while at < len(text) - 1:
        match = PAIR.match(text[:-1], at)
        assert match is not None, text[at:]
        value = match[2]
        pairs[match[1]] = re.sub(r'\\(["\\])', r"\1", value[1:-1]) if value.startswith('"') else value
        at = match.end()
    return pairs


@given(any_event)
def test_any_event_is_pairs_and_no_pair_is_forged(event: Event):
    """
    Whatever a process calls itself: the keys are those of the event, and the values are its own.
    """
    pairs = read(event)
    allowed = set(event.__struct_fields__) | {"event"}
    assert {key.partition(".")[0] for key in pairs} <= allowed
    assert pairs["event"] == event.event
    if isinstance(event, ProcessEvent):
        assert pairs.get("pid") == str(event.pid)
        assert all(safe(value) == value for value in pairs.values())
        if event.comm is not None and "\\" not in event.comm and '"' not in event.comm:
            assert pairs["comm"] == safe(event.comm)
        if event.argv:
            assert pairs["argv"] == quote_all(event.argv)


def test_what_is_not_known_is_left_out():
    """
    And `missing` says why.
    """
    pairs = read(EVENTS[2])
    assert "exe" not in pairs
    assert pairs["missing.exe"] == "exited"
    assert pairs["inferred"] == "uid,cwd"
