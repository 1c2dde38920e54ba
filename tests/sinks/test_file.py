"""
The file sink, on real disks: rotation, moved files, a full disk, a kill.
"""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.sinks.file import FileSink
from tests.sinks.kit import draft, drafts, idle, make, objects, opened, pids, stop, until

pytestmark = pytest.mark.usefixtures("no_leaks")


def rotated(path: Path) -> list[Path]:
    """
    The rotated files, oldest first.
    """
    return sorted(path.parent.glob(path.name + ".*"))


def unpacked(path: Path) -> bytes:
    """
    The contents of a rotated file.
    """
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        data: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        return data
    return path.read_bytes()


async def test_lines_are_appended_with_the_mode(tmp_path: Path):
    """
    Readable for the group, whatever the umask is; what was there stays.
    """
    path = tmp_path / "events.jsonl"
    before = os.umask(0o077)
    try:
        for first in (1, 101):
            async with opened(FileSink, path=str(path)) as sink:
                sink.put(drafts(first, first + 99))
    finally:
        os.umask(before)
    assert pids(path) == list(range(1, 201))
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("compress", ["gzip", "zstd", "none"])
async def test_rotation_by_size_keeps_whole_lines_and_the_count(tmp_path: Path, compress: str):
    """
    No file is larger than allowed, none is in the middle of a line, the oldest are removed, nothing else is.
    """
    path = tmp_path / "events.jsonl"
    other = tmp_path / "events.jsonl.keep"
    other.touch()
    async with opened(FileSink, path=str(path), rotate_bytes=8192, count=3, compress=compress) as sink:
        for first in range(1, 400, 20):
            sink.put(drafts(first, first + 19))
            await idle(sink)
    assert other.exists()
    other.unlink()
    files = rotated(path)
    assert len(files) == 3
    found = []
    for one in files:
        assert one.stat().st_mode & 0o777 == 0o640
        data = unpacked(one)
        assert 0 < len(data) <= 8192
        assert data.endswith(b"\n")
        plain = one.with_name("plain")
        plain.write_bytes(data)
        found += pids(plain)
        plain.unlink()
    found += pids(path)
    assert found == list(range(found[0], 401))


async def test_rotation_by_time_is_at_multiples_of_the_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    A file that an earlier agent left from another period is rotated before the first line is written.
    """
    path = tmp_path / "events.jsonl"
    async with opened(FileSink, path=str(path), rotate_s=3600, compress="none") as sink:
        sink.put(drafts(1, 2))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    async with opened(FileSink, path=str(path), rotate_s=3600, compress="none") as sink:
        sink.put(drafts(3, 4))
    (old,) = rotated(path)
    assert (pids(old), pids(path)) == ([1, 2], [3, 4])


async def test_a_file_that_was_moved_is_made_anew(tmp_path: Path):
    """
    As logrotate does it, with or without SIGHUP; a removed one, too.
    """
    path = tmp_path / "events.jsonl"
    async with opened(FileSink, path=str(path)) as sink:
        sink.put(drafts(1, 1))
        await idle(sink)
        path.rename(tmp_path / "moved")
        sink.put(drafts(2, 2))
        await idle(sink)
        assert pids(path) == [2]
        path.unlink()
        sink.reopen()
        await until(path.exists)
        sink.put(drafts(3, 3))
    assert pids(tmp_path / "moved") == [1]
    assert pids(path) == [3]


async def test_a_file_that_was_cut_goes_on_at_its_end(tmp_path: Path):
    """
    Logrotate's copytruncate.
    """
    path = tmp_path / "events.jsonl"
    async with opened(FileSink, path=str(path), rotate_bytes=1 << 20) as sink:
        sink.put(drafts(1, 9))
        await idle(sink)
        os.truncate(path, 0)
        sink.put(drafts(10, 11))
    assert pids(path) == [10, 11]


async def test_half_a_line_from_before_is_taken_back(tmp_path: Path):
    """
    An agent that was killed while it wrote, or a host that lost its power.
    """
    path = tmp_path / "events.jsonl"
    async with opened(FileSink, path=str(path)) as sink:
        sink.put(drafts(1, 3))
    with path.open("ab") as file:
        file.write(b'{"event":"exec","comm":"' + b"x" * 200_000)
    async with opened(FileSink, path=str(path)) as sink:
        sink.put(drafts(4, 4))
    assert pids(path) == [1, 2, 3, 4]


async def test_two_writers_of_one_file_cannot_be(tmp_path: Path):
    """
    The second one is told.
    """
    path = tmp_path / "events.jsonl"
    async with opened(FileSink, path=str(path)):
        with pytest.raises(SinkUnavailable, match="another procwatch"):
            await make(FileSink, path=str(path)).open()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rotate_bytes": 100}, "rotate_bytes"),
        ({"rotate_bytes": "x"}, "not a size"),
        ({"rotate_s": -1}, "rotate_s"),
        ({"count": -1}, "count"),
        ({"mode": 0o2000}, "mode"),
        ({"compress": "rar"}, "compress"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], error: str):
    """
    With the value.
    """
    with pytest.raises(ConfigError, match=error):
        make(FileSink, path="/tmp/x", **options)


async def test_places_that_cannot_be_written_are_told(tmp_path: Path):
    """
    In one line, when opening.
    """
    with pytest.raises(SinkUnavailable, match="No such file or directory"):
        await make(FileSink, path=str(tmp_path / "no" / "such")).open()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match="not a regular file"):
        await make(FileSink, path=str(fifo)).open()


async def test_a_full_disk_and_back(small_disk: Path):
    """
    Alive, the loss counted to the event, and whole lines before, while and after.
    """
    path = small_disk / "events.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 32_768)
    async with opened(FileSink, path=str(path), rotate_bytes=0) as sink:
        for first in range(1, 200, 10):  # 200 lines of 400 bytes do not fit beside the ballast
            sink.put(drafts(first, first + 9))
            await idle(sink)
        full = sink.stats()
        assert full.failures > 0
        assert full.error == "No space left on device"
        kept = pids(path)
        assert kept[:50] == list(range(1, 51))
        ballast.unlink()
        sink.put(drafts(201, 210))
        await idle(sink)
        sink.put([stop()])
    found = objects(path)
    lost = [one["count"] for one in found if one["event"] == "lost"]
    execs = pids(path)
    assert execs[-10:] == list(range(201, 211))
    assert sum(lost) == 210 - len(execs) == sink.stats().dropped
    assert execs == sorted(set(execs))
    assert found[-1]["event"] == "stop"


STORM = """
import asyncio, sys
from procwatch.sinks.file import FileSink
from tests.sinks.kit import drafts, make

async def main():
    sink = make(FileSink, path=sys.argv[1])
    await sink.open()
    first = 1
    while True:
        sink.put(drafts(first, first + 99))
        first += 100
        await asyncio.sleep(0)

asyncio.run(main())
"""


async def test_what_was_written_before_a_kill_is_there_in_whole_lines(tmp_path: Path):
    """
    And the next agent goes on behind it.
    """
    path = tmp_path / "events.jsonl"
    storm = subprocess.Popen([sys.executable, "-c", STORM, str(path)], cwd=Path(__file__).parents[2])
    try:
        await until(lambda: path.exists() and path.stat().st_size > 2_000_000)
    finally:
        storm.send_signal(signal.SIGKILL)
        storm.wait()
    async with opened(FileSink, path=str(path)) as sink:
        sink.put([draft(1 << 22)])
    found = pids(path)
    assert found[:-1] == list(range(1, len(found)))
    assert found[-1] == 1 << 22
