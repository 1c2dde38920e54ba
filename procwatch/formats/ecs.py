"""
Elastic Common Schema 8: one JSON object a line, nested as Elasticsearch takes it.

Fields of the schema carry what the schema says of them and nothing else: `process.user` is the effective user there and
`process.real_user` the real one, for example. What it has no field for stands below `procwatch`. A field that is not
known is left out; `procwatch.missing` says why.
"""

from __future__ import annotations

import os
from typing import Any

from msgspec.json import Encoder

from procwatch import events
from procwatch.events import Container, Event, Parent, ProcessEvent
from procwatch.formats.native import replaced
from procwatch.formats.text import quote_all

VERSION = "8.11.0"

_encode = Encoder().encode
# event.type for each kind: the values that the schema allows for the category "process".
_TYPES = {
    "exec": ["start"],
    "fork": ["start"],
    "exit": ["end"],
    "vanished": ["end"],
    "running": ["info"],
    "coredump": ["info"],
    "exec_failed": ["start"],
    "ptrace": ["access"],
}
_CHANGE = ["change"]
# Fields of processes that the schema has a place for, or that stand elsewhere. All others go below `procwatch`.
_MAPPED = frozenset({
    "time", "host", "id", "pid", "ppid", "argv", "parent", "exe", "cwd", "uid", "gid", "euid", "egid", "user",
    "session", "container", "hash", "labels", "ns_pid", "ancestors", "code", "duration_ns", "errno", "error",
})  # fmt: skip
_NOTHING: tuple[Any, ...] = (None, [], {})


def encode_into(event: Event, buffer: bytearray) -> None:
    """
    Append one event as one line.
    """
    found = fields(event)
    try:
        buffer += _encode(found)
    except UnicodeEncodeError:
        found = replaced(found)
        found.setdefault("procwatch", {})["raw"] = event.raw
        buffer += _encode(found)
    buffer += b"\n"


def fields(event: Event) -> dict[str, Any]:
    """
    An event as nested objects.
    """
    if isinstance(event, ProcessEvent):
        found = _process_event(event)
    elif isinstance(event, events.ContainerEvent):
        found = _about(event, "container", _CHANGE)
        found.update(_container(event.container))
        found["procwatch"] = _known(cgroup=event.cgroup)
    else:
        found = _about(event, "host", ["info"])
        found["procwatch"] = _agent(event)
    if event.labels is not None:
        found["labels"] = event.labels
    found["@timestamp"] = event.time
    found["ecs"] = {"version": VERSION}
    found["host"] = {"name": event.host, "hostname": event.host, "os": {"type": "linux"}}
    if isinstance(event, events.Ready):
        found["host"]["os"]["kernel"] = event.kernel
        found["host"]["boot"] = {"id": event.boot_id}
        found["agent"] = {"type": "procwatch", "version": event.version}
    return found


def _about(event: Event, category: str, types: list[str]) -> dict[str, Any]:
    return {
        "event": {
            "kind": "state" if event.event == "running" else "event",
            "category": [category],
            "type": types,
            "action": event.event,
            "module": "procwatch",
            "dataset": f"procwatch.{category}",
        }
    }


def _process_event(event: ProcessEvent) -> dict[str, Any]:
    found = _about(event, "process", _TYPES.get(event.event, _CHANGE))
    found["process"] = process = _process(event)
    if event.uid is not None:
        found["user"] = _known(id=str(event.uid), name=event.user)
    if event.container is not None:
        found.update(_container(event.container))
    own = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if name not in _MAPPED and value not in _NOTHING:
            own[name] = value
    if event.ancestors:
        own["ancestors"] = [_parent(ancestor) for ancestor in event.ancestors]
    if own:
        found["procwatch"] = own
    if isinstance(event, events.Exit):
        process["end"] = event.time
        process.update(_known(exit_code=event.code))
        found["event"].update(_known(duration=event.duration_ns))
    elif isinstance(event, events.ExecFailed):
        found["event"]["outcome"] = "failure"
        found["error"] = {"code": event.error, "message": os.strerror(event.errno)}
    elif isinstance(event, events.Exec):
        found["event"]["outcome"] = "success"
    return found


def _process(event: ProcessEvent) -> dict[str, Any]:
    found = _known(
        pid=event.pid,
        entity_id=event.id,
        executable=event.exe,
        name=_name(event.exe, event.comm),
        args=event.argv,
        working_directory=event.cwd,
        vpid=event.ns_pid,
        hash=event.hash,
    )
    if event.argv is not None:
        found["args_count"] = len(event.argv)
        found["command_line"] = quote_all(event.argv)
    if event.tty is not None:
        found["interactive"] = bool(event.tty)
    for name, value in (
        ("user", event.euid),
        ("group", event.egid),
        ("real_user", event.uid),
        ("real_group", event.gid),
    ):
        if value is not None:
            found[name] = {"id": str(value)}
    if "real_user" in found and event.user is not None:
        found["real_user"]["name"] = event.user
    if event.session is not None:
        found["session_leader"] = {"pid": event.session}
    if event.parent is not None:
        found["parent"] = _parent(event.parent)
    elif event.ppid is not None:
        found["parent"] = {"pid": event.ppid}
    return found


def _parent(parent: Parent) -> dict[str, Any]:
    return _known(pid=parent.pid, entity_id=parent.id, executable=parent.exe, name=_name(parent.exe, parent.comm))


def _container(container: Container) -> dict[str, Any]:
    about = _known(
        id=container.id,
        name=container.name,
        runtime=container.runtime,
        labels=container.labels,
    )
    image = _known(name=container.image, hash={"all": [container.image_id]} if container.image_id else None)
    if image:
        about["image"] = image
    found: dict[str, Any] = {"container": about}
    if (pod := container.pod) is not None:
        found["orchestrator"] = {
            "type": "kubernetes",
            **_known(namespace=pod.namespace),
            "resource": {"type": "pod", **_known(name=pod.name, id=pod.uid)},
        }
    return found


def _agent(event: Event) -> dict[str, Any]:
    """
    What ready, lost and stop tell, under its own names.
    """
    known = {name: getattr(event, name) for name in event.__struct_fields__ if name not in ("time", "host", "labels")}
    return _known(**known)


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _name(exe: str | None, comm: str | None) -> str | None:
    return os.path.basename(exe) if exe else comm
