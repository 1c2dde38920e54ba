"""
Which filesystems fanotify listens on: all that programs can run from, also those mounted later.

A mark is on a superblock (FAN_MARK_FILESYSTEM), so one mount of it is enough, and bind mounts and mount namespaces make
no difference. Facts that shaped this file, tried on Linux 6.18:

- The kernel tells of a new mount by POLLPRI on an open /proc/PID/mountinfo, of that process's mount namespace only.
  The state is consumed by whoever polls: through an epoll descriptor inside another one the news gets lost. So a thread
  waits for it, and marks at once: each exec before the mark is one that fanotify does not see.
- An open /proc/PID/mountinfo keeps the namespace and its mounts alive. It is held together with a pidfd, and let go as
  soon as that process ends.
- Device numbers of unmounted filesystems are soon reused, and a mark goes with its superblock. So each look marks all
  afresh; marking twice does no harm and takes 3 µs.
- The kernel's own mount that memfds live on refuses marks (SB_NOUSER; Linux 6.8).
- Marking asks the filesystem whether we may read its root: a dead network filesystem would hold us up, so those are
  marked from threads of their own.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from procwatch.errors import DecodeError
from procwatch.sources import libc
from procwatch.wire import mountinfo

# Filesystems of the kernel that hold no programs, and those that a lookup may set off (autofs).
# fmt: off
PSEUDO: Final = frozenset({
    "autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "cpuset", "debugfs", "devpts",
    "efivarfs", "functionfs", "fusectl", "hugetlbfs", "mqueue", "nfsd", "nsfs", "proc", "pstore", "resctrl",
    "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs",
})
# Filesystems whose answer may never come.
SLOW: Final = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "lustre", "nfs", "nfs4", "ocfs2",
    "smb3", "smbfs",
})
# fmt: on
SLOW_S: Final = 0.5
NAMESPACES: Final = 256
_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ESTALE})

_ONCE = select.EPOLLIN | select.EPOLLONESHOT


class Marks:
    """
    Marks every filesystem that can be reached, now and when mounts change.

    Args:
        group: The fanotify group.
        mask: The events to mark for.
        lying: Called by the thread a second after events came into the group; None: never.
        slow_mask: The events to mark for on network filesystems and FUSE, if others.
    """

    def __init__(
        self, group: int, mask: int, lying: Callable[[], None] | None, *, slow_mask: int | None = None
    ) -> None:
        self._group = group
        self._mask = mask
        self._slow_mask = mask if slow_mask is None else slow_mask
        self._lying = lying
        self._limits: dict[str, str] = {}
        self._slow: dict[str, threading.Thread] = {}
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._news: deque[int] = deque(maxlen=NAMESPACES)
        self._namespaces: dict[int, int] = {}  # inode number of a mount namespace -> the process it is reached by
        self._watches: dict[int, int] = {}  # descriptor -> that process; two for each, pidfd and mountinfo
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="procwatch-marks", daemon=True)

    @property
    def limits(self) -> list[str]:
        """
        What could not be marked, a line each.
        """
        return list(self._limits.values())

    def open(self) -> None:
        """
        Mark all there is, and begin to watch for more.

        Raises:
            OSError: The root filesystem cannot be marked, so none can.
        """
        libc.fanotify_mark(self._group, libc.FAN_MARK_ADD | libc.FAN_MARK_FILESYSTEM, self._mask, "/")
        self._mark_memory()
        self._epoll.register(self._wake, select.EPOLLIN)
        if self._lying is not None:
            self._epoll.register(self._group, _ONCE)
        self._watch(os.getpid())
        self._scan()
        end = time.monotonic() + SLOW_S
        for thread in self._slow.values():
            thread.join(max(0.0, end - time.monotonic()))
        self._thread.start()

    def seen(self, pid: int, namespace: int) -> None:
        """
        A process was seen in a mount namespace: watch that, if it is new. Called from any thread; cheap.
        """
        if namespace not in self._namespaces and not self._closing:
            self._news.append(pid)
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """
        Stop watching; the group is its owner's to close.
        """
        if self._closing:
            return
        self._closing = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for fd in self._watches:
            os.close(fd)
        self._watches.clear()
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        check_at: float | None = None  # nobody is woken while nothing happens
        while not self._closing:
            died = False
            for fd, _ in self._epoll.poll(None if check_at is None else max(0.0, check_at - time.monotonic())):
                if fd == self._wake:
                    os.eventfd_read(fd)
                elif fd == self._group:
                    check_at = time.monotonic() + 1.0
                elif fd in self._watches:
                    died |= not self._look(self._watches[fd])
            if died:
                with suppress(OSError):  # no descriptor left: the next process that is seen is looked at
                    self._scan()
            while self._news:
                self._watch(self._news.popleft())
            if check_at is not None and self._lying is not None and time.monotonic() >= check_at:
                check_at = None
                self._lying()
                with suppress(OSError):  # closed by somebody else: its owner finds that out
                    self._epoll.modify(self._group, _ONCE)

    def _scan(self) -> None:
        """
        Find the mount namespaces of all processes.
        """
        for name in os.listdir("/proc"):
            if name.isdigit():
                self._watch(int(name))

    def _watch(self, pid: int) -> None:
        """
        Mark what a process sees, and watch its mounts, unless its namespace is known.
        """
        if len(self._namespaces) >= NAMESPACES:
            self._limits["namespaces"] = f"cannot hear mount namespaces beyond the first {NAMESPACES}"
            return
        fds: list[int] = []
        try:
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if namespace in self._namespaces:
                return
            fds.append(os.pidfd_open(pid))
            fds.append(os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
            self._epoll.register(fds[0], select.EPOLLIN)
            self._epoll.register(fds[1], select.EPOLLPRI)
        except OSError:
            for fd in fds:
                os.close(fd)
            return
        self._namespaces[namespace] = pid
        self._watches.update(dict.fromkeys(fds, pid))
        self._look(pid)

    def _look(self, pid: int) -> bool:
        """
        Mark what a process sees now. False: it is dead, and no longer watched.
        """
        try:
            with open(f"/proc/{pid}/mountinfo", "rb", buffering=1 << 20) as file:
                mounts = mountinfo.reachable(mountinfo.decode(file.read()))
            root = "" if pid == os.getpid() else f"/proc/{pid}/root"
            os.stat(f"{root}/")
        except (OSError, DecodeError):
            self._unwatch(pid)
            return False
        done: set[str] = set()
        for mount in mounts:
            if mount.kind not in PSEUDO and mount.device not in done:
                done.add(mount.device)
                self._mark_mount(mount, root + mount.point)
        return bool(mounts)

    def _unwatch(self, pid: int) -> None:
        for fd in [fd for fd, watched in self._watches.items() if watched == pid]:
            del self._watches[fd]
            os.close(fd)  # takes it out of the epoll set too
        for namespace in [namespace for namespace, by in self._namespaces.items() if by == pid]:
            del self._namespaces[namespace]

    def _mark_mount(self, mount: mountinfo.Mount, path: str) -> None:
        if mount.kind not in SLOW and not mount.kind.startswith("fuse"):
            self._mark_path(mount, path, self._mask)
            return
        before = self._slow.get(mount.device)
        if before is not None and before.is_alive():
            return
        self._limits[mount.device] = f"cannot hear programs on {mount.point} ({mount.kind}): no answer yet"
        thread = threading.Thread(target=self._mark_path, args=(mount, path, self._slow_mask), daemon=True)
        self._slow[mount.device] = thread
        thread.start()

    def _mark_path(self, mount: mountinfo.Mount, path: str, mask: int) -> None:
        try:
            libc.fanotify_mark(self._group, libc.FAN_MARK_ADD | libc.FAN_MARK_FILESYSTEM, mask, path)
        except OSError as error:
            if error.errno not in _GONE:
                self._limits[mount.device] = f"cannot hear programs on {mount.point} ({mount.kind}): {error.strerror}"
        else:
            self._limits.pop(mount.device, None)

    def _mark_memory(self) -> None:
        """
        Try the mount of memfds: possible before Linux 6.8.
        """
        memory = os.memfd_create("procwatch")
        try:
            flags = libc.FAN_MARK_ADD | libc.FAN_MARK_FILESYSTEM
            libc.fanotify_mark(self._group, flags, self._mask, f"/proc/self/fd/{memory}")
        except OSError:
            self._limits["memfd"] = "cannot hear programs in memory files (memfd_create)"
        finally:
            os.close(memory)
