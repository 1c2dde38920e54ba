"""
Records of the BPF programs: a real ring's bytes, and any bytes.
"""

from __future__ import annotations

import struct
from mmap import PAGESIZE
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.facts import Details, Exec, ExecFailed, Exit, Fact, Fork, Usage
from procwatch.wire import bpf_event
from procwatch.wire.bpf_event import BUSY, DISCARD, Decoder

# Two children of one program: a script by a relative name with odd arguments, after an exec that failed; /bin/true
# with 30,000 bytes of arguments at a limit of 20,000. Recorded on 6.18; the cgroup was renamed.
CAPTURE = (Path(__file__).parents[1] / "captures" / "bpf_ring-6.18.bin").read_bytes()
CGROUP = "/demo0.slice/0123456789abcdef0123456789abcdef"


def decode(data: bytes, **options: int) -> list[Fact]:
    """
    All facts in the bytes.
    """
    facts: list[Fact] = []
    assert Decoder().decode(data, 0, len(data), facts, **options) == len(data)
    return facts


def records(data: bytes) -> list[bytes]:
    """
    The bytes, cut into records.
    """
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        following = at + 8 + (length + 7 & ~7)
        found.append(data[at:following])
        at = following
    return found


def record(kind: int, flags: int, body: bytes, pid: int = 7) -> bytes:
    """
    A record of a process that was born at second 1, at second 2.
    """
    content = struct.pack("<IIQQII", kind, pid, 2_000_000_000, 1_000_000_000, 1, flags) + body
    return struct.pack("<II", len(content), 0) + content + bytes(-len(content) % 8)


def shared(exe: bytes = b"x\0", cwd: bytes = b"", cgroup: bytes = b"", file: bytes = b"./x", flags: int = 0) -> bytes:
    """
    What an exec has in common with others.
    """
    lengths = [len(name) for name in (exe, cwd, cgroup, file)]
    ids = (0, 0, 0, 0, 0xFFFFFFFF, 1, 0, flags)
    return struct.pack("<QQQ8I32s16s4H", 3, 4, 5, *ids, b"", b"x", *lengths) + exe + cwd + cgroup + file


def execution(argv: bytes = b"x\0", before: int = 0, flags: int = 0, common: bytes = shared()) -> bytes:
    """
    An exec's record.
    """
    return record(1, flags, struct.pack("<QIIII", 10, 7, len(argv), before, len(common)) + common + argv)


class TestCapture:
    def test_all(self):
        """
        Every record of a real ring becomes the fact it is.
        """
        kinds = [Fork, ExecFailed, Exec, Exit, Fork, Exec, Exit]

        assert [type(fact) for fact in decode(CAPTURE)] == kinds

    def test_script(self):
        """
        An exec is whole: what it shares with others, and its own.
        """
        fork, failed, execution, end, *_ = decode(CAPTURE)
        namespaces = {
            "pid": 4026531836,
            "mnt": 4026531832,
            "user": 4026531837,
            "net": 4026531833,
            "uts": 4026531838,
            "ipc": 4026531839,
            "cgroup": 4026531835,
            "time": 4026531834,
        }

        assert isinstance(fork, Fork)
        assert isinstance(execution, Exec)
        assert isinstance(end, Exit)
        assert execution.details == Details(
            comm="hello",
            exe="/usr/bin/dash",
            exe_deleted=False,
            file="bin/hello",
            script="/tmp/capture/bin/hello",
            cwd="/tmp/capture",
            uid=0,
            gid=0,
            euid=0,
            egid=0,
            tty="",
            session=3716,
            cgroup=CGROUP,
            exe_dev=65024,
            exe_inode=260180,
            exe_size=125640,
            exe_memfd=False,
            namespaces=namespaces,
        )
        assert execution.argv == ["/bin/sh", "-e", "bin/hello", "", "two words", "\udcff\udcfe"]
        assert (execution.ppid, execution.ns_pid, execution.first) == (fork.ppid, fork.pid, True)
        assert execution.start_ns == end.start_ns
        assert fork.start_ticks == end.start_ns // 10_000_000  # type: ignore[operator]
        assert failed == ExecFailed(failed.time_ns, fork.pid, "/tmp/capture/nowhere", 2)
        assert (end.status, end.comm) == (77 << 8, "hello")

    def test_arguments_in_parts(self):
        """
        Arguments of several records are put together, and the cut is marked.
        """
        execution = decode(CAPTURE)[5]

        assert isinstance(execution, Exec)
        assert execution.argv == ["true", "y" * (20_000 - 5)]
        assert (execution.argv_truncated, execution.argv_missing) == (True, None)

    def test_lost_part(self):
        """
        Arguments of which a part is missing are not told.
        """
        whole = records(CAPTURE)
        parts = [data for data in whole if data[8] == bpf_event.ARGV]
        execution = decode(b"".join(data for data in whole if data is not parts[0]))[5]

        assert isinstance(execution, Exec)
        assert (execution.argv, execution.argv_truncated, execution.argv_missing) == (None, False, "lost")

    def test_in_pieces(self):
        """
        Record by record gives what all at once gives, and what is alike is shared.
        """
        decoder, facts = Decoder(), list[Fact]()
        for data in records(CAPTURE) * 2:
            assert decoder.decode(data, 0, len(data), facts) == len(data)

        assert facts == decode(CAPTURE) * 2
        first, _, again, _ = (fact.details for fact in facts if isinstance(fact, Exec))
        assert first is again

    def test_limit(self):
        """
        No more records than asked for.
        """
        facts: list[Fact] = []
        decoder = Decoder()
        at = decoder.decode(CAPTURE, 0, len(CAPTURE), facts, 2)
        assert len(facts) == 2
        assert decoder.decode(CAPTURE, at, len(CAPTURE), facts) == len(CAPTURE)
        assert facts == decode(CAPTURE)

    def test_cut_anywhere(self):
        """
        Bytes cut in the middle of a record give the records before it and DecodeError.
        """
        ends = [0]
        for data in records(CAPTURE):
            ends.append(ends[-1] + len(data))
        for end in range(0, len(CAPTURE), 5):
            if end not in ends:
                with pytest.raises(DecodeError):
                    decode(CAPTURE[:end])


