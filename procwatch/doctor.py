"""
What works here, shown by trying: each source is opened, marked children run, and what comes back is looked at.

All sources listen at once, so that the same children serve for all of them, within about a second.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

from msgspec import Struct

from procwatch import marked, storms, surroundings
from procwatch.clock import Clock
from procwatch.errors import SourceUnavailable
from procwatch.events import Event, Exec, Exit, ProcessEvent
from procwatch.facts import Accounted, Fact, Opened
from procwatch.marked import Case
from procwatch.pipeline import Pipeline
from procwatch.sources.base import Source
from procwatch.sources.select import LADDER, Make, Options
from procwatch.surroundings import Note
from procwatch.table.draft import Draft, Maker

# How long to wait for what the children did; a source that is silent so long does not work.
PATIENCE_S = 0.6
STEP_S = 0.005
_BUFFER = 1 << 20
_NO_AUDIT = "procwatch has no audit source yet"
_SILENT = "it opened, but told nothing of a child of ours"
_NOT_FIELDS = {"time", "host", "missing", "inferred"}


class Verdict(Struct, frozen=True):
    """
    What one source can do here.
    """

    name: str
    works: bool
    fields: list[str]  # of events, that came back filled for a child
    reason: str | None
    remedy: str | None


class Report(Struct, frozen=True):
    """
    The contract of `procwatch doctor --json`.
    """

    kernel: str
    user: str
    choice: str | None  # of `--backend auto`
    sources: list[Verdict]


class Examination(Struct, frozen=True):
    """
    The report, and what people want to know besides.

    `cases` has for each source that works which of the children it named rightly.
    """

    report: Report
    cases: dict[str, dict[str, bool]]
    notes: list[Note]


def examine() -> Examination:
    """
    Try everything, as the user that we are.
    """
    notes = surroundings.notes()  # before our own programs are there
    with storms.installed() as tiny, ExitStack() as stack:
        trials = [Trial(name, make) for rung in LADDER.values() for name, make in rung]
        for trial in trials:
            stack.callback(trial.close)
            trial.open()
        cases = _try(tiny, [trial for trial in trials if trial.failure is None])
        leads = [rung[0][0] for rung in LADDER.values()]
        verdicts = {trial.name: trial.verdict(cases) for trial in trials}
        working = {trial.name: trial.score(cases) for trial in trials if verdicts[trial.name].works}
    audit = Verdict("audit", False, [], _NO_AUDIT, "use another one: each sees more for less")
    choice = next((name for name in leads if verdicts[name].works), None)
    report = Report(os.uname().release, surroundings.user(), choice, [*verdicts.values(), audit])
    return Examination(report, working, notes)


class Trial:
    """
    One source, listening: a lead with a table of its own, of others the facts.
    """

    def __init__(self, name: str, make: Make) -> None:
        self.name = name
        self.failure: SourceUnavailable | None = None
        self._make = make
        self._source: Source | None = None
        self._pipeline: Pipeline | None = None
        self._facts: list[Fact] = []
        self._events: list[ProcessEvent] = []
        self._maker = Maker(socket.gethostname(), Clock())

    def open(self) -> None:
        """
        Begin to listen, or note why not.
        """
        try:
            source = self._make(Options(buffer_bytes=_BUFFER, latency_s=0))
            source.open()
        except SourceUnavailable as error:
            self.failure = error
            return
        self._source = source
        if self.name in {rung[0][0] for rung in LADDER.values()}:
            self._pipeline = Pipeline(self.name, [source], [], maker=self._maker, hold_ns=0)
            self._pipeline.start()

    def turn(self) -> None:
        """
        Take what there is.
        """
        if self._pipeline is not None:
            self._take(self._pipeline.turn())
        elif self._source is not None:
            self._facts += self._source.read()

    def _take(self, drafts: list[Event | Draft]) -> None:
        events = map(self._maker.event, drafts)
        self._events += [event for event in events if isinstance(event, ProcessEvent)]

    def complete(self, cases: list[Case]) -> bool:
        """
        Whether all children's ends were told.
        """
        if self._pipeline is None:
            return True
        ended = {event.pid for event in self._events if type(event) is Exit}
        return all(case.pid in ended for case in cases)

    def score(self, cases: list[Case]) -> dict[str, bool]:
        """
        For each child, whether it was seen as it is.
        """
        return {case.name: self._saw(case) for case in cases}

    def _saw(self, case: Case) -> bool:
        if self._pipeline is None:
            of_case = [fact for fact in self._facts if fact.pid == case.pid]
            return any(not isinstance(fact, Opened) or fact.path == case.exe for fact in of_case)
        return any(case.seen(event) for event in self._events if event.pid == case.pid and type(event) is Exec)

    def verdict(self, cases: list[Case]) -> Verdict:
        """
        What to report.
        """
        if self.failure is not None:
            return Verdict(self.name, False, [], self.failure.reason, self.failure.remedy or None)
        fields = self._fields({case.pid for case in cases})
        if not fields:
            return Verdict(self.name, False, [], _SILENT, "report it as a bug, with the kernel's version")
        limits = "; ".join(getattr(self._source, "limits", ()))
        return Verdict(self.name, True, fields, limits or None, None)

    def _fields(self, pids: set[int]) -> list[str]:
        found: dict[str, None] = {}
        for event in self._events:
            if event.pid in pids:
                filled = (name for name in event.__struct_fields__ if getattr(event, name) is not None)
                found.update(dict.fromkeys(filled))
        for fact in self._facts:
            if fact.pid in pids:
                found.update(dict.fromkeys(_told_by(fact)))
        return sorted(found.keys() - _NOT_FIELDS)

    def close(self) -> None:
        """
        Stop listening.
        """
        if self._source is not None:
            self._source.close()


def _told_by(fact: Fact) -> Iterator[str]:
    """
    Names of the fields that a fact of a source that adds to others gives to events.
    """
    yield "pid"
    if isinstance(fact, Opened):
        yield from ("exe", "exe_deleted", "exe_memfd", "exe_dev", "exe_inode", "exe_size")
        if fact.kind == "script":
            yield "script"
    elif isinstance(fact, Accounted):
        if fact.status is not None:
            yield from ("code", "signal", "core_dumped")
        told = ("ppid", "uid", "gid", "comm", "exe_dev", "exe_inode")
        yield from (name for name in told if getattr(fact, name) is not None)
        yield from (name for name in fact.usage.__struct_fields__ if getattr(fact.usage, name) is not None)


def _try(tiny: str, trials: list[Trial]) -> list[Case]:
    """
    Run the children: those that wait for us first, so that /proc can be read, and then one that does not wait.
    """
    with marked.waiting(tiny) as cases:
        for trial in trials:
            trial.turn()
        short = storms.spawn(tiny, [tiny, "short"])
        for trial in trials:
            trial.turn()
        os.waitpid(short, 0)
        cases.append(Case("short", short, tiny, lambda event: event.exe == tiny))
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for trial in trials:
            trial.turn()
        if all(trial.complete(cases) for trial in trials):
            break
        time.sleep(STEP_S)
    return cases
