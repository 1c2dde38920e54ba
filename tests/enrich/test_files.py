"""
The executable of a process is found as the one that runs, and described.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from procwatch.enrich.files import FileFacts, Files, find
from tests.conftest import need


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """
    A copy of cat, to be changed.
    """
    return Path(shutil.copy(shutil.which("cat") or "", tmp_path / "program"))


@pytest.fixture
def process(program: Path) -> Iterator[subprocess.Popen[bytes]]:
    """
    A process of that program.
    """
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        yield process


def test_of_a_process(process: subprocess.Popen[bytes], program: Path) -> None:
    """
    Owner and mode; a change of mode is seen; no overlay, no capabilities.
    """
    files = Files()
    program.chmod(0o750)
    facts = FileFacts(os.geteuid(), program.stat().st_gid, "0750", None, None)
    assert files.get(process.pid, str(program)) == facts
    program.chmod(0o4755)
    changed = files.get(process.pid, str(program))
    assert changed is not None
    assert (changed.mode, changed.setuid, changed.setgid) == ("4755", True, False)


def test_deleted_file(process: subprocess.Popen[bytes], program: Path) -> None:
    """
    A deleted executable is found by its device and inode.
    """
    state = program.stat()
    program.unlink()
    assert find(process.pid, str(program), state.st_dev, state.st_ino) is not None
    assert find(process.pid, str(program), None, None) is None  # the link says " (deleted)" now


def test_process_that_runs_something_else(process: subprocess.Popen[bytes], program: Path) -> None:
    """
    When the process has another executable by now, the path is believed by device and inode.
    """
    other = Path(shutil.copy(program, program.parent / "other"))
    state = other.stat()
    found = find(process.pid, str(other), state.st_dev, state.st_ino)
    assert found is not None
    assert found[0] == str(other)


def test_replaced_path(program: Path) -> None:
    """
    A path that holds another file now is not believed, and neither is a path without an inode.
    """
    gone = 2**31 - 1
    state = program.stat()
    assert find(gone, str(program), state.st_dev, state.st_ino) is not None
    assert find(gone, str(program), None, None) is None
    shutil.copy(program, program.parent / "new")
    (program.parent / "new").rename(program)
    assert find(gone, str(program), state.st_dev, state.st_ino) is None


@pytest.mark.parametrize("path", [None, "", "relative", "/\0", "/memfd:x", "/absent"])
def test_odd_paths(path: str | None) -> None:
    """
    A path that is none is not found.
    """
    assert find(2**31 - 1, path, 1, 1) is None


def test_capabilities(process: subprocess.Popen[bytes], program: Path) -> None:
    """
    File capabilities are read.
    """
    need(os.geteuid() == 0, "file capabilities are set by root")
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(program, "security.capability", value)
    facts = Files().get(process.pid, str(program))
    assert facts is not None
    assert facts.capabilities == "cap_net_raw=ep"


def test_overlay(tmp_path: Path) -> None:
    """
    On an overlay, a file of the image is told from one that was added or changed since.
    """
    need(os.geteuid() == 0, "overlays are mounted by root")
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    for name in ("image", "changed"):
        shutil.copy(shutil.which("cat") or "", tmp_path / "lower" / name)
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    try:
        shutil.copy(merged / "image", merged / "added")
        (merged / "changed").chmod(0o711)  # copies it up
        upper = {}
        for name in ("image", "changed", "added"):
            with subprocess.Popen([merged / name], stdin=subprocess.PIPE) as process:
                facts = Files().get(process.pid, str(merged / name))
            assert facts is not None
            upper[name] = facts.upper
    finally:
        subprocess.run(["umount", merged], check=True)
    assert upper == {"image": False, "changed": True, "added": True}


def test_bounded(program: Path) -> None:
    """
    No more files are remembered than the capacity.
    """
    files = Files(capacity=2)
    for number in range(5):
        program.chmod(0o700 + number)
        state = program.stat()
        facts = files.get(2**31 - 1, str(program), state.st_dev, state.st_ino)
        assert facts is not None
        assert facts.mode == f"07{number:02o}"
    assert len(files._facts) <= 2