class TestState:
    def test_busy(self):
        """
        Decoding stops before a record that the kernel is still writing.
        """
        first, second = records(CAPTURE)[:2]
        (length,) = struct.unpack_from("<I", second)
        facts: list[Fact] = []
        data = first + struct.pack("<I", length | BUSY) + second[4:]

        assert Decoder().decode(data, 0, len(data), facts) == len(first)
        assert len(facts) == 1

    def test_discarded(self):
        """
        A record that the kernel gave up is skipped.
        """
        first, second, third = records(CAPTURE)[:3]
        (length,) = struct.unpack_from("<I", second)

        assert len(decode(first + struct.pack("<I", length | DISCARD) + second[4:] + third)) == 2


class TestExec:
    @pytest.mark.parametrize(
        ("flag", "field", "value"),
        [
            (bpf_event.EXE_DELETED, "exe_deleted", True),
            (bpf_event.SETUID | bpf_event.CAPABILITIES, "privileges", ["setuid", "capabilities"]),
            (bpf_event.SETGID, "privileges", ["setgid"]),
            (bpf_event.SCRIPT, "script", "/x"),
            (bpf_event.EXE_CUT, "exe", None),
            (bpf_event.CWD_CUT, "cwd", None),
            (bpf_event.CGROUP_CUT, "cgroup", None),
            (bpf_event.FILE_CUT, "file", None),
        ],
    )
    def test_flags(self, flag: int, field: str, value: object):
        """
        Each flag says one thing, and a name that was cut has a reason to be missing.
        """
        (fact,) = decode(execution(common=shared(flags=flag)))

        assert isinstance(fact, Exec)
        assert fact.details is not None
        assert getattr(fact.details, field) == value
        assert fact.details.missing == ({field: "too_long"} if value is None else {})

    @pytest.mark.parametrize(
        ("argv", "flags", "expected", "truncated", "missing"),
        [
            (b"x\0y\0", 0, ["x", "y"], False, None),
            (b"x\0\0\0", 0, ["x", "", ""], False, None),
            (b"\0", 0, [""], False, None),
            (b"", 0, [], False, None),
            (b"x\0y", bpf_event.ARGV_CUT, ["x", "y"], True, None),
            (b"x\0", bpf_event.ARGV_FAULT, ["x"], True, None),
            (b"", bpf_event.ARGV_FAULT, None, False, "paged_out"),
        ],
    )
    def test_argv(self, argv: bytes, flags: int, expected: list[str] | None, truncated: bool, missing: str | None):
        """
        Arguments end with a NUL each; what could not be read has a reason.
        """
        (fact,) = decode(execution(argv, flags=flags))

        assert isinstance(fact, Exec)
        assert (fact.argv, fact.argv_truncated, fact.argv_missing) == (expected, truncated, missing)

    def test_same_bytes_cut_elsewhere(self):
        """
        Names that are the same bytes in a row, but end elsewhere, are not mixed up.
        """
        data = execution(common=shared(b"a\0b\0", b"")) + execution(common=shared(b"a\0", b"b\0"))
        first, second = decode(data)

        assert isinstance(first, Exec)
        assert isinstance(second, Exec)
        assert first.details is not None
        assert second.details is not None
        assert (first.details.exe, first.details.cwd) == ("/b/a", "/")
        assert (second.details.exe, second.details.cwd) == ("/a", "/b")

    def test_memfd(self):
        """
        Only a file that is on no mount can be one of memfd_create(2).
        """
        flags = bpf_event.EXE_DELETED | bpf_event.EXE_DETACHED
        data = execution(common=shared(b"memfd:x\0", flags=flags)) + execution(common=shared(b"memfd:x\0"))
        memfd, file = decode(data)

        assert isinstance(memfd, Exec)
        assert isinstance(file, Exec)
        assert memfd.details is not None
        assert file.details is not None
        assert (memfd.details.exe, memfd.details.exe_memfd) == ("/memfd:x", True)
        assert (file.details.exe, file.details.exe_memfd) == ("/memfd:x", False)

    def test_caches_are_bounded(self):
        """
        However many different programs run, what is kept stays small.
        """
        decoder = Decoder()
        data = b"".join(execution(common=shared(b"%d\0" % number)) for number in range(10_000))
        decoder.decode(data, 0, len(data), [])
        data = b"".join(record(bpf_event.ARGV, 8192, bytes(8192), pid=pid) for pid in range(200))
        decoder.decode(data, 0, len(data), [])

        assert max(len(kept) for kept in vars(decoder).values() if kept is not None) <= 4096
        assert len(decoder._parts) <= 64


