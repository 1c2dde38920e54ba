"""
The share of births that a source told of, by the kernel's own count.
"""

from __future__ import annotations

import subprocess

from procwatch.errors import DecodeError
from procwatch.sources import procfs
from procwatch.sources.births import Births, share


class Host:
    """
    A kernel's total and a source's, set by the test; something is born at each of the first `busy` looks.
    """

    def __init__(self, busy: int = 0) -> None:
        self.total = 1000
        self.told = 10
        self.busy = busy

    def born(self) -> int:
        """
        The kernel's total.
        """
        if self.busy:
            self.busy -= 1
            self.total += 1
            self.told += 1
        return self.total


def test_counts_from_the_beginning():
    """
    What was before does not count.
    """
    host = Host()
    births = Births(lambda: host.told, host.born)
    assert births.shares() == {"fork": 1.0}

    host.total += 8
    host.told += 6
    assert births.shares() == {"fork": 0.75}


def test_numbers_are_of_one_moment():
    """
    On a busy host it looks again, until nothing was born between the two numbers.
    """
    host = Host(busy=5)
    births = Births(lambda: host.told, host.born)
    host.total += 2
    host.told += 1
    host.busy = 3

    assert births.shares() == {"fork": 4 / 5}


def test_host_that_never_rests():
    """
    Where something is born all the time, it ends all the same, with what is nearly right.
    """
    host = Host(busy=1 << 30)
    births = Births(lambda: host.told, host.born)
    host.total += 1000
    host.told += 1000

    assert births.shares()["fork"] > 0.98


def test_no_total():
    """
    Without a /proc/stat nothing is claimed.
    """

    def refuse() -> int:
        raise DecodeError("/proc/stat: absent")

    assert Births(lambda: 0, refuse).shares() == {}


def test_never_more_than_all():
    """
    What was told between the two looks does not make it more than everything.
    """
    assert share(11, 10) == 1.0


def test_real_total_counts_every_fork():
    """
    The kernel's total grows with each child.
    """
    before = procfs.born()
    for _ in range(3):
        subprocess.run(["true"], check=True)

    assert procfs.born() >= before + 3
