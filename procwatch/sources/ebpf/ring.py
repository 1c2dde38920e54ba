"""
The reader's side of a BPF ring buffer: three mappings of one map.

The first page is ours, how far we have read. The second is the kernel's, how far it has written. Then comes the data,
mapped twice in a row, so that a record which goes over the end lies in one piece (kernel/bpf/ringbuf.c).

Order of memory accesses: the kernel publishes a record with a release, first the position and then the cleared busy
bit, and expects an acquire from us. x86 never reorders loads with loads nor stores behind earlier loads, so plain
accesses do. Other machines may, and Python has no barriers; there each batch is walked once to find how far it is
complete, and `membarrier(2)`, which makes the calling thread execute a full barrier, stands between the steps.
"""

from __future__ import annotations

import mmap
import os
import struct

from procwatch.sources.ebpf import loader
from procwatch.wire.bpf_event import BUSY, DISCARD, RING_HEADER

_GLOBAL_EXPEDITED = 2  # MEMBARRIER_CMD_GLOBAL_EXPEDITED, Linux 4.16
_LENGTH = struct.Struct("<I")

ORDERED = os.uname().machine in ("x86_64", "i686")


class Ring:
    """
    The kernel counts positions in bytes since the beginning of time; here they are offsets into `data`.

    Args:
        fd: The map. It stays the caller's.
        size: Its `max_entries`, in bytes.
        ordered: Whether the machine keeps loads in order; False is right everywhere.
    """

    def __init__(self, fd: int, size: int, ordered: bool = ORDERED) -> None:
        self._mask = size - 1
        self._ordered = ordered
        page = mmap.PAGESIZE
        self._ours = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._theirs = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # Views of 64-bit words: one load or store each, where mmap's own slices copy bytes.
        self._consumer = memoryview(self._ours).cast("Q")
        self._producer = memoryview(self._theirs)[:8].cast("Q")
        self.data = self._theirs

    def pending(self) -> tuple[int, int]:
        """
        Where in `data` the unread records begin and end. The last may still be busy.
        """
        consumed = self._consumer[0]
        produced = self._producer[0]
        begin = mmap.PAGESIZE + (consumed & self._mask)
        end = begin + produced - consumed
        if not self._ordered and begin != end:
            loader.membarrier(_GLOBAL_EXPEDITED)
            end = self._complete(begin, end)
            loader.membarrier(_GLOBAL_EXPEDITED)
        return begin, end

    def _complete(self, at: int, end: int) -> int:
        while at < end:
            (length,) = _LENGTH.unpack_from(self.data, at)
            if length & BUSY:
                break
            at += RING_HEADER + ((length & ~DISCARD) + 7 & ~7)
        return at

    def release(self, size: int) -> None:
        """
        Give `size` bytes back to the kernel: they have been read.
        """
        if not self._ordered:
            loader.membarrier(_GLOBAL_EXPEDITED)
        self._consumer[0] += size

    def close(self) -> None:
        """
        Unmap.
        """
        for view in (self._consumer, self._producer):
            view.release()
        self._ours.close()
        self._theirs.close()


class Counters:
    """
    The kernel side's counts of each kind of record, seen and dropped: a mapped array of 64-bit words.
    """

    KINDS = 8

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self._words = memoryview(self._map)[: 16 * self.KINDS].cast("Q")

    def seen(self) -> list[int]:
        """
        Records made since the programs were attached, by kind; those that were dropped too.
        """
        return self._words[: self.KINDS].tolist()

    def lost(self) -> list[int]:
        """
        Records for which the ring had no room, by kind.
        """
        return self._words[self.KINDS :].tolist()

    def close(self) -> None:
        """
        Unmap.
        """
        self._words.release()
        self._map.close()
