"""
File capabilities are shown as getcap(8) shows them.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich import capabilities
from procwatch.errors import DecodeError


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((0x02000001, 1 << 13, 0, 0, 0), "cap_net_raw=ep"),
        ((0x02000000, 1 << 13, 0, 0, 0), "cap_net_raw=p"),
        ((0x02000001, 1 << 12 | 1 << 13, 1 << 12 | 1 << 13, 0, 0), "cap_net_admin,cap_net_raw=eip"),
        ((0x02000001, 1 << 10, 0, 1 << 7, 0), "cap_net_bind_service,cap_bpf=ep"),
        ((0x02000000, 1, 2, 0, 0), "cap_chown=p cap_dac_override=i"),
        ((0x03000001, 1 << 13, 0, 0, 0, 100_000), "cap_net_raw=ep [rootid=100000]"),
        ((0x01000001, 1 << 13, 0), "cap_net_raw=ep"),
        ((0x02000000, 0, 0, 0, 0), "="),
        ((0x02000000, 0, 0, 1 << 31, 0), "63=p"),  # newer than our table
    ],
)
def test_forms(words: tuple[int, ...], text: str) -> None:
    """
    All revisions, all sets.
    """
    assert capabilities.decode(struct.pack(f"<{len(words)}I", *words)) == text


@given(st.binary(max_size=32))
def test_any_bytes(value: bytes) -> None:
    """
    Any bytes are capabilities or a DecodeError.
    """
    try:
        assert capabilities.decode(value)
    except DecodeError:
        pass
