"""
Native JSON: one valid line for each event, whatever bytes are in it.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from hypothesis import given, settings

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import Event
from procwatch.facts import Details
from procwatch.formats import native
from procwatch.table.draft import Draft, Maker, Who
from tests.formats.any import any_event, drafts, maker

VALIDATOR = jsonschema.Draft202012Validator(native.schema())


def decoded(line: bytes) -> dict[str, Any]:
    """
    The object of one line, which must be one line.
    """
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    line.decode()  # strictly
    fields: dict[str, Any] = json.loads(line)
    return fields


def example(**fields: Any) -> Event:
    """
    An exec of which only some fields matter.
    """
    who = Who("0123abcd-7-9", 7, 1, fields.pop("argv", None), False, fields.pop("parent", None))
    who.ancestors = fields.pop("ancestors", None)
    return Maker("host", Clock(offset_ns=0)).event(Draft(events.Exec, 5, who, Details(**fields), {}, [], None))


@given(any_event)
def test_any_event_is_one_valid_line_of_the_schema(event: Event):
    """
    Whatever a process calls itself.
    """
    VALIDATOR.validate(decoded(native.encode(event)))


@given(any_event)
def test_raw_has_the_exact_bytes_of_what_is_not_utf8(event: Event):
    """
    A field that could not be shown as it is stands in `raw`, and no other one.
    """
    fields = decoded(native.encode(event))
    raw = fields.get("raw", {})
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogateescape")
            assert fields[name] == data.decode("utf-8", "replace")
            assert (name in raw) == (fields[name].encode() != data)
            assert base64.b64decode(raw.get(name, base64.b64encode(data))) == data
        elif name == "argv" and value is not None:
            exact = [item.encode("utf-8", "surrogateescape") for item in value]
            shown = [item.encode() for item in fields["argv"]]
            assert ("argv" in raw) == (shown != exact)
            if "argv" in raw:
                assert [base64.b64decode(item) for item in raw["argv"]] == exact


def test_raw_reaches_into_parents_and_ancestors():
    """
    The name of each is given by its place.
    """
    odd = events.Parent("0123abcd-1-1", 1, "/bin/\udcff", "ok")
    fields = decoded(native.encode(example(parent=odd, ancestors=[odd])))
    exact = base64.b64encode(b"/bin/\xff").decode()
    assert fields["raw"] == {"parent.exe": exact, "ancestors.0.exe": exact}


def test_text_that_is_utf8_has_no_raw():
    """
    Umlauts and emoji are text.
    """
    fields = decoded(native.encode(example(exe="/bin/größe-🦀", argv=["größe", "🦀"])))
    assert (fields["exe"], fields["argv"]) == ("/bin/größe-🦀", ["größe", "🦀"])
    assert "raw" not in fields


def test_fields_of_the_kind_are_there_though_null_and_extras_are_not():
    """
    A reader may rely on the fields of the schema.
    """
    fields = decoded(native.encode(example()))
    assert fields["exe"] is None
    assert fields["container"] is None
    assert fields["missing"] == {}
    assert not {"exe_inode", "ancestors", "forked", "ns_pid"} & set(fields)


@given(drafts)
@settings(max_examples=300)
def test_the_line_of_a_draft_is_the_line_of_its_event(item: Draft):
    """
    To the byte, also when the parts that processes have in common were written before.
    """
    lines = native.Lines(maker)
    buffer = bytearray()
    lines.encode_into(item, buffer)
    lines.encode_into(item, buffer)
    assert bytes(buffer) == 2 * native.encode(maker.event(item))


@given(any_event, any_event)
def test_appending_keeps_what_was_there(first: Event, second: Event):
    """
    A batch in one buffer is the lines one after the other.
    """
    buffer = bytearray()
    native.encode_into(first, buffer)
    native.encode_into(second, buffer)
    assert bytes(buffer) == native.encode(first) + native.encode(second)
