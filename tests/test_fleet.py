"""
The fleet of examples/fleet, for real: a server, two agents, and the question to the stream.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.conftest import need
from tests.sinks.servers import program

FLEET = Path(__file__).parent.parent / "examples" / "fleet"


async def test_who_ran_it_on_which_hosts_since_when():
    """
    One script starts all and answers: both hosts, how often on each, and by whom.
    """
    need(os.geteuid() == 0, "needs root")
    program("nats-server", "nats-server")
    pytest.importorskip("duckdb")
    pytest.importorskip("nats")
    command = (sys.executable, "-W", "error", str(FLEET / "fleet.py"), "uptime")
    fleet = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    said, complaints = await fleet.communicate()

    assert (fleet.returncode, complaints.decode()) == (0, "")
    question, *answers = said.decode().splitlines()
    assert question.startswith("who ran /")
    times = {match[1]: int(match[2]) for line in answers if (match := re.match(r"(\S+): root (\d+) times since", line))}
    assert times["db-1"] >= 3
    assert times["web-1"] >= times["db-1"] + 1
    assert all("python" in line.rpartition(" by ")[2] for line in answers)
