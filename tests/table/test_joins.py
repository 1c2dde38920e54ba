"""
What is known of an exec from other sources goes to that exec, and to no other.
"""

from __future__ import annotations

from procwatch.facts import Accounted, Details, Exec, Opened, Thread
from procwatch.table.joins import Joins
from procwatch.table.opens import Ran

HELD = Details(argv=["first", "secret"], cwd="/first", cgroup="/first", uid=7)
TINY = Opened(1, 10, path="/tiny", dev=1, inode=2, kind="elf", held=HELD)


def test_what_was_held_is_of_that_exec_alone():
    """
    A path that is known by device and inode says nothing of the arguments of others that run the same file.
    """
    joins = Joins()
    joins.opened(TINY)
    (first,) = joins.match([Exec(2, 10)], {})[10]
    assert joins.add(Details(missing={"argv": "exited"}), first, None).argv == ["first", "secret"]
    account = Accounted(3, 11, exe_dev=1, exe_inode=2)
    batch = [Exec(3, 11), Thread(4, 11, 11, False)]
    (other,) = joins.match(batch, {11: account})[11]
    details = joins.add(Details(missing={"exe": "exited", "argv": "exited"}), other, None)
    assert (details.exe, details.argv, details.missing) == ("/tiny", None, {"argv": "exited"})


def test_a_deduced_open_gives_its_path_only():
    """
    An open that may be another exec's does not give that one's arguments away.
    """
    details = Joins().add(Details(missing={"argv": "exited"}), Ran(exe=TINY, certain=False), None)
    assert (details.exe, details.argv, details.inferred) == ("/tiny", None, ("exe",))


def test_a_leader_that_ends_first_takes_no_opens_along():
    """
    A thread's exec ends the leader before it is told: the opens are the exec's all the same.
    """
    joins = Joins()
    joins.match([Thread(1, 10, 12, True)], {})
    joins.opened(TINY)
    joins.match([Thread(2, 10, 10, False)], {})
    (ran,) = joins.match([Exec(3, 10)], {})[10]
    assert (ran.exe, ran.certain) == (TINY, True)


def test_the_end_of_a_process_forgets_what_it_opened():
    """
    An open that led to nothing is not the next one's of the same number.
    """
    joins = Joins()
    joins.opened(TINY)
    joins.forget(10)
    (ran,) = joins.match([Exec(3, 10)], {})[10]
    assert ran.exe is None
