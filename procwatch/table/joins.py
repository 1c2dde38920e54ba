"""
What other sources knew of an exec, added to what netlink and /proc tell of it.

    known                                            exe of the exec
    /proc only                                       what /proc says
    open only (fanotify)                             the file that was opened, see opens.py
    both, the same file                              the same
    both, different files                            the open's, if that is proven: it is nearer to the exec than our
                                                     look at /proc was. Counted: `disagreements`
    neither, but the account of its end (taskstats)  the path under which this device and inode was executed before;
                                                     of a file in memory the name that the kernel made its comm
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from procwatch.facts import TOO_LONG, Accounted, Details, Exec, Fact, Opened, Thread
from procwatch.table.opens import PENDING, Identity, Ran, match
from procwatch.table.process import changed

MAX_OPENERS = 8192  # processes with opens that wait for an exec
MAX_PATHS = 16_384
MAX_SHARED = 4096
COMM_BYTES = 15  # TASK_COMM_LEN less its NUL: a name of so many may have been cut


class Joins:
    """
    Opens that wait for their exec, and paths of executables by device and inode. All of it bounded: when full, what is
    oldest goes.
    """

    def __init__(self) -> None:
        self.disagreements = 0
        # By pid: opens that wait for their exec to be told.
        self.opens: dict[int, list[Opened]] = {}
        self._threaded: set[int] = set()  # processes that have had threads: the end of the first is not theirs
        self._paths: dict[Identity, Opened] = {}
        self._shared: dict[tuple[object, ...], tuple[Details, Details]] = {}

    def opened(self, fact: Opened) -> None:
        """
        Keep an open until its exec is told.
        """
        opens = self.opens.get(fact.pid)
        if opens is None:
            if len(self.opens) >= MAX_OPENERS:
                del self.opens[next(iter(self.opens))]
            self.opens[fact.pid] = [fact]
        elif len(opens) < 4 * PENDING:
            opens.append(fact)

    def match(self, facts: Iterable[Fact], accounts: Mapping[int, Accounted]) -> dict[int, list[Ran]]:
        """
        For each process that executed programs in this batch, what each exec ran.
        """
        last: dict[int, Exec] = {}
        several: dict[int, int] = {}  # how many, of those that executed more than one
        ended: set[int] = set()
        threaded = self._threaded
        for fact in facts:
            if type(fact) is Exec:
                pid = fact.pid
                if pid in last:
                    several[pid] = several.get(pid, 1) + 1
                last[pid] = fact
                ended.discard(pid)  # a thread's exec ends its leader first
            elif type(fact) is Thread:
                if fact.born:
                    if len(threaded) >= MAX_OPENERS:
                        threaded.clear()
                    threaded.add(fact.pid)
                elif fact.tid == fact.pid and fact.pid not in threaded:
                    ended.add(fact.pid)
        found = {}
        for pid, told in last.items():
            account = accounts.get(pid) if pid in ended else None
            final = self._final(told, account)
            count = several.get(pid, 1)
            ran, rest = match(self.opens.pop(pid, ()), count, final=final, ended=pid in ended)
            if rest:
                self.opens[pid] = rest
            if not ran:
                ran = [Ran(certain=False) for _ in range(count)]
            if ran[-1].exe is None and final is not None:
                ran[-1].exe = self._paths.get(final) or (self.path_of(account) if account is not None else None)
            for one in ran:
                self._remember(one.exe)
            found[pid] = ran
        return found

    @property
    def waiting(self) -> bool:
        """
        Whether there is anything to match.
        """
        return bool(self.opens)

    def forget(self, pid: int) -> None:
        """
        A process has ended: what it opened last was for nothing.
        """
        self.opens.pop(pid, None)
        self._threaded.discard(pid)

    def _final(self, last: Exec, account: Accounted | None) -> Identity | None:
        if account is not None and account.exe_dev is not None and account.exe_inode is not None:
            return account.exe_dev, account.exe_inode
        details = last.details
        if details is not None and details.exe_dev is not None and details.exe_inode is not None:
            return details.exe_dev, details.exe_inode
        return None

    def _remember(self, opened: Opened | None) -> None:
        """
        Keep the latest path of a file, where device and inode are a name that lasts: the number of a file system
        without a disk (tmpfs, overlayfs, btrfs) is given to the next one that is mounted, whose inodes begin anew.
        """
        if opened is None or os.major(opened.dev) == 0:
            return
        identity = opened.dev, opened.inode
        if len(self._paths) >= MAX_PATHS and identity not in self._paths:
            del self._paths[next(iter(self._paths))]
        # What was read while that exec was held is of that process alone.
        self._paths[identity] = opened if opened.held is None else replace(opened, held=None)

    def path_of(self, account: Accounted) -> Opened | None:
        """
        The executable that an ended process ran, if it was seen before, or is in memory: fanotify cannot hear those.
        """
        if account.exe_dev is None or account.exe_inode is None:
            return None
        if account.exe_memfd:
            return _in_memory(account, account.exe_dev, account.exe_inode)
        return self._paths.get((account.exe_dev, account.exe_inode))

    def add(self, details: Details, ran: Ran, comm: str | None) -> Details:
        """
        `details` with what the opens say, as the table at the top has it, and with the comm that the account of the end
        gives.
        """
        exe = ran.exe
        if exe is None:
            return details
        if exe.held is not None and ran.certain:  # an open that was deduced may be another exec's
            details = _with_held(details, exe.held)
        if details.exe is not None:
            if not ran.certain or (details.exe_inode == exe.inode and details.exe_dev == exe.dev):
                return details
            if details.exe == exe.path:
                return details
            self.disagreements += 1
        # Thousands of children of one parent die unread in a storm: what is known of them is the same for all.
        key = _key(details, exe, ran.script, ran.certain, comm)
        kept = self._shared.get(key)
        if kept is None or kept[0] is not details:
            if len(self._shared) >= MAX_SHARED:
                self._shared.clear()
            kept = self._shared[key] = (details, named(details, exe, ran.script, ran.certain, comm))
        return kept[1]

    def known(self, details: Details, exe: Opened, comm: str | None) -> Details | None:
        """
        What `add` gave for a file that certainly ran, and no script; None if it was not asked.
        """
        kept = self._shared.get(_key(details, exe, None, True, comm))
        return None if kept is None or kept[0] is not details else kept[1]


def _in_memory(account: Accounted, dev: int, inode: int) -> Opened:
    """
    A file in memory (memfd_create) that an ended process ran. Its name is known if an exec by descriptor made it the
    process's comm, which Linux does from 6.14 on, and it was not too long for that.
    """
    comm = account.comm or ""
    named = comm.startswith("memfd:") and len(comm.encode("utf-8", "surrogateescape")) < COMM_BYTES
    return Opened(account.time_ns, account.pid, f"/{comm}" if named else "", True, True, dev, inode)


def _key(details: Details, exe: Opened, script: Opened | None, certain: bool, comm: str | None) -> tuple[object, ...]:
    return id(details), exe.path, exe.deleted, exe.dev, exe.inode, exe.size, script and script.path, certain, comm


def named(details: Details, exe: Opened, script: Opened | None, certain: bool, comm: str | None = None) -> Details:
    """
    A copy of `details` with this executable, and this comm if there was none.
    """
    known = {"exe_deleted"} if details.comm is not None or comm is None else {"exe_deleted", "comm"}
    missing = {field: why for field, why in details.missing.items() if field not in known}
    if exe.path:
        missing.pop("exe", None)
    elif not exe.memfd:
        missing["exe"] = TOO_LONG
    return changed(
        details,
        exe=exe.path or None,
        exe_deleted=exe.deleted,
        exe_memfd=exe.memfd,
        exe_dev=exe.dev,
        exe_inode=exe.inode,
        exe_size=exe.size or None,
        comm=details.comm or comm,
        script=details.script if script is None else script.path,
        inspected=False,
        missing=missing,
        inferred=details.inferred if certain or not exe.path else (*details.inferred, "exe"),
    )


_HELD = ("file", "argv", "cwd", "cgroup", "uid", "gid", "euid", "egid", "tty", "session")


def _with_held(details: Details, held: Details) -> Details:
    """
    A copy of `details` with what was read while the kernel held the exec, where nothing better is known.
    """
    inferred = details.inferred
    fields = {
        name: value
        for name in _HELD
        if (value := getattr(held, name)) is not None and (getattr(details, name) is None or name in inferred)
    }
    return changed(
        details,
        argv_truncated=held.argv_truncated if "argv" in fields else details.argv_truncated,
        ns_pid=held.ns_pid if details.ns_pid is None else details.ns_pid,
        missing={name: why for name, why in details.missing.items() if name not in fields},
        inferred=tuple(name for name in inferred if name not in fields),
        **fields,
    )
