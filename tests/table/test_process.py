"""
One process record: ancestry that survives, and what is taken over from before a fork or an exec.
"""

from __future__ import annotations

import sys

from procwatch.facts import EXITED, PERMISSION, Details
from procwatch.table.process import AT_EXEC, AT_FORK, MAX_DEPTH, Process, as_inferred, changed, inherit, make


def chain(length: int, *, ended: bool) -> Process:
    """
    The youngest of `length` generations, of which all others have ended or live.
    """
    process = make(1, 1, "b-1-1", None, Details())
    for pid in range(2, length + 1):
        child = make(pid, pid, f"b-{pid}-{pid}", process, Details())
        process.ended = ended
        process = child
    return process


def test_ancestors_are_told_nearest_first():
    """
    ancestors() gives parent, grandparent and so on.
    """
    assert [process.pid for process in chain(4, ended=False).ancestors()] == [3, 2, 1]


def test_ended_ancestors_live_on_through_their_children():
    """
    Ancestry is there though everybody else has ended.
    """
    assert [process.pid for process in chain(4, ended=True).ancestors()] == [3, 2, 1]


def test_a_process_that_respawns_itself_for_ever_keeps_few_ancestors():
    """
    The chain of ended ancestors is cut, and what was cut off is freed.
    """
    details = Details()
    before = sys.getrefcount(details)
    process = make(1, 1, "b-1-1", None, details)
    for pid in range(2, 10 * MAX_DEPTH):
        process.ended = True
        process = make(pid, pid, f"b-{pid}-{pid}", process, Details())
        assert len(list(process.ancestors())) <= MAX_DEPTH
    assert sys.getrefcount(details) == before


def test_living_ancestors_are_never_cut_off():
    """
    A chain of processes that all live stays whole, however long.
    """
    assert len(list(chain(3 * MAX_DEPTH, ended=False).ancestors())) == 3 * MAX_DEPTH - 1


def test_the_view_for_children_is_made_once_and_anew_after_a_change():
    """
    as_parent() shares one object until the details change.
    """
    process = make(5, 9, "b-5-9", None, Details(exe="/bin/a", comm="a"))
    view = process.as_parent()
    assert (view.id, view.pid, view.exe, view.comm) == ("b-5-9", 5, "/bin/a", "a")
    assert process.as_parent() is view
    process.set_details(Details(exe="/bin/b", comm="b"))
    assert process.as_parent().exe == "/bin/b"


def test_inherit_takes_what_the_new_lacks_and_says_so():
    """
    Only the named fields that are None are taken over; each is marked, and its reason for missing goes away.
    """
    known = Details(exe="/bin/sh", cwd="/old", uid=7, cgroup="/a")
    new = Details(exe=None, cwd=None, uid=8, missing={"exe": EXITED, "cwd": PERMISSION})
    result = inherit(known, new, AT_EXEC, inferred=True)
    assert result is new
    assert (new.exe, new.cwd, new.uid, new.cgroup) == (None, "/old", 8, "/a")
    assert new.missing == {"exe": EXITED}
    assert set(new.inferred) == {"cwd", "cgroup"}


def test_inherit_takes_the_reason_where_there_is_no_value():
    """
    A field that nobody ever could read keeps the reason of before.
    """
    new = inherit(Details(missing={"cwd": PERMISSION}), Details(), AT_EXEC, inferred=True)
    assert new.missing == {"cwd": PERMISSION}
    assert new.inferred == ()


def test_inherit_never_changes_what_was_known():
    """
    Details are shared between processes, so the old ones stay as they are.
    """
    known = Details(cwd="/", missing={"exe": PERMISSION})
    inherit(known, Details(missing={"cwd": EXITED}), AT_FORK, inferred=True)
    assert known == Details(cwd="/", missing={"exe": PERMISSION})


def test_a_changed_copy_shares_nothing_that_was_derived():
    """
    After a change of user, what was made of the details before must not be used again.
    """
    known = Details(uid=0)
    known.unread = Details(uid=0)
    copy = changed(known, uid=1000)
    assert (copy.uid, copy.unread, known.uid) == (1000, None, 0)


def test_inferred_names_only_what_is_set():
    """
    A child has of its parent what the parent has.
    """
    assert as_inferred(make(5, 9, "b-5-9", None, Details(exe="/bin/a", uid=0)), AT_FORK) == ["exe", "uid"]
