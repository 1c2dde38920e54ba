"""
The spool, on a real disk: whatever happens, records come in order, none twice, and what is missing is told.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from procwatch.errors import ConfigError, SinkUnavailable
from procwatch.sinks.base import Gap, Record
from procwatch.sinks.spool import MIN_BYTES, Memory, Spool

pytestmark = pytest.mark.usefixtures("no_leaks")


def tell(gap: Gap) -> Record:
    """
    The record of a loss.
    """
    return Record(json.dumps({"lost": gap.count, "since": gap.since_ns}).encode(), gap.count, gap.until_ns)


def spool(path: Path, **options: Any) -> Spool:
    """
    A spool in a directory.
    """
    return Spool(str(path), **{"max_bytes": MIN_BYTES, "fsync_s": float("inf"), "tell": tell, **options})


def records(first: int, last: int, size: int = 100) -> list[Record]:
    """
    Records with numbers.
    """
    return [Record(b"%*d" % (size, number), 1, number) for number in range(first, last + 1)]


def numbers(found: list[Record]) -> list[Any]:
    """
    Their numbers, and what is told of losses.
    """
    return [json.loads(record.data) for record in found]


def everything(box: Spool) -> list[Any]:
    """
    All that can be read.
    """
    found: list[Any] = []
    while batch := box.read(100):
        found += numbers(batch)
    return found


def test_what_is_confirmed_is_gone_and_the_rest_is_there_after_a_restart(tmp_path: Path):
    """
    In order, over many segments.
    """
    box = spool(tmp_path)
    for first in range(1, 5001, 100):
        assert box.append(records(first, first + 99)) == (100, None)
    assert numbers(box.read(3000)) == list(range(1, 3001))
    assert box.pending == 5000
    box.confirm(2000)
    assert box.pending == 3000
    box.close()
    assert len(list(tmp_path.glob("*.seg"))) < 8
    box = spool(tmp_path)
    assert box.pending == 3000
    assert everything(box) == list(range(2001, 5001))
    box.confirm(3000)
    box.append(records(5001, 5001))
    assert everything(box) == [5001]
    box.close()
    box = spool(tmp_path)
    assert everything(box) == [5001]
    box.confirm(1)
    assert box.pending == 0
    box.close()
    assert len(list(tmp_path.glob("*.seg"))) == 1


def test_files_are_for_the_agent_only(tmp_path: Path):
    """
    And its group.
    """
    box = spool(tmp_path / "new")
    box.append(records(1, 1))
    box.close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 & ~0o640 for path in (tmp_path / "new").iterdir()} == {0}


def test_the_oldest_are_dropped_and_told_in_their_place(tmp_path: Path):
    """
    One `lost` event for all, also after a restart; what is being read stays.
    """
    box = spool(tmp_path)
    box.append(records(1, 10))
    assert numbers(box.read(5)) == [1, 2, 3, 4, 5]
    for first in range(11, 20_000, 100):
        box.append(records(first, first + 99))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIN_BYTES + 100
    assert len(list(tmp_path.glob("*.lost"))) == 1
    dropped = box.dropped
    assert box.pending == 20_010 - dropped + 1
    box.close()

    box = spool(tmp_path)
    assert box.pending == 20_010 - dropped + 1
    found = everything(box)
    (at,) = [at for at, one in enumerate(found) if isinstance(one, dict)]
    assert found[at]["lost"] == dropped > 10_000
    assert found[at]["since"] == found[at - 1] + 1
    assert found[:at] == list(range(1, at + 1))
    assert found[at + 1 :] == list(range(at + dropped + 1, 20_011))
    box.confirm(len(found))
    assert box.pending == 0
    box.close()
    assert list(tmp_path.glob("*.lost")) == []


def test_a_loss_in_the_middle_of_reading_is_told_once(tmp_path: Path):
    """
    What was told already is not told again.
    """
    box = spool(tmp_path)
    found: list[Any] = []
    for first in range(1, 50_000, 100):
        box.append(records(first, first + 99))
        if first % 10_000 == 1:
            batch = box.read(3000)
            found += numbers(batch)
            box.confirm(len(batch))
    found += everything(box)
    box.close()
    lost = [one["lost"] for one in found if isinstance(one, dict)]
    seen = [one for one in found if not isinstance(one, dict)]
    assert len(lost) > 1
    assert seen == sorted(set(seen))
    assert sum(lost) == 50_000 - len(seen) == box.dropped


def test_a_lost_event_that_is_dropped_counts_for_what_it_told(tmp_path: Path):
    """
    Nothing is forgotten.
    """
    box = spool(tmp_path)
    box.append([Record(b"{}", 1000, 1), *records(1, 20_000)])
    box.read(1)
    box.append([Record(b"{}", 77, 1)])
    for first in range(20_001, 40_000, 100):
        box.append(records(first, first + 99))
    found = everything(box)
    box.close()
    seen = [one for one in found if not isinstance(one, dict)]
    assert sum(one["lost"] for one in found if isinstance(one, dict) and one) == 40_000 - len(seen) + 77


def test_records_that_are_larger_than_a_reading(tmp_path: Path):
    """
    Any size up to what an event can be.
    """
    box = spool(tmp_path, max_bytes=64 << 20)
    large = [
        Record(bytes([65 + at]) * size, 1, at) for at, size in enumerate([1, 300_000, 262_124, 262_144, 1 << 20, 3])
    ]
    box.append(large)
    assert box.read(10) == large
    box.close()


def test_two_agents_with_one_spool_cannot_be(tmp_path: Path):
    """
    The second is told.
    """
    box = spool(tmp_path)
    with pytest.raises(SinkUnavailable, match="another procwatch"):
        spool(tmp_path)
    box.close()
    with pytest.raises(ConfigError, match="spool_bytes"):
        spool(tmp_path, max_bytes=1)
    with pytest.raises(SinkUnavailable, match="File exists"):
        spool(tmp_path / "cursor")


@given(st.integers(0, 4000), st.binary(max_size=40))
@settings(max_examples=60)
def test_any_damage_to_the_end_costs_the_end_only(tmp_path_factory: pytest.TempPathFactory, cut: int, odd: bytes):
    """
    A loss of power may cut the last segment anywhere, or leave anything there.
    """
    path = tmp_path_factory.mktemp("spool")
    box = spool(path)
    box.append(records(1, 30))
    box.close()
    (segment,) = path.glob("*.seg")
    os.truncate(segment, min(cut, segment.stat().st_size))
    with segment.open("ab") as file:
        file.write(odd)
    box = spool(path)
    kept = everything(box)
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) == min(cut, 30 * 120) // 120
    box.append(records(31, 40))
    assert everything(box) == list(range(31, 41))
    box.close()
    shutil.rmtree(path)


def test_damage_in_the_middle_is_told(tmp_path: Path):
    """
    The rest of that segment cannot be read; the next ones can.
    """
    box = spool(tmp_path)
    for first in range(1, 1200, 100):
        box.append(records(first, first + 99))
    box.close()
    damaged, second = sorted(tmp_path.glob("*.seg"))[:2]
    with damaged.open("r+b") as file:
        file.seek(120 * 100 + 50)
        file.write(b"?")
    box = spool(tmp_path)
    found = everything(box)
    box.close()
    start = int(second.stem, 16)
    assert found[:100] == list(range(1, 101))
    assert found[100]["lost"] == start - 100
    assert found[101:] == list(range(start + 1, 1201))


def test_a_cursor_beyond_the_end_does_not_hide_what_comes(tmp_path: Path):
    """
    A loss of power took the records and left the cursor.
    """
    box = spool(tmp_path)
    box.append(records(1, 50))
    box.read(50)
    box.confirm(50)
    box.close()
    for segment in tmp_path.glob("*.seg"):
        segment.unlink()
    box = spool(tmp_path)
    box.append(records(51, 52))
    box.close()
    box = spool(tmp_path)
    assert everything(box) == [51, 52]
    box.close()


def test_a_replacement_that_was_interrupted_is_finished(tmp_path: Path):
    """
    Killed between writing what tells of the loss and removing what it replaces.
    """
    box = spool(tmp_path)
    for first in range(1, 8001, 100):
        box.append(records(first, first + 99))
    box.close()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.seg")}
    box = spool(tmp_path)
    for first in range(8001, 9501, 100):
        box.append(records(first, first + 99))
    box.close()
    gone = [path for path in before if not path.exists()]
    assert gone
    for path in gone:
        path.write_bytes(before[path])
    box = spool(tmp_path)
    found = everything(box)
    box.close()
    seen = [one for one in found if not isinstance(one, dict)]
    assert seen == sorted(set(seen))
    assert sum(one["lost"] for one in found if isinstance(one, dict)) == 9500 - len(seen)


def test_syncing_is_due_when_it_is(tmp_path: Path):
    """
    At once, within the time, or never.
    """
    for fsync_s, due in ((0, None), (float("inf"), None)):
        box = spool(tmp_path / str(fsync_s), fsync_s=fsync_s)
        box.append(records(1, 1))
        assert box.sync_in_s() is due
        box.close()
    box = spool(tmp_path / "x", fsync_s=100)
    assert box.sync_in_s() is None
    box.append(records(1, 1))
    wait = box.sync_in_s()
    assert wait is not None
    assert 0 < wait <= 100
    box.sync()
    assert box.sync_in_s() is None
    box.close()


class Model(RuleBasedStateMachine):
    """
    Any order of appending, reading, confirming, closing and being killed, for both kinds of outbox.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(os.environ.get("TMPDIR", "/tmp")) / f"procwatch-spool-{os.getpid()}-{id(self)}"
        self.box = spool(self.path)
        self.memory = Memory(1 << 30)
        self.appended = self.read = self.confirmed = 0

    @rule(count=st.integers(1, 700))
    def append(self, count: int) -> None:
        """
        More.
        """
        batch = records(self.appended + 1, self.appended + count)
        for box in (self.box, self.memory):
            assert box.append(batch) == (count, None)
        self.appended += count

    @rule(limit=st.integers(1, 900))
    def take(self, limit: int) -> None:
        """
        The next ones.
        """
        end = min(self.read + limit, self.appended)
        for box in (self.box, self.memory):
            assert numbers(box.read(limit)) == list(range(self.read + 1, end + 1))
        self.read = end

    @rule(part=st.floats(0, 1))
    def confirm(self, part: float) -> None:
        """
        Some of those that were read.
        """
        count = int((self.read - self.confirmed) * part)
        for box in (self.box, self.memory):
            box.confirm(count)
        self.confirmed += count
        assert self.box.pending == self.memory.pending == self.appended - self.confirmed

    @rule()
    def restart(self) -> None:
        """
        As after a kill: nothing is written at the end.
        """
        self.box.close()
        self.box = spool(self.path)
        self.memory = Memory(1 << 30)
        self.memory.append(records(self.confirmed + 1, self.appended))
        self.read = self.confirmed

    def teardown(self) -> None:
        """
        Leave nothing.
        """
        self.box.close()
        shutil.rmtree(self.path)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
