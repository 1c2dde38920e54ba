"""
Users have names: at once from the file, later from the name service.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich.users import Users, inside, parse_id_map, parse_passwd
from procwatch.enrich.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    """
    A worker that ends with the test.
    """
    worker = Worker("test")
    yield worker
    worker.close()


def test_file_answers_at_once(tmp_path: Path, worker: Worker) -> None:
    """
    A user of the file has its name at the first question.
    """
    (tmp_path / "passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:1000:1000::/:/bin/sh\nbob:x:1000:1:::\n")
    users = Users(worker, str(tmp_path / "passwd"))
    assert (users.name(0), users.name(1000)) == ("root", "ann")


def test_new_user_is_seen(tmp_path: Path, worker: Worker) -> None:
    """
    A user who is added later has a name a second later.
    """
    passwd = tmp_path / "passwd"
    passwd.write_text("ann:x:4000000001:1:::\n")
    now = [0.0]
    users = Users(worker, str(passwd), clock=lambda: now[0])
    assert users.name(4000000002) is None
    passwd.write_text("ann:x:4000000001:1:::\nbob:x:4000000002:1:::\n")
    assert users.name(4000000002) is None
    now[0] = 1.0
    assert users.name(4000000002) == "bob"


def test_name_service_is_asked_in_the_worker(tmp_path: Path, worker: Worker) -> None:
    """
    Who is not in the file is looked for by the name service, and has the name from then on.
    """
    users = Users(worker, str(tmp_path / "absent"))
    assert users.name(0) is None
    done = threading.Event()
    worker.submit(done.set)
    assert done.wait(10)
    assert users.name(0) == "root"


@given(st.binary())
def test_any_file(content: bytes) -> None:
    """
    Any bytes are some users or none.
    """
    for uid, name in parse_passwd(content).items():
        assert uid >= 0
        assert name


@given(st.binary())
def test_any_id_map(content: bytes) -> None:
    """
    Any bytes are some rows or none.
    """
    parse_id_map(content)


def test_inside_a_namespace() -> None:
    """
    A host's uid has its number inside where a row covers it, and none elsewhere.
    """
    rows = parse_id_map(b"         0       1000          1\n         1     100000      65536\n")
    assert [inside(uid, rows) for uid in (1000, 100_000, 165_535, 165_536, 0)] == [0, 1, 65_536, None, None]
    assert inside(7, parse_id_map(b"0 0 4294967295\n")) == 7
