"""
Files that ran are hashed in a thread, once, and never another file in their place.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from procwatch.enrich.hashes import Hash, Hasher


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """
    A program of the test's own.
    """
    return Path(shutil.copy(shutil.which("cat") or "", tmp_path / "program"))


class Ready:
    """
    A hasher, and its news.
    """

    def __init__(self, **options: int) -> None:
        self.event = threading.Event()
        self.hasher = Hasher(on_ready=self.event.set, **options)

    def done(self, pending: Hash) -> str | None:
        """
        The hash when it is done.
        """
        while not pending.done:
            assert self.event.wait(30)
            self.event.clear()
        return pending.hex


@pytest.fixture
def ready() -> Iterator[Ready]:
    """
    A hasher that ends with the test.
    """
    ready = Ready()
    yield ready
    ready.hasher.close()


def test_of_a_process(program: Path, ready: Ready, no_leaks: None) -> None:
    """
    The file that a process runs is hashed, also when it is deleted, and then known for the next one.
    """
    expected = hashlib.sha256(program.read_bytes()).hexdigest()
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        state = program.stat()
        program.unlink()
        first = ready.hasher.of(process.pid, str(program), state.st_dev, state.st_ino)
        assert ready.done(first) == expected
        # By then unlinking it has changed its time once; not again.
        assert ready.hasher.of(process.pid, str(program), state.st_dev, state.st_ino) is first


def test_by_path_when_the_process_is_gone(program: Path, ready: Ready) -> None:
    """
    A process that is gone is hashed by path when that is still the file; another file there is not.
    """
    gone, state = 2**31 - 1, program.stat()
    expected = hashlib.sha256(program.read_bytes()).hexdigest()
    assert ready.done(ready.hasher.of(gone, str(program), state.st_dev, state.st_ino)) == expected
    (program.parent / "new").write_text("x")
    (program.parent / "new").rename(program)
    assert ready.done(ready.hasher.of(gone, str(program), state.st_dev, state.st_ino)) is None


def test_changed_file_is_another(program: Path, ready: Ready) -> None:
    """
    A file that was written to is hashed again.
    """
    gone, state = 2**31 - 1, program.stat()
    first = ready.done(ready.hasher.of(gone, str(program), state.st_dev, state.st_ino))
    with program.open("ab") as file:
        file.write(b"more")
    second = ready.done(ready.hasher.of(gone, str(program), state.st_dev, state.st_ino))
    assert first != second == hashlib.sha256(program.read_bytes()).hexdigest()


def test_size_limit(program: Path) -> None:
    """
    A file beyond the limit has no hash, and no thread is started for it.
    """
    state = program.stat()
    hasher = Hasher(max_bytes=state.st_size - 1)
    answer = hasher.of(2**31 - 1, str(program), state.st_dev, state.st_ino)
    assert (answer.done, answer.hex) == (True, None)
    hasher.close()


def test_close_leaves_nothing(program: Path, tmp_path: Path, no_leaks: None) -> None:
    """
    What waits when the hasher is closed is let go.
    """
    hasher = Hasher()
    for number in range(200):
        state = Path(shutil.copy(program, tmp_path / str(number))).stat()
        hasher.of(2**31 - 1, str(tmp_path / str(number)), state.st_dev, state.st_ino)
    hasher.close()
