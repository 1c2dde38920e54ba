"""
What tests of all parts share.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CI = os.environ.get("CI") == "true"

# exit(0) without a libc: the shortest life that a process can have, 60-190 µs, and static, so that no ld.so runs.
_TINY = {
    "x86_64": "mov $60, %eax; xor %edi, %edi; syscall",
    "aarch64": "mov x8, #93; mov x0, #0; svc #0",
}


def need(feature: object, reason: str) -> None:
    """
    Go on only with a feature of this machine: where it is missing, CI fails and everybody else skips.
    """
    if not feature:
        if CI:
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """
    The test leaves no descriptor open.
    """
    before = _descriptors()
    yield
    left = {fd: what for fd, what in _descriptors().items() if before.get(fd) != what}
    assert left == {}


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A static program that ends at once, with code 0.
    """
    code = _TINY.get(os.uname().machine)
    need(code, f"no tiny program for {os.uname().machine}")
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    path.parent.chmod(0o755)  # other users run it, too
    command = ["gcc", "-static", "-nostdlib", "-o", str(path), "-x", "assembler", "-"]
    try:
        subprocess.run(command, input=f".globl _start\n_start: {code}\n", text=True, check=True)
    except FileNotFoundError:
        need(False, "needs gcc")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """
    A file system of 64 KiB.
    """
    need(os.geteuid() == 0, "needs root")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    need(done.returncode == 0, f"cannot mount: {done.stderr}")
    yield path
    subprocess.run(["umount", str(path)], check=True)
