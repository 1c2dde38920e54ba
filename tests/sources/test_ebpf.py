"""
What the eBPF source says where it cannot work, and how its blob is read: without the kernel's help.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import ConfigError, SourceUnavailable
from procwatch.sources import ebpf
from procwatch.sources.ebpf import Ebpf, build, loader


def blob() -> bytes:
    """
    The one that is shipped.
    """
    return resources.files(ebpf).joinpath("procwatch.bpf.bin").read_bytes()


class TestBlob:
    def test_shipped(self):
        """
        The shipped blob has the maps and programs that the source asks for.
        """
        parsed = loader.parse_blob(blob())

        assert {"ring", "counters", "rodata"} <= set(parsed.maps)
        assert {"on_exec", "on_fork", "on_exit", "on_exec_failed"} <= set(parsed.programs)
        assert len(parsed.instructions) % 8 == 0

    def test_names_no_machine(self):
        """
        No path of the machine that built it is in it.
        """
        assert not any(path in blob() for path in (b"/home/", b"/root/", b"/work", b"/tmp/", b"/usr/include"))

    def test_round_trip(self):
        """
        What the build packs, the loader reads.
        """
        skeleton = rb"""
            struct bpf_map_desc ring; struct bpf_map_desc rodata; struct bpf_prog_desc on_exec;
            opts.data_sz = 5;
            opts.data = (void *)"\
            a\0\x01\
            \"z";
            opts.insns_sz = 2;
            opts.insns = (void *)"\xff\\";
        """.replace(b"\n            ", b"\n")
        parsed = loader.parse_blob(build.pack(skeleton))

        assert parsed == loader.Blob(["ring", "rodata"], ["on_exec"], b"\xff\\", b'a\0\x01"z')

    @given(st.binary())
    def test_c_string(self, data: bytes):
        """
        Bytes written as bpftool writes them come back.
        """
        plain = set(range(32, 127)) - {ord('"'), ord("\\")}
        literal = b"".join(bytes([byte]) if byte in plain else b"\\x%02x" % byte for byte in data)

        assert build.c_string(literal) == data


class TestProbe:
    @pytest.mark.parametrize(
        ("release", "reason"),
        [
            ("5.10.0-28-amd64", "older than 5.17"),
            ("5.15.0-101-generic", "older than 5.17"),
            ("4.19.0", "older than 5.17"),
        ],
    )
    def test_old_kernel(self, monkeypatch: pytest.MonkeyPatch, release: str, reason: str):
        """
        A kernel that is too old is told, and nothing is tried.
        """
        name = os.uname()
        old = os.uname_result((name.sysname, name.nodename, release, name.version, name.machine))
        monkeypatch.setattr(os, "uname", lambda: old)
        with pytest.raises(SourceUnavailable, match=reason) as caught:
            Ebpf().open()
        assert caught.value.remedy == "a newer kernel"

    def test_no_types(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """
        A kernel without BTF is told.
        """
        monkeypatch.setattr(ebpf, "_BTF", str(tmp_path))
        assert "CONFIG_DEBUG_INFO_BTF" in str(Ebpf().probe())

    def test_lockdown(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """
        Lockdown in its strict form is told.
        """
        (tmp_path / "lockdown").write_text("none integrity [confidentiality]\n")
        monkeypatch.setattr(ebpf, "_LOCKDOWN", str(tmp_path / "lockdown"))
        monkeypatch.setattr(ebpf, "_BTF", _somewhere(tmp_path))
        assert "lockdown" in str(Ebpf().probe())

    @pytest.mark.parametrize(
        ("number", "reason"),
        [(38, "bpf(2) is not there"), (1, "bpf(2) is not permitted here"), (12, "no memory"), (22, "refused")],
    )
    def test_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, reason: str):
        """
        What the system call answers becomes a reason for the user: ENOSYS, EPERM, ENOMEM, EINVAL.
        """

        def fail(value_bytes: int) -> int:
            raise loader.LoadError(number, "create a map")

        monkeypatch.setattr(loader, "create_array", fail)
        monkeypatch.setattr(ebpf, "_BTF", _somewhere(tmp_path))
        monkeypatch.setattr(ebpf, "_lacking_capabilities", list)
        assert reason in str(Ebpf().probe())

    def test_failed_execs_elsewhere(self, monkeypatch: pytest.MonkeyPatch):
        """
        Failed execs need the layout of the registers, and are refused where we do not have it.
        """
        monkeypatch.setattr(ebpf, "_REGISTERS", {})
        with pytest.raises(SourceUnavailable, match="failed execs"):
            Ebpf(exec_failed=True)._settings()
        assert len(Ebpf()._settings()) == 36


def _somewhere(directory: Path) -> str:
    (directory / "vmlinux").touch()
    return str(directory)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ebpf(buffer_bytes=4095),
        lambda: Ebpf(buffer_bytes=(1 << 30) + 1),
        lambda: Ebpf(argv_limit=-1),
        lambda: Ebpf(argv_limit=1 << 30),
    ],
)
def test_impossible_sizes(make: Callable[[], Ebpf]):
    """
    Sizes that cannot be are refused at once, and the message says what can.
    """
    with pytest.raises(ConfigError, match="choose"):
        make()


def test_context_layout():
    """
    The settings are as long as the C structure that they fill.
    """
    assert ebpf._SETTINGS.size == 9 * struct.calcsize("I")
