"""
The table of processes, kept over a restart of the agent: written when it stops, taken up and removed when it starts.

Only what ids, ancestry and container names need: the live processes, and of the dead ones those that are ancestors of
live ones. The file is bound to the boot and to the pid namespace; it is removed when it is read, so that what an agent
which was killed leaves behind is never older than its last start: none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from procwatch.enrich.enricher import Enricher, Remembered
from procwatch.errors import ProcwatchError
from procwatch.facts import Details
from procwatch.sources import procfs
from procwatch.table.identity import process_id
from procwatch.table.process import Process, make

VERSION = 1
# Larger than the state of 100,000 processes; what is larger was not written by us.
MAX_BYTES = 256 << 20
_NOT_KEPT = frozenset({"unread", "line", "named", "hash"})
_DEFAULTS = {name: getattr(Details(), name) for name in Details.__struct_fields__ if name not in _NOT_KEPT}


class StateError(ProcwatchError):
    """
    A state that cannot be taken up, and why.
    """


class Digest(Struct):
    """
    The hash of an executable that was known before.
    """

    hex: str | None
    done: bool = True


class _Process(Struct, array_like=True):
    pid: int
    start_ticks: int
    ppid: int | None
    parent: int  # index of an earlier one, -1: unknown
    details: int  # index in `details`
    argv: list[str] | None
    argv_truncated: bool
    argv_missing: str | None
    ns_pid: int | None
    born_ns: int
    inherited: bool
    start_inferred: bool
    ended: bool


class _State(Struct):
    version: int
    boot_id: str
    pid_namespace: int
    saved_ns: int  # CLOCK_BOOTTIME
    details: list[dict[str, Any]]
    processes: list[_Process]
    containers: list[Remembered]


class State(Struct):
    """
    What an earlier run of this boot knew.
    """

    processes: list[Process]  # the live ones; their parents hang on them
    containers: list[Remembered]
    age_s: float


def save(path: str, processes: Iterable[Process], enricher: Enricher | None) -> None:
    """
    Write the state, whole or not at all, mode 0600.

    Raises:
        StateError: It cannot be written.
    """
    details: list[Details] = []
    saved: list[_Process] = []
    places: dict[int, int] = {}
    shared: dict[int, int] = {}
    for process in processes:
        chain = [process, *process.ancestors()]
        for one in reversed(chain):  # parents first
            if id(one) not in places:
                places[id(one)] = len(saved)
                if id(one.details) not in shared:
                    shared[id(one.details)] = len(details)
                    details.append(one.details)
                saved.append(_pack(one, places, shared))
    state = _State(
        VERSION,
        procfs.boot_id(),
        _pid_namespace(),
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        [_pack_details(one) for one in details],
        saved,
        enricher.remember() if enricher is not None else [],
    )
    # Not msgspec's encoder: strings with surrogates, bytes that are not UTF-8, can only be written escaped.
    data = json.dumps(msgspec.to_builtins(state), separators=(",", ":")).encode()
    try:
        _write(path, data)
    except OSError as error:
        raise StateError(f"the state is not kept: {path}: {error.strerror}") from error


def load(path: str) -> State | None:
    """
    Read the state and remove it; None where there is none.

    Raises:
        StateError: It is not of this boot, or not ours.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        os.unlink(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"the state cannot be read: {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise StateError(f"the state is not ours: {path} is larger than {MAX_BYTES} bytes")
    try:
        state = msgspec.convert(json.loads(data), _State)
        boot = procfs.boot_id()
        if state.version != VERSION:
            raise StateError(f"the state is of another version, {state.version}")
        if (state.boot_id, state.pid_namespace) != (boot, _pid_namespace()):
            raise StateError("the state is of another boot")
        processes = _unpack(state, boot.replace("-", "")[:8])
    except (ValueError, RecursionError, IndexError) as error:  # ValidationError and UnicodeError are ValueErrors
        raise StateError(f"the state is not ours: {path}: {str(error).partition(chr(10))[0]}") from error
    age_s = (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - state.saved_ns) / 1e9
    return State(processes, state.containers, age_s)


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path) or ".", mode=0o750, exist_ok=True)
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    os.replace(new, path)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _pack(process: Process, places: dict[int, int], shared: dict[int, int]) -> _Process:
    return _Process(
        process.pid,
        process.start_ticks,
        process.ppid,
        places.get(id(process.parent), -1),
        shared[id(process.details)],
        process.argv,
        process.argv_truncated,
        process.argv_missing,
        process.ns_pid,
        process.born_ns,
        process.inherited,
        process.start_inferred,
        process.ended,
    )


def _pack_details(details: Details) -> dict[str, Any]:
    kept = {name: value for name, default in _DEFAULTS.items() if (value := getattr(details, name)) != default}
    if details.hash is not None and details.hash.hex is not None:
        kept["hash"] = details.hash.hex
    return kept


def _unpack(state: _State, boot: str) -> list[Process]:
    details = []
    for kept in state.details:
        digest = kept.pop("hash", None)
        one = msgspec.convert(kept, Details)
        if isinstance(digest, str):
            one.hash = Digest(digest)
        details.append(one)
    processes: list[Process] = []
    for saved in state.processes:
        if not -1 <= saved.parent < len(processes) or saved.details < 0:
            raise ValueError("a parent that is not there")
        parent = processes[saved.parent] if saved.parent >= 0 else None
        identity = process_id(boot, saved.pid, saved.start_ticks)
        process = make(saved.pid, saved.start_ticks, identity, parent, details[saved.details])
        process.ppid = saved.ppid
        process.argv, process.argv_truncated, process.argv_missing = (
            saved.argv,
            saved.argv_truncated,
            saved.argv_missing,
        )
        process.ns_pid, process.born_ns = saved.ns_pid, saved.born_ns
        process.inherited, process.start_inferred, process.ended = saved.inherited, saved.start_inferred, saved.ended
        processes.append(process)
    return [process for process in processes if not process.ended]
