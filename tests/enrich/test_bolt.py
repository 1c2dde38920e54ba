"""
Values are read from real bolt databases, and damaged ones are an error and nothing worse.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich import bolt
from procwatch.errors import DecodeError

CAPTURES = Path(__file__).parent / "captures"
CONTAINERD = gzip.decompress((CAPTURES / "containerd-1.6-meta.db.gz").read_bytes())
PODMAN = gzip.decompress((CAPTURES / "podman-4.3-bolt_state.db.gz").read_bytes())


@pytest.mark.parametrize("number", [1, 9, 99, 180])
def test_value_in_a_large_bucket(number: int) -> None:
    """
    A key is found through branch pages.
    """
    container = (b"v1", b"default", b"containers", b"web-%d" % number)
    assert bolt.get(CONTAINERD, *container, b"image") == b"example.org/shop:3"
    assert bolt.items(CONTAINERD, *container, b"labels")[b"n"] == b"%d" % number


def test_bucket_as_a_dictionary() -> None:
    """
    All keys of a bucket come with their values.
    """
    assert sorted(bolt.items(PODMAN, b"id-registry").values()) == [b"db", b"web"]
    assert bolt.items(PODMAN, b"runtime-config")[b"os"] == b"linux"


@pytest.mark.parametrize(
    "path",
    [
        (b"absent",),
        (b"v1", b"absent", b"containers"),
        (b"v1", b"default", b"containers", b"web-1"),  # a bucket, no value
        (b"v1", b"default", b"containers", b"web-1", b"image", b"deeper"),
        (b"\0",),
        (b"\xff" * 10,),
    ],
)
def test_what_is_not_there(path: tuple[bytes, ...]) -> None:
    """
    A key or a bucket that is absent, or of the other kind, is None.
    """
    assert bolt.get(CONTAINERD, *path) is None


@pytest.mark.parametrize("data", [b"", b"\0" * 8192, CONTAINERD[:4096][::-1], CONTAINERD[:100]])
def test_not_a_database(data: bytes) -> None:
    """
    Anything else is refused.
    """
    with pytest.raises(DecodeError):
        bolt.get(data, b"v1")


def read_all(data: bytes) -> None:
    """
    Read, whatever comes of it, in all ways.
    """
    for path in ((b"v1",), (b"v1", b"default", b"containers", b"web-9", b"image"), (b"ctr", b"x", b"config")):
        try:
            bolt.get(data, *path)
            bolt.items(data, *path[:-1])
        except DecodeError:
            pass


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    """
    Any bytes give a value, nothing, or a DecodeError.
    """
    read_all(data)


@given(st.lists(st.tuples(st.integers(0, len(CONTAINERD) - 9), st.binary(min_size=1, max_size=8)), max_size=30))
def test_any_damage(changes: list[tuple[int, bytes]]) -> None:
    """
    A real database with bytes changed anywhere gives a value, nothing, or a DecodeError.
    """
    data = bytearray(CONTAINERD)
    for at, change in changes:
        data[8192 + at % 40_000 : 8192 + at % 40_000 + len(change)] = change
    read_all(bytes(data))


@given(st.integers(0, len(CONTAINERD)))
def test_cut_anywhere(end: int) -> None:
    """
    A real database cut at any byte gives a value, nothing, or a DecodeError.
    """
    read_all(CONTAINERD[:end])