class TestExit:
    def exited(self, **fields: int) -> bytes:
        """
        An exit's record.
        """
        values = {"utime": 0, "stime": 0, "runtime": 5, "rss": 0, "maxrss": 0, "status": 0, "flags": 0} | fields
        numbers = [values[name] for name in ("utime", "stime", "runtime", "rss", "maxrss", "status")]
        return record(bpf_event.EXIT, values["flags"], struct.pack("<5QI4x16s", *numbers, b"x"))

    def test_usage(self):
        """
        Ticks tell the ratio of user and system time, the scheduler's clock the sum.
        """
        (fact,) = decode(self.exited(utime=3, stime=1, runtime=1000, rss=2))

        assert isinstance(fact, Exit)
        assert fact.usage == Usage(750, 250, 2 * PAGESIZE)

    def test_unknown_memory(self):
        """
        No page counted is no figure.
        """
        (fact,) = decode(self.exited())

        assert isinstance(fact, Exit)
        assert fact.usage == Usage(5, 0, None)

    @pytest.mark.parametrize(("peak", "expected"), [(9, None), (10, None), (11, 11)])
    def test_late_memory(self, peak: int, expected: int | None):
        """
        Where the exit tells the peak of all that ran in the process, it counts only if it grew since the exec.
        """
        data = execution() + self.exited(flags=bpf_event.NO_MM, maxrss=peak) * 2
        facts: list[Fact] = []
        Decoder(peaks=True).decode(data, 0, len(data), facts)
        first, second = (fact.usage for fact in facts if isinstance(fact, Exit))

        assert first is not None
        assert second is not None
        assert first.max_rss_bytes == (expected and expected * PAGESIZE)
        assert second.max_rss_bytes is None  # its exec was not seen


class TestAnyBytes:
    @given(st.binary(max_size=400))
    def test_noise(self, data: bytes):
        """
        Any bytes give facts or DecodeError.
        """
        try:
            decode(data)
        except (DecodeError, AssertionError):  # the latter: it stopped before a busy record
            pass

    @given(st.integers(0, 6), st.integers(0, 2**32 - 1), st.binary(max_size=300))
    def test_any_body(self, kind: int, flags: int, body: bytes):
        """
        A well-framed record with any content gives facts or DecodeError.
        """
        try:
            decode(record(kind, flags, body))
        except DecodeError:
            pass

    @given(st.integers(0, len(records(CAPTURE)) - 1), st.data())
    def test_changed_capture(self, index: int, data: st.DataObject):
        """
        A real record with one byte changed gives facts or DecodeError.
        """
        changed = bytearray(records(CAPTURE)[index][:2000])
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        try:
            decode(bytes(changed))
        except (DecodeError, AssertionError):
            pass

    @given(st.lists(st.binary(max_size=20).filter(lambda argument: b"\0" not in argument), min_size=1))
    def test_argv_is_exact(self, argv: list[bytes]):
        """
        Any arguments come back byte for byte.
        """
        (fact,) = decode(execution(b"".join(argument + b"\0" for argument in argv)))

        assert isinstance(fact, Exec)
        assert fact.argv is not None
        assert [argument.encode("utf-8", "surrogateescape") for argument in fact.argv] == argv
