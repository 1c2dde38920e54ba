"""
journald's native protocol, against a socket that takes it apart; and the journal itself where one runs.
"""

from __future__ import annotations

import array
import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import json

from procwatch.errors import SinkUnavailable
from procwatch.formats import FORMATS
from procwatch.sinks.journald import DEFAULT_PATH, JournaldSink
from tests.formats.samples import DRAFTS, MAKER, OTHERS
from tests.sinks.kit import draft, drafts, idle, make, opened

pytestmark = pytest.mark.usefixtures("no_leaks")

LOGFMT = FORMATS["logfmt"](MAKER)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """
    The socket, without a journal behind it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "journal"))
        server.settimeout(10)
        yield server


def entry(server: socket.socket) -> list[tuple[str, bytes]]:
    """
    The fields of the next entry, as journald reads them.
    """
    data, passed, _, _ = server.recvmsg(1 << 20, 256)
    for _, _, fds in passed:
        (fd,) = array.array("i", fds)
        assert data == b""
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            data = file.read()
    found = []
    while data:
        head, _, data = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[9 + length :]
        assert len(name) <= 64
        assert name.replace(b"_", b"").isalnum()
        assert name.upper() == name
        found.append((name.decode(), value))
    return found


async def test_every_field_is_a_field_of_the_entry(journal: socket.socket):
    """
    With its exact bytes: newlines, and what is not UTF-8, cannot forge another one.
    """
    sink = JournaldSink.of(maker=MAKER, encode=LOGFMT, path=journal.getsockname())
    await sink.open()
    try:
        sink.put([*DRAFTS, *OTHERS])
        entries = [await asyncio.to_thread(entry, journal) for _ in [*DRAFTS, *OTHERS]]
    finally:
        await sink.close()
    first = dict(entries[0])
    assert first["PROCWATCH_EVENT"] == b"exec"
    assert first["PROCWATCH_PARENT_EXE"] == b"/usr/lib/systemd/systemd"
    assert first["PROCWATCH_CONTAINER_POD_NAME"] == b"web-0"
    assert first["PROCWATCH_EXE_DELETED"] == b"false"
    assert (first["SYSLOG_IDENTIFIER"], first["PRIORITY"]) == (b"procwatch", b"6")
    assert first["MESSAGE"].startswith(b"event=exec ")
    assert [value for name, value in entries[0] if name == "PROCWATCH_ARGV"] == [b"nginx", b"-g", b"daemon off;"]
    odd = entries[3]
    assert [value for name, value in odd if name == "PROCWATCH_ARGV"] == [b"odd\n", b"\xff"]
    assert dict(odd)["PROCWATCH_EXE"] == b'/tmp/\xff "x"'
    assert [dict(one)["PRIORITY"] for one in entries].count(b"4") == 1


async def test_an_entry_that_no_datagram_takes_goes_in_memory(journal: socket.socket):
    """
    As a sealed file whose descriptor is passed.
    """
    async with opened(JournaldSink, path=journal.getsockname()) as sink:
        sink.put([draft(1, argv=["x" * 120_000] * 4)])
        await idle(sink)
        assert sink.stats().written == 1
    found = entry(journal)
    assert [value for name, value in found if name == "PROCWATCH_ARGV"] == [b"x" * 120_000] * 4
    assert json.decode(dict(found)["MESSAGE"])["pid"] == 1


async def test_while_journald_is_away_entries_are_dropped_and_told(tmp_path: Path):
    """
    And it goes on when it is back.
    """
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(path)
        sink = make(JournaldSink, path=path)
        await sink.open()
    os.unlink(path)
    sink.put(drafts(1, 5))
    await idle(sink)
    assert (sink.stats().dropped, sink.stats().failures > 0) == (5, True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(path)
        sink.put(drafts(6, 6))
        await sink.close()
        assert dict(entry(second))["PROCWATCH_COUNT"] == b"5"
        assert dict(entry(second))["PROCWATCH_PID"] == b"6"


async def test_without_journald_it_cannot_begin(tmp_path: Path):
    """
    Told in one line.
    """
    with pytest.raises(SinkUnavailable, match="no journald listens"):
        await make(JournaldSink, path=str(tmp_path / "no")).open()


async def test_a_real_journal_has_the_fields():
    """
    Where one runs.
    """
    if not os.path.exists(DEFAULT_PATH) or shutil.which("journalctl") is None:
        pytest.skip("no journald runs here")
    async with opened(JournaldSink) as sink:
        sink.put([draft(4_194_999)])
        await idle(sink)
    command = ["journalctl", "--sync"]
    subprocess.run(command, check=True)
    command = ["journalctl", "-o", "json", "-n", "1", "PROCWATCH_PID=4194999"]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    assert json.decode(said)["PROCWATCH_EXE"] == "/bin/true"
