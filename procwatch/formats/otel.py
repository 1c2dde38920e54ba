"""
OpenTelemetry: the attributes of the semantic conventions, and OTLP/JSON lines (one LogsData object each), as the
OpenTelemetry Collector's otlpjsonfile receiver reads them.

What the conventions have no name for stands below `procwatch.`. A field that is not known is left out;
`procwatch.missing.FIELD` says why. Sent over the network by sinks/otlp.py.
"""

from __future__ import annotations

import os
from typing import Any

from msgspec import structs
from msgspec.json import Encoder

from procwatch import __version__, events
from procwatch.events import Container, Event, Parent, ProcessEvent
from procwatch.formats.native import replaced
from procwatch.formats.text import quote_all

INFO, WARN = 9, 13  # SeverityNumber of the data model of logs

_encode = Encoder().encode
# Fields of processes that the conventions name, or that stand elsewhere. All others go below `procwatch.`.
_MAPPED = frozenset({
    "time", "host", "pid", "ppid", "ns_pid", "exe", "argv", "cwd", "user", "uid", "euid", "session", "cgroup", "parent",
    "ancestors", "container", "code",
})  # fmt: skip
_SCOPE = {"name": "procwatch", "version": __version__}


def encode_into(event: Event, buffer: bytearray) -> None:
    """
    Append one event as one line.
    """
    found = attributes(event)
    text = body(event)
    try:
        record = _record(event, found, text)
        buffer += _encode(record)
    except UnicodeEncodeError:
        _add(found, "procwatch.raw", event.raw)
        buffer += _encode(replaced(_record(event, found, text)))
    buffer += b"\n"


def resource(host: str) -> dict[str, str]:
    """
    Who tells it.
    """
    return {"service.name": "procwatch", "service.version": __version__, "host.name": host, "os.type": "linux"}


def severity(event: Event) -> tuple[int, str]:
    """
    Number and text: a loss is a warning, all else is information.
    """
    return (WARN, "WARN") if event.event == "lost" else (INFO, "INFO")


def event_name(event: Event) -> str:
    """
    As "procwatch.exec".
    """
    return f"procwatch.{event.event}"


def body(event: Event) -> str:
    """
    A few words for people; everything is in the attributes.
    """
    if isinstance(event, ProcessEvent):
        known = quote_all(event.argv) if event.argv else event.exe or event.file or event.comm or ""
        return f"{event.event} {event.pid} {known}".rstrip()
    if isinstance(event, events.Lost):
        return f"lost {event.count} events ({event.where})"
    return event.event


def attributes(event: Event) -> dict[str, Any]:
    """
    Name -> str, int, float, bool, or a list of str.
    """
    found: dict[str, Any]
    if isinstance(event, ProcessEvent):
        found = _process(event)
    else:
        found = {}
        for name, value in structs.asdict(event).items():
            if name == "container":
                found.update(_container(value))
            elif name == "skipped":
                found["procwatch.skipped"] = [f"{one.name}: {one.reason}" for one in value]
            elif name not in ("time", "host"):
                _add(found, f"procwatch.{name}", value)
    found["procwatch.event"] = event.event
    return {name: value for name, value in found.items() if value is not None}


def _process(event: ProcessEvent) -> dict[str, Any]:
    found: dict[str, Any] = {
        "process.pid": event.pid,
        "process.parent_pid": event.ppid,
        "process.vpid": event.ns_pid,
        "process.executable.path": event.exe,
        "process.executable.name": os.path.basename(event.exe) if event.exe else None,
        "process.command": event.argv[0] if event.argv else None,
        "process.command_args": event.argv,
        "process.args_count": None if event.argv is None else len(event.argv),
        "process.working_directory": event.cwd,
        "process.owner": event.user,
        "process.real_user.id": event.uid,
        "process.real_user.name": event.user,
        "process.user.id": event.euid,
        "process.session_leader.pid": event.session,
        "process.interactive": None if event.tty is None else bool(event.tty),
        "process.linux.cgroup": event.cgroup,
        "procwatch.ancestors": [ancestor.exe or ancestor.comm or "" for ancestor in event.ancestors or ()] or None,
    }
    for name in event.__struct_fields__:
        if name not in _MAPPED:
            _add(found, f"procwatch.{name}", getattr(event, name))
    if event.parent is not None:
        found.update(_parent(event.parent))
    if event.container is not None:
        found.update(_container(event.container))
    if isinstance(event, events.Exit):
        found["process.exit.code"] = event.code
        found["process.exit.time"] = event.time
    return found


def _parent(parent: Parent) -> dict[str, Any]:
    return {
        "procwatch.parent.id": parent.id,
        "procwatch.parent.exe": parent.exe,
        "procwatch.parent.comm": parent.comm,
    }


def _container(container: Container) -> dict[str, Any]:
    found: dict[str, Any] = {
        "container.id": container.id,
        "container.name": container.name,
        "container.runtime.name": container.runtime,
        "container.image.name": container.image,
        "container.image.id": container.image_id,
    }
    for name, value in (container.labels or {}).items():
        found[f"container.label.{name}"] = value
    if (pod := container.pod) is not None:
        found["k8s.pod.uid"] = pod.uid
        found["k8s.pod.name"] = pod.name
        found["k8s.namespace.name"] = pod.namespace
        found["k8s.container.name"] = pod.container
        for name, value in (pod.labels or {}).items():
            found[f"k8s.pod.label.{name}"] = value
    return found


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    """
    A value that may be an object: its fields follow after a dot.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            _add(found, f"{name}.{key}", inner)
    elif value != []:
        found[name] = value


def _record(event: Event, found: dict[str, Any], text: str) -> dict[str, Any]:
    """
    OTLP/JSON: 64-bit integers are strings there (the JSON mapping of protobuf).
    """
    number, name = severity(event)
    record = {
        "timeUnixNano": str(event.time_ns),
        "observedTimeUnixNano": str(event.time_ns),
        "severityNumber": number,
        "severityText": name,
        "eventName": event_name(event),
        "body": {"stringValue": text},
        "attributes": _pairs(found),
    }
    return {
        "resourceLogs": [
            {
                "resource": {"attributes": _pairs(resource(event.host))},
                "scopeLogs": [{"scope": _SCOPE, "logRecords": [record]}],
            }
        ]
    }


def _pairs(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _any(value)} for name, value in found.items()]


def _any(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_any(item) for item in value]}}
