"""
Any event that there can be, for tests that hold whatever a process may call itself.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from msgspec import Struct

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import Parent, ProcessEvent
from procwatch.facts import EXITED, PERMISSION, Details
from procwatch.table.draft import FORKED, Draft, End, Failed, Maker, Who

# The kernel's strings: any bytes but NUL, decoded as the decoders do.
text = (st.binary(max_size=24) | st.text(max_size=12).map(lambda s: s.encode("utf-8", "surrogateescape"))).map(
    lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
)
number = st.integers(0, 2**31 - 1)
maybe_text = st.none() | text
maybe_number = st.none() | number

parents = st.builds(Parent, text, number, maybe_text, maybe_text)
whos = st.builds(
    Who,
    id=st.just("0123abcd-7-9"),
    pid=number,
    ppid=maybe_number,
    argv=st.none() | st.lists(text, max_size=4),
    argv_truncated=st.booleans(),
    parent=st.none() | parents,
    ns_pid=maybe_number,
    ancestors=st.none() | st.lists(parents, max_size=2),
)
details = st.builds(
    Details,
    exe=maybe_text,
    exe_deleted=st.none() | st.booleans(),
    file=maybe_text,
    script=maybe_text,
    comm=maybe_text,
    cwd=maybe_text,
    uid=maybe_number,
    gid=maybe_number,
    tty=maybe_text,
    session=maybe_number,
    cgroup=maybe_text,
    exe_inode=maybe_number,
    privileges=st.none() | st.just(["setuid"]),
)
ends = st.builds(
    End,
    maybe_number,
    st.none() | st.integers(1, 64),
    st.none() | st.booleans(),
    maybe_number,
    maybe_number,
    maybe_number,
    maybe_number,
    maybe_number,
    maybe_number,
)
tails = st.one_of(
    st.tuples(st.sampled_from([events.Exec, events.Fork, events.Vanished, events.Comm]), st.none()),
    st.tuples(st.just(events.Exec), st.just(FORKED)),
    st.tuples(st.just(events.Exit), ends),
    st.tuples(st.just(events.ExecFailed), st.builds(Failed, st.integers(1, 133), st.just("ENOENT"))),
)
missing = st.dictionaries(st.sampled_from(["exe", "argv", "id"]), st.sampled_from([EXITED, PERMISSION]))
inferred = st.lists(st.sampled_from(["uid", "id"]), unique=True)

Kind = tuple[type[ProcessEvent], Struct | None]


def draft(what: Kind, time_ns: int, who: Who, known: Details, **marks: Any) -> Draft:
    """
    A draft, whatever the order of its arguments.
    """
    marks = {"missing": {}, "inferred": [], **marks}
    return Draft(kind=what[0], time_ns=time_ns, who=who, details=known, tail=what[1], **marks)


drafts = st.builds(draft, tails, st.integers(0, 2**61), whos, details, missing=missing, inferred=inferred)
maker = Maker("host", Clock(offset_ns=1_700_000_000_123_456_789))
process_events = drafts.map(maker.event)
losts = st.builds(
    events.Lost,
    time=st.just("2026-01-02T03:04:05.000000006Z"),
    host=text,
    count=number,
    exact=st.booleans(),
    where=st.just("netlink_socket"),
    since=st.none(),
    until=st.none(),
)
containers = st.builds(
    events.ContainerEvent,
    time=st.just("2026-01-02T03:04:05.000000006Z"),
    host=text,
    container=st.builds(
        events.Container, id=text, runtime=maybe_text, name=maybe_text, image=maybe_text, pod=st.none()
    ),
    cgroup=maybe_text,
)
any_event = st.one_of(process_events, losts, containers)
