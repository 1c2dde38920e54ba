"""
Lines for people: aligned, honest, and nothing of what a process wrote reaches the terminal as it is.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given

from procwatch import events
from procwatch.clock import Clock
from procwatch.events import Event, Parent
from procwatch.facts import EXITED, KERNEL_THREAD, Details
from procwatch.formats.console import Console, command, lived
from procwatch.table.draft import End, Maker, Who
from tests.formats.any import any_event, draft
from tests.formats.test_text import harmless

COLOUR = re.compile("\x1b\\[[0-9;]*m")
TIME = "2026-01-02T03:04:05.678900000Z"


def event(kind: Any = events.Exec, tail: Any = None, **fields: Any) -> Any:
    """
    An event of which only some fields matter.
    """
    missing = fields.pop("missing", {})
    who = Who(
        "0123abcd-7-9", 7, 1, fields.pop("argv", None), fields.pop("argv_truncated", False), fields.pop("parent", None)
    )
    return Maker("host", Clock(offset_ns=0)).event(draft((kind, tail), 5, who, Details(**fields), missing=missing))


def ended(code: int | None, signal: int | None = None, core: bool = False, ns: int | None = 1_500_000) -> Any:
    return event(events.Exit, End(code, signal, core, ns, None, None, None), exe="/bin/x", argv=["x"])


def line(shown: Event, **options: Any) -> str:
    return Console(**options).encode(shown).decode()


@given(any_event)
def test_nothing_that_a_process_wrote_controls_the_terminal(shown: Event):
    """
    Neither without colours nor with them, where only ours are there; and an event stays one line.
    """
    plain, coloured = line(shown), line(shown, colour=True)
    assert harmless(plain.removesuffix("\n"))
    assert harmless(COLOUR.sub("", coloured).removesuffix("\n"))
    assert COLOUR.sub("", coloured) == plain


def test_colour_cannot_be_smuggled_in():
    """
    An escape sequence in an argument is shown, not obeyed.
    """
    shown = line(event(exe="/bin/x", argv=["x", "\x1b[31mred\x1b]0;title\x07"]))
    assert "\x1b" not in shown
    assert r"$'\e[31mred\e]0;title\a'" in shown


def test_columns_are_aligned():
    """
    The command begins at the same column, whatever stands before it.
    """
    parent = Parent("0123abcd-1-1", 1, "/usr/lib/a-very-long-name-of-a-daemon", "a-very-long-nam")
    shown = [
        line(ended(0)),
        line(ended(None, 11, True)),
        line(event(exe="/bin/x", argv=["x"], parent=parent, uid=1_000_000)),
    ]
    assert len({text.index("  /bin/x") for text in shown}) == 1


def test_a_failed_exit_stands_out():
    """
    By its colour, and by code or signal.
    """
    good, bad, killed = (line(e, colour=True) for e in (ended(0), ended(3), ended(None, 9)))
    assert "\x1b[1;31m" in bad
    assert "\x1b[1;31m" in killed
    assert "\x1b[1;31m" not in good
    assert " 3 " in bad
    assert "SIGKILL" in killed
    assert "SIGSEGV+core" in line(ended(None, 11, True))


def test_an_unknown_end_is_no_success():
    """
    Where the code is not known there is a question mark.
    """
    assert " ? " in line(ended(None, None, ns=None))


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"exe": "/bin/ls", "argv": ["ls", "-l", "a b"]}, "/bin/ls -l 'a b'"),
        ({"exe": "/bin/busybox", "argv": ["ls", "-l"]}, "/bin/busybox (ls) -l"),
        ({"exe": "/bin/bash", "argv": ["-bash"]}, "/bin/bash (-bash)"),
        ({"exe": "/tmp/x", "exe_deleted": True, "argv": ["x"]}, "/tmp/x <deleted>"),
        ({"exe": "/bin/x", "argv": None, "missing": {"argv": EXITED}}, "/bin/x <arguments: exited>"),
        ({"exe": "/bin/x", "argv": ["x", "y"], "argv_truncated": True}, "/bin/x y ..."),
        ({"argv": ["ls", "-l"], "missing": {"exe": "permission"}}, "ls -l <permission>"),
        ({"comm": "ls", "missing": {"exe": EXITED}}, "ls <exited>"),
        ({"missing": {"exe": EXITED}}, "<exited>"),
        ({"comm": "kworker/0:1", "missing": {"exe": KERNEL_THREAD}}, "[kworker/0:1]"),
        ({"exe": "/bin/x", "argv": []}, "/bin/x"),
    ],
)
def test_commands_by_example(fields: dict[str, Any], shown: str):
    """
    What ran, as a shell would take it, and what is not known of it.
    """
    assert command(event(**fields)) == shown


@pytest.mark.parametrize(
    ("ns", "shown"),
    [(None, "?"), (0, "0ns"), (999, "999ns"), (1_000, "1us"), (150_000, "150us"), (1_234_567, "1.23ms"),
     (59_900_000_000, "59.9s"), (60_000_000_000, "1min"), (86_400_000_000_000, "1d"), (-5, "0ns")],
)  # fmt: skip
def test_durations_have_three_digits(ns: int | None, shown: str):
    """
    In the unit that fits.
    """
    assert lived(ns) == shown


def test_the_start_says_what_watches_and_what_does_not():
    """
    One line for the backend, one for each source that does not run, then the heading.
    """
    skipped = [events.Skipped("ebpf", "needs CAP_BPF", "run as root")]
    ready = events.Ready(
        time=TIME, host="h", boot_id="b", version="0.1", backend="scan", sources=["scan"], skipped=skipped, kernel="6.1"
    )
    lines = line(ready).splitlines()
    assert "scan" in lines[0]
    assert lines[1] == "  without ebpf: needs CAP_BPF; run as root"
    assert lines[2].split()[0] == "TIME"


@pytest.mark.parametrize(("exact", "count", "shown"), [(True, 1, "1 event here"), (False, 7, "up to 7 events here")])
def test_losses_say_how_many_and_where(exact: bool, count: int, shown: str):
    """
    An upper bound is called one.
    """
    lost = events.Lost(time=TIME, host="h", count=count, exact=exact, where="scan", since=None, until=None)
    assert f"{shown} (scan)" in line(lost)


def test_the_end_sums_up():
    """
    Counts, losses and cost.
    """
    stop = events.Stop(
        time=TIME,
        host="h",
        counts={"exit": 2, "exec": 3},
        lost=4,
        duration_ns=10**9,
        cpu_ns=10**7,
        max_rss_bytes=1 << 20,
    )
    assert line(stop).rstrip().endswith("stop     3 exec, 2 exit in 1s; 4 lost; 0.01 s CPU, 1 MiB")
