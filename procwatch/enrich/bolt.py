"""
Read one value from a bolt database (bbolt, a B+tree in one file), which containerd and older Podman keep.

Pure: any buffer in, a value, None or `DecodeError` out. The writer copies pages before it changes them and then
switches the root, so a reader without a lock sees an old state or a new one; where pages were used again while we
read, the result is an error or nothing, and the caller may try again.

The layout (bbolt's page.go, bucket.go; integers are the machine's own, in practice little endian):
    page      id u64, flags u16, count u16, overflow u32, then `count` elements
    branch    pos u32, key size u32, page u64; the key lies `pos` bytes after its element
    leaf      flags u32 (1: a bucket), pos u32, key size u32, value size u32; the value follows the key
    bucket    root page u64, sequence u64; root 0: a leaf page follows at once, within the value
    meta      at pages 0 and 1: magic u32, version u32, page size u32, flags u32, root bucket, freelist u64, high-water
              mark u64, transaction u64, FNV-1a checksum u64; the valid one with the higher transaction counts
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from mmap import mmap

from procwatch.errors import DecodeError

Buffer = bytes | mmap

_PAGE = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQQ")
_BRANCH = struct.Struct("<IIQ")
_LEAF = struct.Struct("<IIII")
_BUCKET = struct.Struct("<QQ")
_MAGIC = 0xED0CDAED
_IS_BRANCH, _IS_LEAF, _IS_BUCKET = 1, 2, 1
_MAX_DEPTH = 32  # a tree of 4 KiB pages is nowhere deeper than ten
_MAX_ITEMS = 1000


def get(data: Buffer, *path: bytes) -> bytes | None:
    """
    The value at `path`: names of buckets, then a key. None where there is none.

    Raises:
        DecodeError: `data` is not a bolt database, or a damaged one.
    """
    try:
        page = _bucket(data, path[:-1])
        found = None if page is None else page.find(path[-1])
    except struct.error as error:
        raise DecodeError(f"bolt: {error}") from error
    return None if found is None or found[0] & _IS_BUCKET else found[1]


def items(data: Buffer, *path: bytes) -> dict[bytes, bytes]:
    """
    Keys and values of the bucket at `path`, without buckets in it; at most 1000.

    Raises:
        DecodeError: `data` is not a bolt database, or a damaged one.
    """
    found: dict[bytes, bytes] = {}
    try:
        page = _bucket(data, path)
        for flags, key, value in page.all() if page else ():
            if not flags & _IS_BUCKET:
                found[key] = value
            if len(found) >= _MAX_ITEMS:
                break
    except struct.error as error:
        raise DecodeError(f"bolt: {error}") from error
    return found


class _Page:
    """
    A page within `data` at `at`; `tree` is the file, where the pages are that it refers to.
    """

    def __init__(self, tree: Buffer, page_size: int, data: Buffer, at: int) -> None:
        self._tree = tree
        self._size = page_size
        self._data = data
        self._first = at + _PAGE.size
        _, self._flags, self._count, _ = _PAGE.unpack_from(data, at)
        if not self._flags & (_IS_BRANCH | _IS_LEAF):
            raise DecodeError(f"bolt: page with flags {self._flags:#x} in a tree")

    def find(self, key: bytes) -> tuple[int, bytes] | None:
        """
        Flags and value of `key`.
        """
        page = self
        for _ in range(_MAX_DEPTH):
            if page._flags & _IS_LEAF:
                for flags, name, value in page._leaves():
                    if name == key:
                        return flags, value
                return None
            below = None
            for name, number in page._branches():
                if name > key and below is not None:
                    break
                below = number
            if below is None:
                return None
            page = self._page(below)
        raise DecodeError("bolt: a tree without end")

    def all(self) -> Iterator[tuple[int, bytes, bytes]]:
        """
        Flags, key and value of everything from here down.
        """
        pages = [self]
        for _ in range(_MAX_ITEMS):
            if not pages:
                return
            page = pages.pop()
            if page._flags & _IS_LEAF:
                yield from page._leaves()
            else:
                pages.extend(self._page(number) for _, number in page._branches())
            if len(pages) > _MAX_ITEMS:
                break
        raise DecodeError("bolt: a tree without end")

    def bucket(self, value: bytes) -> _Page:
        """
        The bucket that a value is.
        """
        root, _ = _BUCKET.unpack_from(value)
        return self._page(root) if root else _Page(self._tree, self._size, value, _BUCKET.size)

    def _page(self, number: int) -> _Page:
        return _Page(self._tree, self._size, self._tree, _offset(number, self._size, self._tree))

    def _branches(self) -> Iterator[tuple[bytes, int]]:
        for at in range(self._first, self._first + self._count * _BRANCH.size, _BRANCH.size):
            position, key_size, number = _BRANCH.unpack_from(self._data, at)
            yield _slice(self._data, at + position, key_size), number

    def _leaves(self) -> Iterator[tuple[int, bytes, bytes]]:
        for at in range(self._first, self._first + self._count * _LEAF.size, _LEAF.size):
            flags, position, key_size, value_size = _LEAF.unpack_from(self._data, at)
            start = at + position
            yield flags, _slice(self._data, start, key_size), _slice(self._data, start + key_size, value_size)


def _bucket(data: Buffer, path: tuple[bytes, ...]) -> _Page | None:
    page_size, root = _root(data)
    page = _Page(data, page_size, data, _offset(root, page_size, data))
    for name in path:
        found = page.find(name)
        if found is None or not found[0] & _IS_BUCKET:
            return None
        page = page.bucket(found[1])
    return page


def _root(data: Buffer) -> tuple[int, int]:
    """
    Page size and root page of the newest valid state.
    """
    sizes = [4096, 8192, 16384, 65536]
    if len(data) >= _PAGE.size + _META.size:
        sizes.insert(0, _META.unpack_from(data, _PAGE.size)[2])
    best: tuple[int, int, int] | None = None
    for at in (0, *sizes):
        raw = _slice(data, at + _PAGE.size, _META.size, strict=False)
        if len(raw) < _META.size:
            continue
        magic, version, page_size, _, root, _, _, _, transaction, checksum = _META.unpack(raw)
        if magic != _MAGIC or version != 2 or page_size < 512 or checksum != _fnv(raw[:-8]):
            continue
        best = max(best or (-1, 0, 0), (transaction, page_size, root))
    if best is None:
        raise DecodeError("bolt: no valid meta page")
    return best[1], best[2]


def _offset(number: int, page_size: int, data: Buffer) -> int:
    offset = number * page_size
    if offset >= len(data):
        raise DecodeError(f"bolt: page {number} is beyond the end")
    return offset


def _slice(data: Buffer, start: int, size: int, *, strict: bool = True) -> bytes:
    found = data[start : start + size]
    if strict and len(found) != size:
        raise DecodeError("bolt: an element reaches beyond its page")
    return found


def _fnv(data: bytes) -> int:
    """
    64-bit FNV-1a.
    """
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest
