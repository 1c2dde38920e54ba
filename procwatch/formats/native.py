"""
Native JSON: one object a line, the fields of procwatch.events under their own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct, defstruct, structs
from msgspec.json import Encoder

from procwatch.events import Event, ProcessEvent, raw_of
from procwatch.facts import Details
from procwatch.table.draft import Draft, Maker, Who, hash_of

_encode = Encoder().encode
_encode_into = Encoder().encode_into


def _part(name: str, first: str, last: str) -> type[Struct]:
    """
    A type with the fields of ProcessEvent from `first` to `last`: a part of a line.
    """
    fields = structs.fields(ProcessEvent)
    names = [field.name for field in fields]
    chosen = fields[names.index(first) : names.index(last) + 1]
    return defstruct(
        name,
        [
            (f.name, f.type)
            if f.default is NODEFAULT and f.default_factory is NODEFAULT
            else (f.name, f.type, f.default)
            for f in chosen
        ],
        omit_defaults=True,
        gc=False,
    )


_Context = _part("Context", "exe", "audit_session")
_Marks = _part("Marks", "missing", "inferred")
_NO_MARKS: tuple[dict[str, str], Sequence[str], bytes] = {}, [], b""
CLEAR = b',"missing":{},"inferred":[]'


class Lines:
    """
    Writes events and drafts as lines.

    A line of a draft is put together from parts: who, encoded once from one exec to the next; what and where, encoded
    once for all processes that have it in common; and the few fields that are new each time. It is the same to the byte
    as the line of the event (tests/formats/test_native.py).
    """

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self.second_ns = -1 << 62  # CLOCK_BOOTTIME at which the wall clock's second in `_heads` began
        self._heads: dict[type[ProcessEvent], bytes] = {}
        # Those of the last line of each kind: thousands of processes that died unread lack the same.
        self._marks: dict[type[ProcessEvent], tuple[dict[str, str], Sequence[str], bytes]] = {}
        labels = b"" if maker.labels is None else b'"labels":' + _encode(maker.labels) + b","
        self.host = b'Z","host":' + _encode(maker.host) + b"," + labels

    def encode_into(self, item: Event | Draft, buffer: bytearray) -> None:
        """
        Append one line.
        """
        if type(item) is Draft:
            try:
                buffer += self._line(item)
            except UnicodeEncodeError:
                encode_into(self._maker.event(item), buffer)
        else:
            encode_into(self._maker.event(item), buffer)

    def _line(self, draft: Draft) -> bytes:
        ns = draft.time_ns - self.second_ns
        if not 0 <= ns < 1_000_000_000:
            ns = self.since_second(draft.time_ns)
        who, details, tail = draft.who, draft.details, draft.tail
        context = details.line
        if context is None or details.named != self._maker.names.generation:
            context = self.context(details)
        known = CLEAR
        if draft.missing or draft.inferred:
            missing, inferred, known = self._marks.get(draft.kind, _NO_MARKS)
            if draft.missing is not missing or draft.inferred is not inferred:
                known = encode_marks(draft.missing, draft.inferred)
                self._marks[draft.kind] = draft.missing, draft.inferred, known
        # Half as dear as a format with %b.
        return b"".join(
            (
                self._heads.get(draft.kind) or self.head(draft.kind),
                b"%09d" % ns,
                self.host,
                who.line or self._who(who),
                context,
                known,
                b"}\n" if tail is None else b",%b\n" % _encode(tail)[1:],
            )
        )

    def _who(self, who: Who) -> bytes:
        who.line = _encode(who)[1:-1]
        return who.line

    def context(self, d: Details) -> bytes:
        """
        What and where, as it stands in each line of a process that has these details.
        """
        container, unit, unit_user = self._maker.names.place(d.cgroup)
        context = _Context(
            d.exe, d.exe_deleted, d.file, d.script, d.comm, d.cwd, d.uid, d.gid, d.euid, d.egid,
            self._maker.names.user(d.uid), d.tty, d.session, d.cgroup, container, unit, unit_user,
            d.exe_dev, d.exe_inode, d.exe_size, d.exe_memfd, d.namespaces, d.auid, d.privileges,
            d.exe_owner, d.exe_mode, d.exe_capabilities, d.exe_upper, hash_of(d), d.ns_uid, d.audit_session,
        )  # fmt: skip
        d.line = b"," + _encode(context)[1:-1]
        # A hash that is being computed will make it another line.
        d.named = self._maker.names.generation if d.hash is None or d.hash.done else 0
        return d.line

    def since_second(self, time_ns: int) -> int:
        """
        Nanoseconds since the wall clock's last full second, which from now on is the one of the heads.
        """
        ns = time_ns - self.second_ns
        if not 0 <= ns < 1_000_000_000:
            offset = self._maker.clock.offset_ns
            self.second_ns = (time_ns + offset) // 1_000_000_000 * 1_000_000_000 - offset
            self._heads.clear()
        return time_ns - self.second_ns

    def head(self, kind: type[ProcessEvent]) -> bytes:
        """
        How each line of one kind begins within this second.
        """
        if (known := self._heads.get(kind)) is not None:
            return known
        second = self._maker.clock.stamp(self.second_ns)[:20]
        self._heads[kind] = b'{"event":"%b","time":"%b' % (kind.event.encode(), second.encode())
        return self._heads[kind]


def encode_marks(missing: dict[str, str], inferred: Sequence[str]) -> bytes:
    """
    The fields of a line that say what could not be had, and what was deduced.
    """
    return b"," + _encode(_Marks(missing, inferred))[1:-1]


def encode(event: Event) -> bytes:
    """
    One event as one line, with its newline.
    """
    try:
        return _encode(event) + b"\n"
    except UnicodeEncodeError:
        return _encode_raw(event) + b"\n"


def encode_into(event: Event, buffer: bytearray) -> None:
    """
    The same at the end of a buffer: a batch is written at once.
    """
    at = len(buffer)
    try:
        _encode_into(event, buffer, at)
    except UnicodeEncodeError:
        buffer[at:] = _encode_raw(event)
    buffer += b"\n"


def _encode_raw(event: Event) -> bytes:
    """
    For an event with bytes that are not UTF-8: U+FFFD in their place, and the exact bytes in `raw`.
    """
    fields: dict[str, Any] = replaced(msgspec.to_builtins(event))
    fields["raw"] = raw_of(event)
    return _encode(fields)


def replaced(value: Any) -> Any:
    """
    A value, of strings in lists and dicts, with U+FFFD for each byte that is not UTF-8.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, list):
        return [replaced(item) for item in value]
    if isinstance(value, dict):
        return {replaced(key): replaced(item) for key, item in value.items()}
    return value


def schema() -> dict[str, Any]:
    """
    JSON Schema (2020-12) of a line.
    """
    from procwatch.events import AnyEvent

    definition = msgspec.json.schema(AnyEvent)
    for fields in definition["$defs"].values():
        if "event" in fields.get("properties", {}):
            fields["properties"]["raw"] = {"type": "object", "description": "exact bytes, base64, of what is not UTF-8"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "procwatch native JSON, one event a line",
        **definition,
    }
