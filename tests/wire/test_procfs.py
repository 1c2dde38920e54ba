"""
The texts of /proc: real ones, hostile ones, and any bytes at all.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.wire import procfs

STAT = (
    b"5676 (cat) R 5670 5671 3722 34817 -1 4194368 100 0 0 0 0 0 0 0 20 0 1 0 100832 3133440 378"
    b" 18446744073709551615 94771072094208 94771072114089 140724905434928 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0"
    b" 94771072130096 94771072131712 94771235676160 140724905442007 140724905442027 140724905442027"
    b" 140724905443307 256\n"
)
STATUS = (
    b"Name:\tcat\nUmask:\t0022\nState:\tR (running)\nTgid:\t5677\nNgid:\t0\nPid:\t5677\nPPid:\t5670\nTracerPid:\t0\n"
    b"Uid:\t1000\t1001\t0\t0\nGid:\t100\t101\t0\t0\nFDSize:\t256\nGroups:\t4 20 \nNStgid:\t5677\t12\nNSpid:\t5677\t12\n"
)
DECODERS: list[Callable[[bytes], object]] = [
    procfs.stat,
    procfs.status,
    procfs.argv,
    procfs.cgroup_path,
    procfs.last_pid,
    procfs.born,
    procfs.auxv,
]


@given(st.sampled_from(DECODERS), st.binary(max_size=600))
def test_any_bytes(decode: Callable[[bytes], object], data: bytes) -> None:
    """
    Every decoder gives a value or DecodeError, whatever comes.
    """
    try:
        decode(data)
    except DecodeError:
        pass


@given(st.sampled_from([(procfs.stat, STAT), (procfs.status, STATUS)]), st.data())
def test_damaged_text(case: tuple[Callable[[bytes], object], bytes], data: st.DataObject) -> None:
    """
    A real text with a piece cut out or replaced gives a value or DecodeError.
    """
    decode, text = case
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, len(text)))
    try:
        decode(text[:begin] + data.draw(st.binary(max_size=30)) + text[end:])
    except DecodeError:
        pass


def test_stat() -> None:
    """
    The fields come from the places that proc(5) gives them.
    """
    stat = procfs.stat(STAT)

    assert (stat.comm, stat.state, stat.ppid, stat.session, stat.tty_nr) == ("cat", "R", 5670, 3722, 34817)
    assert (stat.threads, stat.start_ticks, stat.exit_signal, stat.exit_code) == (1, 100832, 17, 256)
    assert stat.image == (94771072094208, 94771072114089, 140724905434928)
    assert stat.readable
    assert stat.flags & procfs.PF_FORKNOEXEC
    assert not stat.kernel_thread
    assert not stat.ending


@given(st.binary(max_size=40).filter(lambda comm: b"\0" not in comm))
def test_comm_of_any_bytes(comm: bytes) -> None:
    """
    A process cannot shift the fields by the name that it gives itself, and the name keeps its bytes.
    """
    stat = procfs.stat(STAT.replace(b"cat", comm))

    assert stat.ppid == 5670
    assert stat.comm.encode("utf-8", "surrogateescape") == comm


@pytest.mark.parametrize(("state", "threads", "ended"), [(b"Z", b"1", True), (b"Z", b"2", False), (b"S", b"1", False)])
def test_zombie(state: bytes, threads: bytes, ended: bool) -> None:
    """
    A process whose leader is a zombie has ended only if no other thread lives.
    """
    text = STAT.replace(b") R ", b") " + state + b" ").replace(b" 20 0 1 0 ", b" 20 0 " + threads + b" 0 ")

    assert procfs.stat(text).ended is ended


def test_status() -> None:
    """
    Real and effective ids and the pids of nested namespaces are told apart.
    """
    status = procfs.status(STATUS)

    assert status == procfs.Status(tgid=5677, uid=1000, euid=1001, gid=100, egid=101, ns_pids=(5677, 12))


def test_status_of_an_old_kernel() -> None:
    """
    Without NSpid (before Linux 4.1) there are no nested pids.
    """
    assert procfs.status(STATUS.partition(b"NStgid")[0]).ns_pids == ()


@pytest.mark.parametrize(
    ("data", "argv"),
    [
        (b"", []),
        (b"\0", [""]),
        (b"a\0\0b\0", ["a", "", "b"]),
        (b"a\0\0", ["a", ""]),
        (b"nginx: worker", ["nginx: worker"]),
        (b"\xff\0", ["\udcff"]),
    ],
)
def test_argv(data: bytes, argv: list[str]) -> None:
    """
    Arguments end with NUL, may be empty, and may lack the last NUL when the process wrote over them.
    """
    assert procfs.argv(data) == argv


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
def test_argv_round_trip(argv: list[str]) -> None:
    """
    What execve(2) lays out comes back the same.
    """
    assert procfs.argv(b"".join(argument.encode() + b"\0" for argument in argv)) == argv


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b"0::/user.slice/a.scope\n", "/user.slice/a.scope"),
        (b"4:memory:/m\n1:name=systemd:/s\n0::/u\n", "/u"),
        (b"4:memory:/m\n1:name=systemd:/s\n0::/\n", "/s"),
        (b"9:name=systemd:/\n5:devices:/d\n4:memory:/m\n3:cpu,cpuacct:/c\n0::/\n", "/m"),
        (b"5:net_cls,net_prio:/n\n0::/\n", "/n"),
        (b"2:cpu:/\n0::/\n", "/"),
        (b"", "/"),
        (b"0::/a:b (deleted)\n", "/a:b"),
        (b"0::/\xff\r\n", "/\udcff\r"),
    ],
)
def test_cgroup_path(data: bytes, path: str) -> None:
    """
    The hierarchy that sorts processes is chosen: v2, systemd's, then the controllers by rank.
    """
    assert procfs.cgroup_path(data) == path


def test_cgroup_refused() -> None:
    """
    A line that is not hierarchy:controllers:path is an error.
    """
    with pytest.raises(DecodeError, match="hierarchy"):
        procfs.cgroup_path(b"0:/a\n")


def test_counters() -> None:
    """
    The last pid and the number of births are found among the other figures.
    """
    assert procfs.last_pid(b"0.32 0.15 0.07 3/87 5674\n") == 5674
    assert procfs.born(b"cpu  1 2\nintr 5 0 0\nctxt 7\nprocesses 5676\nprocs_running 1\n") == 5676


@pytest.mark.parametrize("layout", ["=QQ", "=II"])
def test_auxv(layout: str) -> None:
    """
    The vector of a 64-bit and of a 32-bit process is recognised, with the zeros that the kernel leaves behind it.
    """
    pairs = {33: 0x7FFC1000, 16: 0xBFEBFBFF, 6: 4096, procfs.AT_EXECFN: 0x7FFD2000}
    data = b"".join(struct.pack(layout, *pair) for pair in pairs.items()) + bytes(40)

    assert procfs.auxv(data) == pairs


def test_auxv_absent() -> None:
    """
    A process without memory has an empty vector; one without an end is an error.
    """
    assert procfs.auxv(b"") == {}
    with pytest.raises(DecodeError):
        procfs.auxv(struct.pack("=QQ", 31, 4096))


@pytest.mark.parametrize(
    ("major", "minor", "name"),
    [
        (0, 0, ""),
        (136, 0, "pts/0"),
        (137, 3, "pts/259"),
        (136, 300, "pts/300"),
        (4, 1, "tty1"),
        (4, 64, "ttyS0"),
        (5, 1, "console"),
        (229, 0, "229:0"),
    ],
)
def test_tty_name(major: int, minor: int, name: str) -> None:
    """
    Terminals have the names that they have below /dev.
    """
    assert procfs.tty_name(os.makedev(major, minor) & 0xFFFFFFFF) == name


@given(st.integers(-(2**31), 2**31 - 1))
def test_tty_name_of_any_number(number: int) -> None:
    """
    Every number has a name, also where the kernel prints it negative.
    """
    assert isinstance(procfs.tty_name(number), str)
