"""
The kernel's accounts of ended tasks, in the layouts of all versions, and from any bytes.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.wire import taskstats
from procwatch.wire.taskstats import Record

# Size of struct taskstats in each version.
SIZES = {8: 328, 9: 344, 10: 352, 11: 368, 12: 400, 13: 416, 14: 432, 15: 560, 16: 560}


def stats(version: int, *, flag: int = 0x20, tgid: int = 70, tid: int = 70, user: int = 4000) -> bytes:
    """
    A struct taskstats, field by field as the header of its version has them.
    """
    peaks = bytes(16) if version == 15 else b""
    data = struct.pack("=H2xIBB6x", version, 0x900, flag, 0)
    data += (bytes(16) + peaks) * 3 + bytes(16)  # cpu, blkio, swapin delays; run totals
    data += struct.pack("=32sB3x4xIIII", b"caf\xff", 0, 1000, 100, tid, 1)
    data += struct.pack("=I4xQQQQQ", 5, 123456, user, 8000, 1, 2)  # btime, etime, utime, stime, faults
    data += struct.pack("=QQQQ", 0, 0, 568, 900) + bytes(32)  # coremem, virtmem, hiwater rss and vm, four of I/O calls
    data += struct.pack("=QQQ", 4096, 8192, 0) + bytes(40)  # I/O bytes, context switches, scaled times
    data += (bytes(16) + peaks) * 2  # freepages, thrashing
    data += struct.pack("=Q", 5) + bytes(16) + peaks  # btime64, compact
    data += struct.pack("=I4xQQQ", tgid, 223456, 0xFE00, 4711) + (bytes(16) + peaks) * 2  # version 12; wpcopy, irq
    return data.ljust(SIZES[16], b"\0")[: SIZES[version]]


def aggregate(kind: int, inner: int, number: int, data: bytes) -> bytes:
    body = struct.pack("=HHIHH", 8, inner, number, 4 + len(data), 3) + data
    return struct.pack("=HH", 4 + len(body), kind) + body


def message(*attributes: bytes, kind: int = 31) -> bytes:
    body = struct.pack("=BBH", 2, 1, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


class TestDecode:
    @pytest.mark.parametrize("version", [12, 13, 14, 15, 16])
    def test_versions_with_the_executable(self, version: int) -> None:
        """
        From version 12 on a record tells its process, whether that is over, and the executable's device and inode.
        """
        data = message(aggregate(4, 1, 71, stats(version, tid=71)))

        expected = Record(
            71, 70, True, version, 0x900, "caf\udcff", 1000, 100, 1, 223456, 4000, 8000, 568, 4096, 8192, 0xFE00, 4711
        )
        assert [expected] == taskstats.decode(data)

    @pytest.mark.parametrize("version", [8, 9, 10, 11])
    def test_older_versions(self, version: int) -> None:
        """
        Before that, a record tells a task, and not whether its process is over.
        """
        (record,) = taskstats.decode(message(aggregate(4, 1, 70, stats(version))))

        assert (
            record.pid, record.last, record.elapsed_us, record.user_us, record.exe_dev, record.exe_inode
        ) == (70, None, 123456, 4000, 0, 0)  # fmt: skip

    def test_thread(self) -> None:
        """
        Without AGROUP a thread ended, and its process goes on.
        """
        (record,) = taskstats.decode(message(aggregate(4, 1, 71, stats(16, flag=0))))

        assert (record.tid, record.pid, record.last) == (71, 70, False)

    @pytest.mark.parametrize("version", [8, 15, 16])
    def test_group(self, version: int) -> None:
        """
        The last of several threads brings the kernel's sum over all of them.
        """
        task, group = stats(version, tid=72), stats(version, user=99000)
        (record,) = taskstats.decode(message(aggregate(4, 1, 72, task), aggregate(5, 2, 70, group)))

        assert (
            record.pid, record.last, record.user_us, record.group_user_us, record.group_system_us
        ) == (70, True, 4000, 99000, 8000)  # fmt: skip

    def test_padding_attribute_is_stepped_over(self) -> None:
        """
        Some machines get an empty attribute first, for alignment.
        """
        null = struct.pack("=HH", 4, 6)

        assert len(taskstats.decode(message(null, aggregate(4, 1, 70, stats(16))))) == 1

    def test_newer_version_is_read_as_far_as_it_is_known(self) -> None:
        """
        A longer struct of a later version still has the fields that we know.
        """
        data = bytearray(stats(16) + bytes(64))
        data[0:2] = struct.pack("=H", 17)

        (record,) = taskstats.decode(message(aggregate(4, 1, 70, bytes(data))))

        assert record.exe_inode == 4711

    @pytest.mark.parametrize("size", [0, 1, 2, 8, 263])
    def test_too_short_is_refused(self, size: int) -> None:
        """
        A record that ends within the fields of every version is refused.
        """
        with pytest.raises(DecodeError):
            taskstats.decode(message(aggregate(4, 1, 70, stats(16)[:size])))

    def test_cut_at_each_byte(self) -> None:
        """
        A datagram cut anywhere is refused.
        """
        data = message(aggregate(4, 1, 70, stats(16)))
        for end in range(1, len(data)):
            with pytest.raises(DecodeError):
                taskstats.decode(data[:end])

    @given(st.binary(max_size=700))
    def test_any_bytes(self, data: bytes) -> None:
        """
        Whatever comes, there are records or a DecodeError.
        """
        for text in (data, message(data), message(aggregate(4, 1, 70, data), aggregate(5, 2, 70, data))):
            try:
                taskstats.decode(text)
                taskstats.errors(text)
            except DecodeError:
                pass


class TestSlots:
    @given(st.lists(st.tuples(st.integers(8, 17), st.sampled_from([0, 0x20]), st.integers(0, 700), st.booleans())))
    def test_many_are_those_one_by_one(self, kinds: list[tuple[int, int, int, bool]]) -> None:
        """
        The quick way gives the same records, and refuses the same datagrams: of all versions, cut anywhere.
        """
        datagrams = []
        for version, flag, cut, group in kinds:
            data = bytearray(stats(min(version, 16), tid=71, flag=flag))
            data[0] = version
            attributes = [aggregate(4, 1, 71, bytes(data)), *([aggregate(5, 2, 70, bytes(data))] if group else [])]
            datagrams.append(message(*attributes)[: cut or None])
        expected: list[Record] = []
        refused = 0
        for datagram in datagrams:
            try:
                expected += taskstats.decode(datagram)
            except DecodeError:
                refused += 1
        slots = b"".join(datagram.ljust(taskstats.SLOT, b"\xff") for datagram in datagrams)

        assert taskstats.decode_slots(memoryview(slots), [*map(len, datagrams)]) == (expected, refused)

    @given(st.binary(min_size=36, max_size=700), st.integers(0, 5000))
    def test_any_bytes(self, data: bytes, length: int) -> None:
        """
        Whatever comes, of whatever length it is said to be, there are records or it is refused.
        """
        records, refused = taskstats.decode_slots(memoryview(data.ljust(taskstats.SLOT, b"\0")), [length])

        assert refused in (0, 1)
        assert all(isinstance(record, Record) for record in records)


class TestErrors:
    def test_acknowledgement(self) -> None:
        """
        An NLMSG_ERROR carries a negative errno, 0 for success; other messages are none.
        """
        assert taskstats.errors(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -1) + bytes(16)) == 1
        assert taskstats.errors(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, 0) + bytes(16)) == 0
        assert taskstats.errors(message()) is None
        assert taskstats.decode(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, 0) + bytes(16)) == []
