"""
docs/schema.json says what native JSON looks like, and that is what comes out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from procwatch import events
from procwatch.formats import native

SCHEMA = Path(__file__).parent.parent / "docs/schema.json"


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    """
    The schema as it is in the documentation.
    """
    return Draft202012Validator(json.loads(SCHEMA.read_text()))


def test_file_is_current():
    """
    docs/schema.json is what the event types say: else run `make schema`.
    """
    assert json.loads(SCHEMA.read_text()) == json.loads(json.dumps(native.schema()))


def test_schema_is_one(schema: Draft202012Validator):
    """
    It is a valid JSON Schema, and knows each kind of event.
    """
    Draft202012Validator.check_schema(schema.schema)

    assert set(schema.schema["discriminator"]["mapping"]) == {kind.event for kind in events.AnyEvent.__args__}


def test_schema_refuses_other_things(schema: Draft202012Validator):
    """
    An event without its fields, of an unknown kind, or with a wrong type is not valid.
    """
    lost = {"event": "lost", "time": "t", "host": "h", "count": 1, "exact": True, "where": "w", "since": None}
    assert schema.is_valid({**lost, "until": None})

    assert not schema.is_valid(lost)
    assert not schema.is_valid({**lost, "until": None, "event": "found"})
    assert not schema.is_valid({**lost, "until": None, "count": "many"})


def test_bytes_that_are_not_text_are_valid(schema: Draft202012Validator):
    """
    An event with bytes that are not UTF-8 has `raw` besides, and the schema knows it.
    """
    lost = events.Lost(time="t", host="\udcff", count=1, exact=True, where="w", since=None, until=None)
    line = json.loads(native.encode(lost))

    assert line["raw"] == {"host": "/w=="}
    assert schema.is_valid(line)


def test_real_output_is_valid(schema: Draft202012Validator):
    """
    Each line of a real run is valid: first ready, last stop, processes that run, start, fail, and are killed.
    """
    command = [sys.executable, "-m", "procwatch", "watch", "--format", "json", "--initial", "--for", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        lines = [watcher.stdout.readline()]
        subprocess.run(["sh", "-c", "sleep 0.05; (true); exit 3"], check=False)
        subprocess.run(["sh", "-c", "sleep 0.05; kill -KILL $$", "one", "\udcff\x1b[31m"], check=False)
        for line in watcher.stdout:
            lines.append(line)
            if '"event":"exit"' in line and '"signal":9' in line:
                watcher.terminate()

    kinds = [json.loads(line)["event"] for line in lines]
    assert (kinds[0], kinds[-1]) == ("ready", "stop")
    assert {"exec", "exit", "running"} <= set(kinds)
    assert [error.message for line in lines for error in schema.iter_errors(json.loads(line))] == []
