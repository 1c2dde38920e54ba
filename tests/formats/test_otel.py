"""
OpenTelemetry lines are OTLP/JSON, and use the names of the semantic conventions.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import Any

import pytest
from hypothesis import given

from procwatch import events
from procwatch.events import Event
from procwatch.formats import otel
from tests.formats.any import any_event
from tests.formats.samples import EVENTS

incubating = pytest.importorskip("opentelemetry.semconv._incubating.attributes")
TYPES = {"stringValue": str, "intValue": str, "boolValue": bool, "arrayValue": dict}


def published() -> set[str]:
    """
    All names of the conventions; those with a key of the user's end with a dot.
    """
    names = set()
    for module in pkgutil.iter_modules(incubating.__path__):
        if module.name.endswith("_attributes"):
            for name, value in vars(importlib.import_module(f"{incubating.__name__}.{module.name}")).items():
                if name.isupper() and isinstance(value, str):
                    names.add(value + "." if name.endswith("_TEMPLATE") else value)
    return names


def line(event: Event) -> dict[str, Any]:
    """
    The object of its one line.
    """
    buffer = bytearray()
    otel.encode_into(event, buffer)
    assert buffer.endswith(b"\n")
    assert buffer.count(b"\n") == 1
    fields: dict[str, Any] = json.loads(buffer.decode())
    return fields


def record(event: Event) -> dict[str, Any]:
    """
    Its only log record.
    """
    (of_resource,) = line(event)["resourceLogs"]
    (of_scope,) = of_resource["scopeLogs"]
    (found,) = of_scope["logRecords"]
    result: dict[str, Any] = found
    return result


def test_names_are_those_of_the_conventions():
    """
    Or stand below `procwatch.`.
    """
    names = published()
    for event in EVENTS:
        for name in [*otel.attributes(event), *otel.resource("host")]:
            known = name in names or any(name.startswith(one) for one in names if one.endswith("."))
            assert known or name.startswith("procwatch."), name


@given(any_event)
def test_any_event_is_one_valid_line(event: Event):
    """
    Each attribute has one value of a type that OTLP has, whatever a process calls itself.
    """
    found = record(event)
    assert int(found["timeUnixNano"]) == event.time_ns
    for attribute in found["attributes"]:
        ((kind, value),) = attribute["value"].items()
        assert isinstance(value, TYPES[kind])
    assert len({attribute["key"] for attribute in found["attributes"]}) == len(found["attributes"])


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_lines_are_what_the_protocol_says(event: Event):
    """
    The published protobuf definition takes them without a remark.
    """
    logs = pytest.importorskip("opentelemetry.proto.logs.v1.logs_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    data = json_format.Parse(json.dumps(line(event)), logs.LogsData())
    (of_resource,) = data.resource_logs
    assert {one.key: one.value.string_value for one in of_resource.resource.attributes}["host.name"] == event.host
    (log,) = of_resource.scope_logs[0].log_records
    assert (log.time_unix_nano, log.event_name) == (event.time_ns, f"procwatch.{event.event}")


def test_a_loss_is_a_warning():
    """
    All else is information.
    """
    for event in EVENTS:
        assert record(event)["severityText"] == ("WARN" if isinstance(event, events.Lost) else "INFO")
