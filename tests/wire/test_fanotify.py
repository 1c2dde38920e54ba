"""
fanotify's events, from real bytes and from any bytes.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.wire import fanotify
from procwatch.wire.fanotify import Event

EXEC = struct.pack("=IBBHQii", 24, 3, 0, 24, 0x1000, 5, 4711)
OVERFLOW = struct.pack("=IBBHQii", 24, 3, 0, 24, 0x4000, -1, 0)
WITH_PIDFD = struct.pack("=IBBHQii", 32, 3, 0, 24, 0x1000, 6, 12) + struct.pack("=BBHi", 4, 0, 8, 7)


class TestDecode:
    def test_events_in_order(self) -> None:
        """
        A read holds several events, one after the other.
        """
        assert [Event(0x1000, 5, 4711), Event(0x4000, -1, 0)] == fanotify.decode(EXEC + OVERFLOW)

    def test_information_records_are_stepped_over(self) -> None:
        """
        What follows the metadata of an event is left alone.
        """
        assert [Event(0x1000, 6, 12), Event(0x1000, 5, 4711)] == fanotify.decode(WITH_PIDFD + EXEC)

    def test_the_quick_way_says_the_same_or_nothing(self) -> None:
        """
        Plain events are the same tuples; what has more in it, or is cut, is left to the other way.
        """
        assert fanotify.decode_usual(EXEC + OVERFLOW) == fanotify.decode(EXEC + OVERFLOW)
        assert fanotify.decode_usual(WITH_PIDFD + EXEC) is None
        assert fanotify.decode_usual(EXEC + EXEC[:8]) is None
        assert fanotify.decode_usual(EXEC[:4] + b"\4" + EXEC[5:]) is None

    @pytest.mark.parametrize("cut", range(1, 24))
    def test_cut_event_is_refused(self, cut: int) -> None:
        """
        An event that is cut short is no event.
        """
        with pytest.raises(DecodeError):
            fanotify.decode(EXEC + EXEC[:cut])

    def test_other_version_is_refused(self) -> None:
        """
        Another version of the metadata may mean anything.
        """
        with pytest.raises(DecodeError, match="version 4"):
            fanotify.decode(EXEC[:4] + b"\4" + EXEC[5:])

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        """
        Whatever comes, there are events or a DecodeError.
        """
        try:
            fanotify.decode(data)
        except DecodeError:
            pass


def test_allow() -> None:
    """
    The answer names the descriptor and FAN_ALLOW.
    """
    assert fanotify.allow(5) == b"\x05\0\0\0\1\0\0\0"
