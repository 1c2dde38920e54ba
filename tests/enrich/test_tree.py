"""
Files of others are read without leaving their tree, without blocking, and up to a size.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich.tree import Tree, decode, dig, text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """
    A tree beside a secret.
    """
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_reads_and_lists(root: Path, no_leaks: None) -> None:
    """
    Files, directories and JSON are read; what is absent is None or empty.
    """
    (root / "a").mkdir()
    (root / "a/b.json").write_text('{"x": {"y": "z"}}')
    with Tree(str(root)) as tree:
        assert tree.read("a/b.json") == tree.read("/a/b.json") == b'{"x": {"y": "z"}}'
        assert text(tree.json("a/b.json"), "x", "y") == "z"
        assert tree.list("a") == ["b.json"]
        assert tree.stat("a") is not None
        assert tree.read("absent") is tree.json("absent") is tree.stat("absent") is None
        assert tree.list("absent") == tree.list("a/b.json") == []
        assert tree.read("a") is None


@pytest.mark.parametrize("target", ["../secret", "../../../../../../../..{secret}", "{secret}"])
def test_links_stay_inside(root: Path, target: str, no_leaks: None) -> None:
    """
    No symbolic link and no ".." leads out of the tree.
    """
    (root / "link").symlink_to(target.format(secret=root.parent / "secret"))
    with Tree(str(root)) as tree:
        assert tree.read("link") is None
        assert tree.read("../secret") is None


def test_links_within(root: Path) -> None:
    """
    Links of the host are followed as if the tree were the whole; those of a container are not followed at all.
    """
    (root / "data").write_text("x")
    (root / "link").symlink_to("/data")
    with Tree(str(root)) as tree, Tree(str(root), foreign=True) as foreign:
        assert tree.read("link") == b"x"
        assert foreign.read("link") is None
        assert foreign.read("data") == b"x"


def test_fifo_and_device_are_not_opened(root: Path, no_leaks: None) -> None:
    """
    A FIFO, which would block, is not opened.
    """
    os.mkfifo(root / "fifo")
    with Tree(str(root)) as tree:
        assert tree.read("fifo") is None


def test_size_limit(root: Path, no_leaks: None) -> None:
    """
    A file that is longer than the limit is not read.
    """
    (root / "file").write_bytes(b"x" * 11)
    with Tree(str(root)) as tree:
        assert tree.read("file", limit=11) == b"x" * 11
        assert tree.read("file", limit=10) is None


def test_odd_names(root: Path) -> None:
    """
    Names that no file can have are absent.
    """
    with Tree(str(root)) as tree:
        for name in ("\0", "a\0b", "\ud800", "x" * 5000, ""):
            assert tree.read(name) is None


@given(st.binary() | st.recursive(st.just(b"1"), lambda inner: inner.map(lambda value: b"[" + value + b"]")))
def test_any_bytes_are_json_or_none(content: bytes) -> None:
    """
    Whatever a file holds, there is a value or None.
    """
    value = decode(content)
    dig(value, "a", "b")
    assert text(value, "a") is None or isinstance(text(value, "a"), str)


def test_deep_json_is_none() -> None:
    """
    Nesting that would exhaust the stack is refused.
    """
    assert decode(b"[" * 100_000 + b"]" * 100_000) is None
