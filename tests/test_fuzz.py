"""
The fuzz targets run on their seeds, whole and damaged, so that they stay as good as the decoders that they try.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS, seeds


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str):
    """
    Whole, cut at each byte, and with other bytes behind.
    """
    for seed in seeds(name):
        short = seed[:300]
        for end in range(len(short)):
            TARGETS[name](short[:end])
        TARGETS[name](seed)
        TARGETS[name](seed + b"\0\xff\n" * 7)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged(name: str, data: st.DataObject):
    """
    A seed in which some bytes are others, or nothing but any bytes.
    """
    TARGETS[name](data.draw(st.binary(max_size=200)))
    damaged = bytearray(data.draw(st.sampled_from(seeds(name)))[:1000])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=8)):
        if at < len(damaged):
            damaged[at] = value
    TARGETS[name](bytes(damaged))
