"""
Lines for people: aligned, in colour on a terminal, every control character escaped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from procwatch import events
from procwatch.events import Event, ProcessEvent
from procwatch.formats.text import quote, quote_all, safe

_COLOURS = {"exec": "32", "fork": "34", "exit": "2", "failed": "1;31", "lost": "1;33", "note": "2", "running": "36"}
_HEADING = f"{'TIME':12}  {'EVENT':8} {'PID':>7} {'USER':10} {'PARENT':20} {'RESULT':>12} {'LIVED':>8}  COMMAND"


class Console:
    """
    Writes events as lines.

    Args:
        colour: Use ANSI colours.
        indent: Indent the command by its depth below the processes that were there at the start.
    """

    def __init__(self, *, colour: bool = False, indent: bool = False) -> None:
        self._colour = colour
        self._indent = indent
        self._top = 1 << 30
        self._writers: dict[type[Event], Callable[[Any], str]] = {
            events.Ready: self._ready,
            events.Exit: self._exit,
            events.Lost: self._lost,
            events.ContainerEvent: self._container,
            events.Stop: self._stop,
            events.ExecFailed: self._exec_failed,
        }

    def table(self, running: Sequence[events.Running]) -> bytes:
        """
        What runs now, one line each, below a heading.
        """
        lines = [self._paint(f"{'PID':>7} {'USER':10} {'PARENT':20} {'TTY':6}  COMMAND", "note")]
        lines += [f"{_who(one)} {_cut(one.tty or '-', 6):6}  {_place(one)}{command(one)}" for one in running]
        return ("\n".join(lines) + "\n").encode("utf-8", "replace")

    def encode(self, event: Event) -> bytes:
        """
        One event as a line with its newline (`ready` is several).
        """
        return (self._writers.get(type(event), self._process)(event) + "\n").encode("utf-8", "replace")

    def encode_into(self, event: Event, buffer: bytearray) -> None:
        """
        The same at the end of a buffer.
        """
        buffer += self.encode(event)

    def _paint(self, text: str, kind: str) -> str:
        code = _COLOURS.get(kind)
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text

    def _row(self, event: ProcessEvent, result: str = "", lived: str = "", paint: str | None = None) -> str:
        head = f"{_clock(event)}  {event.event:8} {_who(event)}"
        head = self._paint(f"{head} {result:>12} {lived:>8}", paint or event.event)
        return f"{head}  {self._blanks(event)}{_place(event)}{command(event)}"

    def _blanks(self, event: ProcessEvent) -> str:
        """
        Two for each generation below the topmost process so far.
        """
        if not self._indent:
            return ""
        depth = len(event.ancestors or ())
        self._top = min(depth, self._top)
        return "  " * (depth - self._top)

    def _process(self, event: ProcessEvent) -> str:
        return self._row(event)

    def _exit(self, event: events.Exit) -> str:
        failed = bool(event.signal or event.code)
        result = event.signal_name or ("?" if event.code is None else str(event.code))
        if event.core_dumped:
            result += "+core"
        return self._row(event, result, lived(event.duration_ns), "failed" if failed else "exit")

    def _exec_failed(self, event: events.ExecFailed) -> str:
        return self._row(event, event.error, paint="failed") + f"  tried {quote(event.file or '?')}"

    def _ready(self, event: events.Ready) -> str:
        where = f"procwatch {event.version} on {safe(event.host)}, Linux {safe(event.kernel)}"
        lines = [f"{where}: {event.backend} ({', '.join(event.sources)})"]
        lines += [f"  without {s.name}: {s.reason}" + (f"; {s.remedy}" if s.remedy else "") for s in event.skipped]
        return self._paint("\n".join(lines), "note") + "\n" + self._paint(_HEADING, "note")

    def _lost(self, event: events.Lost) -> str:
        many = f"{event.count} event{'s' * (event.count != 1)}"
        return self._paint(
            f"{_clock(event)}  lost     {'' if event.exact else 'up to '}{many} here ({event.where})", "lost"
        )

    def _container(self, event: events.ContainerEvent) -> str:
        c = event.container
        what = " ".join(safe(part) for part in (c.runtime, c.name, c.image) if part)
        return self._paint(f"{_clock(event)}  {'names':8} {safe(c.id)[:12]} is {what}", "note")

    def _stop(self, event: events.Stop) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(event.counts.items(), key=lambda item: -item[1]))
        return self._paint(
            f"{_clock(event)}  stop     {counts or 'nothing'} in {lived(event.duration_ns)}; {event.lost} lost; "
            f"{event.cpu_ns / 1e9:.2f} s CPU, {event.max_rss_bytes >> 20} MiB",
            "note",
        )


def command(event: ProcessEvent) -> str:
    """
    What runs: the executable's path and the arguments as a shell would take them.

    The name that the process was given (argv[0]) is shown, in brackets, only where it says something else.
    """
    exe, argv = event.exe, event.argv
    if exe is None:
        # Never a guess: what is known, and why the rest is not.
        why = event.missing.get("exe", "unknown")
        known = quote_all(argv) if argv else safe(event.file or event.comm or "")
        return f"[{known}]" if why == "kernel_thread" else f"{known} <{why}>".strip()
    shown = quote(exe) + (" <deleted>" if event.exe_deleted else "")
    if argv is None:
        return f"{shown} <arguments: {event.missing.get('argv', 'unknown')}>"
    if argv and _base(argv[0]) != _base(exe):
        shown += f" ({quote(argv[0])})"
    if argv[1:]:
        shown += " " + quote_all(argv[1:])
    return shown + (" ..." if event.argv_truncated else "")


def lived(ns: int | None) -> str:
    """
    A duration in three digits.

    >>> lived(1_234_567)
    '1.23ms'
    """
    if ns is None:
        return "?"
    value, unit = float(max(ns, 0)), "ns"
    for following, size in (("us", 1000), ("ms", 1000), ("s", 1000), ("min", 60), ("h", 60), ("d", 24)):
        if value < size:
            break
        value, unit = value / size, following
    return f"{value:.3g}{unit}" if value < 1000 else f"{value:.0f}{unit}"


def _clock(event: Event) -> str:
    seconds, ns = divmod(event.time_ns, 1_000_000_000)
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{ns // 1_000_000:03d}"


def _who(event: ProcessEvent) -> str:
    """
    Pid, user and parent, in columns.
    """
    user = safe(event.user or ("?" if event.uid is None else str(event.uid)))
    parent = event.parent
    by = f"{_base(parent.exe) or parent.comm or '?'}({parent.pid})" if parent else str(event.ppid or "-")
    return f"{event.pid:>7} {_cut(user, 10):10} {_cut(safe(by), 20):20}"


def _place(event: ProcessEvent) -> str:
    """
    The container, before the command; nothing on the host.
    """
    container = event.container
    return f"{{{_cut(safe(container.name or container.id[:12]), 24)}}} " if container is not None else ""


def _base(path: str | None) -> str:
    return os.path.basename(path) if path else ""


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
