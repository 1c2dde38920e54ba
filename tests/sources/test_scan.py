"""
The scan's own arithmetic, and what it says where it cannot see all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest

from procwatch.errors import SourceUnavailable
from procwatch.facts import Fact
from procwatch.sources import scan
from procwatch.sources.scan import Scan
from tests.conftest import need
from tests.living import NOBODY, elsewhere

pytestmark = pytest.mark.usefixtures("no_leaks")
ROOT = os.geteuid() == 0


@pytest.mark.parametrize(
    ("before", "last", "fresh"),
    [
        (100, 100, []),
        (100, 103, [101, 102, 103]),
        (32766, 302, [32767, 300, 301, 302]),
        (32767, 300, [300]),
        (999, 2, [2]),
        (100, 100 + scan.MAX_PROBES + 1, None),
        (2000, 1000, None),
    ],
)
def test_numbers_between(before: int, last: int, fresh: Sequence[int] | None) -> None:
    """
    The numbers given out between two looks are tried one by one, also across the wrap, unless they are too many.
    """
    pid_max = 1000 if before == 999 else 32768
    numbers = scan._between(before, last, pid_max)

    assert (numbers if numbers is None else list(numbers)) == fresh


def test_works_here() -> None:
    """
    A probe finds nothing wrong, and leaves nothing open.
    """
    assert Scan().probe() is None


def test_closed() -> None:
    """
    Before open() and after close() there is nothing to read; closing twice is the same as once.
    """
    source = Scan()

    assert source.read() == []
    source.open()
    assert source.fileno() is None
    source.close()
    source.close()
    assert source.read(final=True) == []


def test_opened_again() -> None:
    """
    A source that was closed can be opened again.
    """
    source = Scan()
    for _ in range(2):
        source.open()
        source.read()
        source.close()


def test_pace() -> None:
    """
    The pause is 1 to 20 ms, and fastest after a birth.
    """
    source = Scan()
    source.open()
    try:
        os.waitpid(os.posix_spawn(shutil.which("true") or "/bin/true", ["true"], {}), 0)
        source.read()
        assert source.delay_s() == max(0.001, source._cost_ns / 1e9)
        source._looked_ns = source._born_ns + 60 * 10**9
        source._cost_ns = 0
        assert source.delay_s() == 0.02
    finally:
        source.close()


def test_proc_of_another_namespace() -> None:
    """
    With the /proc of another pid namespace the numbers mean nothing: it says so instead of guessing.
    """
    need(ROOT, "needs root")

    def open_it() -> tuple[str, str]:
        try:
            Scan().open()
        except SourceUnavailable as error:
            return error.reason, error.remedy
        return "", ""

    reason, remedy = elsewhere(open_it, foreign_proc=True)

    assert "pid namespace" in reason
    assert "mount" in remedy


def test_limits() -> None:
    """
    What it cannot see here is said: hidden processes, and losses in a pid namespace.
    """
    need(ROOT, "needs root")

    def limits() -> list[str]:
        source = Scan()
        source.open()
        source.close()
        return source.limits

    hidden = elsewhere(limits, uid=NOBODY, hidepid="2")
    nested = elsewhere(limits, pid_namespace=True)

    assert any("hidepid" in limit for limit in hidden)
    assert any("pid namespace" in limit for limit in nested)


def test_no_loss_is_told_in_a_namespace() -> None:
    """
    The births of the whole host are not taken for losses in a pid namespace.
    """
    need(ROOT, "needs root")

    def watch() -> list[Fact]:
        source = Scan()
        source.open()
        for _ in range(5):
            os.waitpid(os.posix_spawn(shutil.which("true") or "/bin/true", ["true"], {}), 0)
        facts = source.read(final=True)
        source.close()
        return [fact for fact in facts if fact.pid == 0]

    assert elsewhere(watch, pid_namespace=True) == []
