"""
The short way for brief lives gives what the general way gives, to the byte, and leaves the same table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from procwatch.brief import Brief
from procwatch.clock import Clock
from procwatch.events import Event
from procwatch.express import Written
from procwatch.facts import Accounted, Alive, Changed, Details, Exec, Fact, Fork, Lost, Opened, Thread, Usage
from procwatch.formats.native import Lines
from procwatch.table.draft import Draft, Maker
from procwatch.table.table import Table

# Three processes are there from the start: an ordinary one, one that others change, one whose name is not UTF-8.
SHELL, BUSY, ODD = 5, 6, 7
PIDS = range(10, 16)
FILES = {
    "tiny": Opened(0, 0, "/tiny", False, False, 8, 1, 100, "elf"),
    "gone": Opened(0, 0, "/tiny", True, False, 8, 1, 100, "elf"),
    "true": Opened(0, 0, "/true", False, False, 8, 2, 100, "elf", "/lib/ld.so"),
    "ld.so": Opened(0, 0, "/lib/ld.so", False, False, 8, 3, 100, "elf"),
    "run.sh": Opened(0, 0, "/run.sh", False, False, 8, 4, 100, "script", "/true"),
}
USUAL = [["tiny"]] * 4 + [["true", "ld.so"]] * 2
UNUSUAL = [["gone"], ["run.sh", "true", "ld.so"], ["ld.so"], [], ["tiny", "true"]]

Drain = tuple[list[Fact], list[Fact], list[Fact]]
often = st.integers(0, 9).map(lambda number: number < 8)


def alive(pid: int, comm: str) -> Alive:
    details = Details(
        1, pid, comm, f"/bin/{comm}", False, comm, None, [comm], False, "/tmp", 1000, 100, 1000, 100, "", 1, "/a.slice"
    )
    return Alive(1, pid, details)


@st.composite
def one_life(draw: st.DrawFn, time_ns: int) -> Drain:
    """
    What is told of one process: mostly of a brief life, else of anything.
    """
    pid, step = draw(st.sampled_from(PIDS)), draw(st.integers(100, 40_000_000))
    ppid = SHELL if draw(often) else draw(st.sampled_from([SHELL, BUSY, ODD, 2, 99, *PIDS]))
    times = iter(range(time_ns, time_ns + 99 * step, step))
    facts: list[Fact] = [Fork(next(times), pid, ppid), Exec(next(times), pid)]
    if not draw(often):
        odd = (
            Exec(next(times), pid),
            Exec(next(times), pid, structs.replace(alive(pid, "read").details, start_ticks=None), time_ns),
            Thread(next(times), pid, 99, True),
            Thread(next(times), pid, 99, False),
            Changed(next(times), pid, "comm", comm="other"),
            Changed(next(times), BUSY, "uid", real=draw(st.integers(0, 2)), effective=0),
            Exec(next(times), BUSY),
            Fork(next(times), 16, pid),
            Lost(next(times), 0, "netlink_socket", 1),
        )
        facts.append(draw(st.sampled_from(odd)))
    facts.append(Thread(next(times), pid, pid, False, draw(st.sampled_from([0, 0, 0, 1 << 8, 9, 0x8B]))))
    if not draw(often):
        del facts[draw(st.integers(0, len(facts) - 1))]
    names = draw(st.sampled_from(USUAL + UNUSUAL))
    opens: list[Fact] = [structs.replace(FILES[name], pid=pid) for name in names]
    ran = FILES[draw(st.sampled_from(names)) if names and not draw(often) else names[0] if names else "tiny"]
    usage = Usage(4, draw(st.integers(0, 5)), draw(st.sampled_from([None, 4096])), 0, 7)
    account = Accounted(time_ns, pid, usage, ppid, 1000, 100, "tiny", ran.dev or None, ran.inode, 0)
    return facts, opens, [account] if draw(often) else []


@st.composite
def weather(draw: st.DrawFn) -> list[Drain]:
    """
    A few drains: lives side by side, with what one drain comes too late for in the next.
    """
    drains: list[Drain] = []
    for second in range(1, draw(st.integers(1, 4)) + 1):
        times = draw(st.lists(st.integers(0, 900_000_000), max_size=8))
        lives = [draw(one_life(second * 1_000_000_000 + time_ns)) for time_ns in times]
        facts, opens, accounts = ([fact for life in lives for fact in life[part]] for part in range(3))
        drains.append((sorted(facts, key=lambda fact: fact.time_ns), opens, accounts))
    for (facts, opens, accounts), later in pairwise(drains):
        if draw(st.booleans()):
            for now, then in ((facts, later[0]), (opens, later[1]), (accounts, later[2])):
                cut = draw(st.integers(0, len(now)))
                then[:0] = now[cut:]
                del now[cut:]
    return drains


class Agent:
    """
    A table, and what is written of it.
    """

    def __init__(self, *, brief: bool, accounts: bool, kinds: Sequence[str]) -> None:
        maker = Maker("host", Clock(offset_ns=0))
        self.accounts = accounts
        self.lines = Lines(maker)
        self.table = Table(boot="0123abcd", maker=maker, kinds=kinds)
        self.table.snapshot([alive(SHELL, "sh"), alive(BUSY, "busy"), alive(ODD, "\udcff")], 2, tell=False)
        tells_exit = "exit" in kinds
        self.brief = Brief(self.table, maker, self.lines, accounts=accounts, tells_exit=tells_exit, least=0)
        self.short = 0 if brief else None
        self.text = bytearray()

    def take(self, drain: Drain) -> None:
        facts, *others = ([structs.replace(fact) for fact in part] for part in drain)
        others = others if self.accounts else []
        left = self.brief.take(facts, others) if self.short is not None else facts
        for other in others:
            self.table.apply(other)
        self.table.apply(left)
        self.write(self.table.flush_drafts(facts[-1].time_ns if facts else 0))

    def write(self, drafts: Sequence[Event | Draft]) -> None:
        for draft in drafts:
            if isinstance(draft, Written):
                assert self.short is not None
                self.short += draft.count
                self.text += draft.data
                assert draft.data.count(b"\n") == draft.count
                assert draft.since_ns <= draft.until_ns
            else:
                self.lines.encode_into(draft, self.text)

    def left(self) -> dict[str, Any]:
        """
        What is known in the end.
        """
        known = {
            process.pid: (process.id, process.ppid, process.argv, process.born_ns, process.depth, process.details.exe)
            for process in self.table.processes.values()
        }
        return {"known": known, "opens": set(self.table.joins.opens), "accounts": set(self.table.accounts)}


def storm(count: int, second: int = 1, **changes: Any) -> Drain:
    """
    Brief lives of one kind, one after the other.
    """
    facts: list[Fact] = []
    opens: list[Fact] = []
    accounts: list[Fact] = []
    for number in range(count):
        pid, at = 100 * second + number, second * 1_000_000_000 + number * 1000
        facts += [Fork(at, pid, SHELL), Exec(at + 200, pid), Thread(at + 400, pid, pid, False, 3 << 8)]
        opens.append(structs.replace(FILES["tiny"], pid=pid, **changes))
        accounts.append(Accounted(at, pid, Usage(1, 2, None, 4, 5), SHELL, 0, 0, "tiny", 8, 1))
    return facts, opens, accounts


@pytest.mark.parametrize("accounts", [True, False])
@pytest.mark.parametrize("kinds", [["fork", "exec", "exit"], ["exec", "exit", "uid", "comm"], ["exec"]], ids="-".join)
def test_a_storm_goes_the_short_way(accounts: bool, kinds: list[str]):
    """
    All but the first of its kind.
    """
    short, general = (Agent(brief=brief, accounts=accounts, kinds=kinds) for brief in (True, False))
    for second in (1, 2):
        for agent in (short, general):
            agent.take(storm(20, second))
    assert short.text == general.text
    assert short.left() == general.left()
    assert short.short == 20 * (1 + ("exit" in kinds))


def test_a_file_that_is_removed_meanwhile_is_another_kind():
    """
    Its path is the same, but no longer where it lies.
    """
    short, general = (Agent(brief=brief, accounts=True, kinds=["exec", "exit"]) for brief in (True, False))
    for agent in (short, general):
        for second, deleted in enumerate((False, False, True, True), 1):
            agent.take(storm(5, second, deleted=deleted))
    assert short.text == general.text
    assert general.text.count(b'"exe_deleted":true') == 20


@given(weather(), st.booleans(), st.sampled_from([("fork", "exec", "exit"), ("exec", "exit"), ("exec", "vanished")]))
@settings(max_examples=300)
def test_both_ways_give_the_same(drains: list[Drain], accounts: bool, kinds: tuple[str, ...]):
    """
    Whatever happens, in one drain or across several.
    """
    short, general = (Agent(brief=brief, accounts=accounts, kinds=kinds) for brief in (True, False))
    for agent in (short, general):
        for drain in [storm(4, 0), *drains]:
            agent.take(drain)
    assert short.text == general.text
    assert short.left() == general.left()
    for agent in (short, general):
        agent.write(agent.table.drain_drafts())
    assert short.text == general.text
