"""
Other tools that tell of execs, to be measured beside us where they are installed.
"""

from __future__ import annotations

import shutil

from msgspec import Struct

_BPFTRACE = 'tracepoint:sched:sched_process_exec { printf("%d %s\\n", pid, str(args->filename)); }'
_COMMANDS = {
    "execsnoop": ["execsnoop"],
    "execsnoop-bpfcc": ["execsnoop-bpfcc"],
    "forkstat": ["forkstat", "-l", "-e", "exec"],
    "bpftrace": ["bpftrace", "-e", _BPFTRACE],
}


class Peer(Struct, frozen=True):
    """
    A tool, and how it is started.
    """

    name: str
    command: list[str]


class Row(Struct, frozen=True):
    """
    What it did beside the same storms. Shares are of all execs of the storm.
    """

    name: str
    exe: float  # had a line with the path, as it was given to exec
    lost: int  # execs without a line
    cpu_ms_per_1k: float
    slowdown: float
    max_rss_bytes: int


def installed() -> list[Peer]:
    """
    Those that are there.
    """
    return [Peer(name, command) for name, command in _COMMANDS.items() if shutil.which(command[0])]
