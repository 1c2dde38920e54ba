"""
The system call that a held exec is in.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.wire import execve
from procwatch.wire.execve import Call

ARGUMENTS = "0x7ffd0010 0x7ffd0020 0x7ffd0030 0x0 0x1000 0x0 0x7ffc9180 0x7f1b80"


class TestDecode:
    @pytest.mark.parametrize(
        ("machine", "number", "call"),
        [
            ("x86_64", "59", Call(0x7FFD0010, 0x7FFD0020, None, 8)),
            ("x86_64", "322", Call(0x7FFD0020, 0x7FFD0030, 0x7FFD0010, 8)),
            ("x86_64", "11", Call(0x7FFD0010, 0x7FFD0020, None, 4)),
            ("x86_64", str(0x40000000 + 520), Call(0x7FFD0010, 0x7FFD0020, None, 4)),
            ("aarch64", "221", Call(0x7FFD0010, 0x7FFD0020, None, 8)),
            ("aarch64", "281", Call(0x7FFD0020, 0x7FFD0030, 0x7FFD0010, 8)),
            ("aarch64", "387", Call(0x7FFD0020, 0x7FFD0030, 0x7FFD0010, 4)),
        ],
    )
    def test_calls(self, machine: str, number: str, call: Call) -> None:
        """
        execve and execveat of 64-bit and 32-bit callers.
        """
        assert execve.decode(f"{number} {ARGUMENTS}\n".encode(), machine) == call

    def test_current_directory(self) -> None:
        """
        AT_FDCWD is -100, however wide the register.
        """
        for text in ("0xffffff9c", "0xffffffffffffff9c"):
            call = execve.decode(f"322 {text} 0x1 0x2 0x0 0x0 0x0 0x0 0x0\n".encode(), "x86_64")
            assert call == Call(1, 2, -100, 8)

    @pytest.mark.parametrize("text", [b"running\n", b"", b"-1 0x7ffc 0x7f\n", f"1 {ARGUMENTS}".encode()])
    def test_no_call(self, text: bytes) -> None:
        """
        A task that runs, or waits in something else.
        """
        assert execve.decode(text, "x86_64") is None

    def test_other_machine(self) -> None:
        """
        A machine whose numbers are not known has no calls.
        """
        assert execve.decode(f"59 {ARGUMENTS}".encode(), "vax") is None

    @given(st.binary(max_size=120) | st.text("0123456789xabcdef -\n", max_size=120).map(str.encode))
    def test_any_bytes(self, data: bytes) -> None:
        """
        Whatever comes, there is a call, none, or a DecodeError.
        """
        try:
            execve.decode(data, "x86_64")
        except DecodeError:
            pass
