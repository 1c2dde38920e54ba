"""
ECS lines have fields of the schema only, each of its type, and what is ours below `procwatch`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from msgspec import structs

from procwatch.events import Event, ProcessEvent
from procwatch.formats import ecs
from tests.formats.any import any_event
from tests.formats.samples import EVENTS

# The fields that are used, with their types as the field reference of ECS 8.11 gives them.
FIELDS = {
    "@timestamp": "date",
    "agent.type": "keyword",
    "agent.version": "keyword",
    "container.id": "keyword",
    "container.image.hash.all": "keyword",
    "container.image.name": "keyword",
    "container.labels": "object",
    "container.name": "keyword",
    "container.runtime": "keyword",
    "ecs.version": "keyword",
    "error.code": "keyword",
    "error.message": "match_only_text",
    "event.action": "keyword",
    "event.category": "keyword",
    "event.dataset": "keyword",
    "event.duration": "long",
    "event.kind": "keyword",
    "event.module": "keyword",
    "event.outcome": "keyword",
    "event.type": "keyword",
    "host.boot.id": "keyword",
    "host.hostname": "keyword",
    "host.name": "keyword",
    "host.os.kernel": "keyword",
    "host.os.type": "keyword",
    "labels": "object",
    "orchestrator.namespace": "keyword",
    "orchestrator.resource.id": "keyword",
    "orchestrator.resource.name": "keyword",
    "orchestrator.resource.type": "keyword",
    "orchestrator.type": "keyword",
    "process.args": "keyword",
    "process.args_count": "long",
    "process.command_line": "wildcard",
    "process.end": "date",
    "process.entity_id": "keyword",
    "process.executable": "keyword",
    "process.exit_code": "long",
    "process.group.id": "keyword",
    "process.hash.sha256": "keyword",
    "process.interactive": "boolean",
    "process.name": "keyword",
    "process.parent.entity_id": "keyword",
    "process.parent.executable": "keyword",
    "process.parent.name": "keyword",
    "process.parent.pid": "long",
    "process.pid": "long",
    "process.real_group.id": "keyword",
    "process.real_user.id": "keyword",
    "process.real_user.name": "keyword",
    "process.session_leader.pid": "long",
    "process.user.id": "keyword",
    "process.vpid": "long",
    "process.working_directory": "keyword",
    "user.id": "keyword",
    "user.name": "keyword",
}
# event.kind and event.type for the category: the values that the schema allows.
KINDS = {"event", "state"}
TYPES = {
    "process": {"access", "change", "end", "info", "start"},
    "host": {"access", "change", "end", "info", "start"},
}
# A keyword is a string or a list of them.
PYTHON: dict[str, type] = {
    "long": int,
    "boolean": bool,
    "date": str,
    "keyword": str,
    "wildcard": str,
    "match_only_text": str,
}


def decoded(event: Event) -> dict[str, Any]:
    """
    The object of its one line.
    """
    buffer = bytearray()
    ecs.encode_into(event, buffer)
    assert buffer.endswith(b"\n")
    assert buffer.count(b"\n") == 1
    fields: dict[str, Any] = json.loads(buffer.decode())
    return fields


def leaves(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """
    Each field by its full name.
    """
    for key, value in fields.items():
        name = prefix + key
        if name == "procwatch":
            continue
        if isinstance(value, dict) and FIELDS.get(name) != "object":
            assert value, f"{name} is empty"
            yield from leaves(value, name + ".")
        else:
            yield name, value


def check(event: Event) -> None:
    """
    All fields are of the schema, and of the schema's type.
    """
    fields = decoded(event)
    for name, value in leaves(fields):
        assert name in FIELDS
        kind = FIELDS[name]
        if kind == "object":
            assert all(isinstance(item, str) for item in value.values())
            continue
        items: list[Any] = value if isinstance(value, list) else [value]
        for item in items:
            assert type(item) is PYTHON.get(kind, str), name
            if kind == "date":
                datetime.fromisoformat(str(item)[:26])
    about = fields["event"]
    assert about["kind"] in KINDS
    for category in about["category"]:
        assert set(about["type"]) <= TYPES.get(category, {"change"})


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_samples_are_of_the_schema(event: Event):
    """
    Every shape of event.
    """
    check(event)


@given(any_event)
def test_any_event_is_one_line_of_the_schema(event: Event):
    """
    Whatever a process calls itself.
    """
    check(event)


def test_users_are_effective_and_real_as_the_schema_has_them():
    """
    `process.user` is the effective one.
    """
    fields = decoded(EVENTS[0])
    assert fields["process"]["user"] == {"id": "33"}
    assert fields["process"]["real_user"] == {"id": "0", "name": "root"}


def test_what_is_not_known_is_left_out_and_said_why():
    """
    No null, no default.
    """
    fields = decoded(EVENTS[2])
    assert not {"executable", "args", "user"} & set(fields["process"])
    assert fields["procwatch"]["missing"] == {"exe": "exited", "argv": "exited"}


def test_exact_bytes_are_kept():
    """
    In `procwatch.raw`, as in native lines.
    """
    event = EVENTS[3]
    assert isinstance(event, ProcessEvent)
    assert decoded(event)["procwatch"]["raw"] == event.raw


def test_labels():
    """
    The agent's labels stand where ECS has them, and only there.
    """
    for event in EVENTS:
        found = ecs.fields(structs.replace(event, labels={"site": "fra1"}))

        assert (found["labels"], found["@timestamp"]) == ({"site": "fra1"}, event.time)
        assert "labels" not in found.get("procwatch", {})
