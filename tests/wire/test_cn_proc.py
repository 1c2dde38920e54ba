"""
The process connector's messages: real ones, cut ones, and any bytes at all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.facts import Changed, Exec, Fact, Fork, Thread
from procwatch.wire import cn_proc

CAPTURES = Path(__file__).parent.parent / "captures" / "cn_proc.txt"
REAL: dict[str, bytes] = {
    name: bytes.fromhex(data)
    for name, _, data in (line.partition(" ") for line in CAPTURES.read_text().splitlines() if line[0] != "#")
}
ACKNOWLEDGED = (0, 0)
FACTS: dict[str, Fact | None] = {
    "comm": Changed(4301225196501, 12139, "comm", comm="\udcff\udcfe café"),
    "coredump": Changed(4301281358689, 12335, "coredump"),
    "exec": Exec(4301222556233, 12129),
    "exit_signal": Thread(4301281758995, 12335, 12335, False, 6),
    "exit_thread": Thread(4301276432238, 12139, 12143, False, 0),
    "exit_zero": Thread(4301222572648, 12129, 12129, False, 0),
    "fork": Fork(4301222494782, 12129, 9280),
    "fork_thread": Thread(4301225522203, 12139, 12143, True),
    "gid": Changed(4301276753806, 12139, "gid", real=65534, effective=65533),
    "none": None,
    "ptrace_attach": Changed(4301283978295, 12339, "ptrace", tracer=12337),
    "ptrace_detach": Changed(4301284313220, 12339, "ptrace", tracer=0),
    "sid": Changed(4301276641269, 12139, "sid"),
    "uid": Changed(4301276765030, 12139, "uid", real=65534, effective=65533),
}
real = pytest.mark.parametrize("name", FACTS)


@real
def test_a_real_message_is_its_fact(name: str):
    """
    Each kind, as Linux 6.18 sends it.
    """
    ((_, _, _, fact, acknowledged),) = cn_proc.decode(REAL[name])
    assert fact == FACTS[name]
    assert acknowledged == (ACKNOWLEDGED if name == "none" else None)


@real
def test_the_offset_is_added_to_the_stamp(name: str):
    """
    Facts have CLOCK_BOOTTIME, messages CLOCK_MONOTONIC.
    """
    ((_, _, time_ns, fact, _),) = cn_proc.decode(REAL[name])
    ((_, _, later_ns, later, _),) = cn_proc.decode(REAL[name], 1_000)
    assert later_ns == time_ns + 1_000
    if fact is not None:
        assert later is not None
        assert later.time_ns == fact.time_ns + 1_000


def test_cpu_and_number_of_a_message():
    """
    What tells a gap.
    """
    assert cn_proc.decode(REAL["fork"])[0][:2] == (0, 1220914)
    assert cn_proc.decode(REAL["uid"])[0][:2] == (1, 1175538)


@real
def test_a_message_that_is_cut_is_an_error(name: str):
    """
    At each byte, never half a fact.
    """
    data = REAL[name]
    for length in range(1, len(data)):
        with pytest.raises(DecodeError):
            cn_proc.decode(data[:length])
    assert cn_proc.decode(b"") == []


@real
def test_messages_may_come_several_at_once(name: str):
    """
    One after the other in a datagram.
    """
    one = cn_proc.decode(REAL[name])
    assert cn_proc.decode(REAL[name] + REAL["exec"] + REAL[name]) == [*one, *cn_proc.decode(REAL["exec"]), *one]


@real
def test_trailing_bytes_are_an_error(name: str):
    """
    What does not belong to a message is not passed over in silence.
    """
    with pytest.raises(DecodeError):
        cn_proc.decode(REAL[name] + b"\1\2\3\4")


@pytest.mark.parametrize("name", ["fork", "fork_thread", "exec", "exit_signal", "exit_thread"])
def test_a_longer_struct_of_a_newer_kernel_is_understood(name: str):
    """
    The union may grow: what we know stays where it is.
    """
    data = bytearray(REAL[name])
    data[0] += 8
    data[32] += 8
    assert cn_proc.decode(bytes(data) + bytes(8)) == cn_proc.decode(REAL[name])


def test_an_unknown_kind_is_no_fact_but_counts():
    """
    A newer kernel's event has a number, too.
    """
    data = bytearray(REAL["exec"])
    data[36:40] = (0x00100000).to_bytes(4, "little")
    ((cpu, seq, _, fact, ack),) = cn_proc.decode(bytes(data))
    assert (cpu, seq, fact, ack) == (0, 1220915, None, None)


def test_another_connector_is_an_error():
    """
    Only the process connector's messages are read as such.
    """
    data = bytearray(REAL["exec"])
    data[16] = 7
    with pytest.raises(DecodeError, match=r"7\.1"):
        cn_proc.decode(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_facts_or_an_error(data: bytes):
    """
    And nothing else.
    """
    try:
        assert isinstance(cn_proc.decode(data), list)
    except DecodeError:
        pass


@given(st.sampled_from(sorted(REAL)), st.lists(st.tuples(st.integers(0, 75), st.integers(0, 255)), max_size=6))
def test_real_messages_with_other_bytes_in_them_are_facts_or_an_error(name: str, changes: list[tuple[int, int]]):
    """
    The walk over the messages always ends.
    """
    data = bytearray(REAL[name])
    for at, value in changes:
        data[at] = value
    try:
        assert isinstance(cn_proc.decode(bytes(data) + REAL["fork"]), list)
    except DecodeError:
        pass


changed = st.tuples(
    st.sampled_from(sorted(REAL)), st.lists(st.tuples(st.integers(0, 75), st.integers(0, 255)), max_size=2)
)


def with_changes(name: str, changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(REAL[name])
    for at, value in changes:
        data[at] = value
    return bytes(data)


@given(st.lists(st.binary(max_size=200) | changed.map(lambda one: with_changes(*one)), max_size=8))
def test_many_datagrams_at_once_are_those_one_by_one(datagrams: list[bytes]):
    """
    The quick way gives the same messages, and refuses the same datagrams, and those that were cut.
    """
    expected: list[cn_proc.Message] = []
    refused = 0
    for data in datagrams:
        try:
            expected += cn_proc.decode(data[: cn_proc.SLOT], 5)
        except DecodeError:
            refused += 1
    slots = b"".join(data[: cn_proc.SLOT].ljust(cn_proc.SLOT, b"\xff") for data in datagrams)
    assert cn_proc.decode_slots(memoryview(slots), [len(data) for data in datagrams], 5) == (expected, refused)


@pytest.mark.parametrize(("mask", "size"), [(None, 40), (0x80000003, 44)])
def test_requests_have_the_two_lengths_that_kernels_take(mask: int | None, size: int):
    """
    4 bytes for all, 8 with a mask for Linux 6.6.
    """
    data = cn_proc.request(cn_proc.PROC_CN_MCAST_LISTEN, mask)
    assert len(data) == size == int.from_bytes(data[:4], "little")
    assert data[36:40] == b"\1\0\0\0"
