"""
What is known of an exec from other sources goes to that exec, and to no other.
"""

from __future__ import annotations

import os

from procwatch.facts import Accounted, Details, Exec, Opened, Thread
from procwatch.table.joins import Joins
from procwatch.table.opens import Ran

HELD = Details(argv=["first", "secret"], cwd="/first", cgroup="/first", uid=7)
DISK = os.makedev(8, 1)
TINY = Opened(1, 10, path="/tiny", dev=DISK, inode=2, kind="elf", held=HELD)


def test_what_was_held_is_of_that_exec_alone():
    """
    A path that is known by device and inode says nothing of the arguments of others that run the same file.
    """
    joins = Joins()
    joins.opened(TINY)
    (first,) = joins.match([Exec(2, 10)], {})[10]
    assert joins.add(Details(missing={"argv": "exited"}), first, None).argv == ["first", "secret"]
    account = Accounted(3, 11, exe_dev=DISK, exe_inode=2)
    batch = [Exec(3, 11), Thread(4, 11, 11, False)]
    (other,) = joins.match(batch, {11: account})[11]
    details = joins.add(Details(missing={"exe": "exited", "argv": "exited"}), other, None)
    assert (details.exe, details.argv, details.missing) == ("/tiny", None, {"argv": "exited"})


def test_a_program_in_memory_is_known_by_its_device():
    """
    Nobody hears of its open. Its name is known if it is all of the comm; it is not remembered, for the next may have
    another.
    """
    joins = Joins()
    gone = Details(missing={"exe": "exited", "exe_deleted": "exited"})

    def ran(pid: int, comm: str) -> Details:
        account = Accounted(3, pid, comm=comm, exe_dev=1, exe_inode=7, exe_memfd=True)
        (ran,) = joins.match([Exec(3, pid), Thread(4, pid, pid, False)], {pid: account})[pid]
        return joins.add(gone, ran, comm)

    known = ran(10, "memfd:hidden")
    assert (known.exe, known.exe_memfd, known.exe_deleted) == ("/memfd:hidden", True, True)
    assert (known.exe_inode, known.exe_size, known.inferred, known.missing) == (7, None, ("exe",), {})
    for pid, comm in ((11, "memfd:123456789"), (12, "3")):  # maybe cut; a descriptor's number, before Linux 6.14
        unknown = ran(pid, comm)
        assert (unknown.exe, unknown.exe_memfd, unknown.exe_deleted) == (None, True, True)
        assert (unknown.inferred, unknown.missing) == ((), {"exe": "exited"})


def test_a_path_that_the_kernel_cannot_tell_is_missing():
    """
    Not an empty one.
    """
    opened = Opened(1, 10, path="", dev=1, inode=2, size=3, kind="elf")
    details = Joins().add(Details(missing={"exe": "exited"}), Ran(exe=opened), None)
    assert (details.exe, details.missing, details.exe_inode, details.inferred) == (None, {"exe": "too_long"}, 2, ())


def test_a_path_is_known_as_long_as_its_device_and_inode_name_it():
    """
    The latest path of a file on a disk. Of a tmpfs none: the next one that is mounted has the same numbers.
    """
    for dev, exe in ((DISK, "/new"), (os.makedev(0, 40), None)):
        joins = Joins()
        for pid, path in ((10, "/old"), (11, "/new")):
            joins.opened(Opened(1, pid, path=path, dev=dev, inode=2, kind="elf"))
            joins.match([Exec(2, pid)], {})
        account = Accounted(3, 12, exe_dev=dev, exe_inode=2)
        (ran,) = joins.match([Exec(3, 12), Thread(4, 12, 12, False)], {12: account})[12]
        details = joins.add(Details(missing={"exe": "exited"}), ran, None)
        assert (details.exe, details.inferred) == (exe, ("exe",) if exe else ())


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
