"""
The user inside a user namespace, the login's session, and facts about the file that ran: looked up once for each kind
of process.

Of the file only when asked for: each first sight costs one or two stat(2), and a stat on a dead network file system
waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from procwatch.enrich.files import Files
from procwatch.enrich.hashes import REFUSED, Hash, Hasher
from procwatch.enrich.users import inside, parse_id_map
from procwatch.facts import Details
from procwatch.sources import procfs

INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # include/linux/proc_ns.h
MAX_NAMESPACES: Final = 4096


class Inspector:
    """
    Fills what the file system knows into details.

    Args:
        files: Owner, mode, capabilities, overlay.
        hashes: SHA-256 of the file, by a worker: `pending()` until it is done.
        on_ready: Called from the worker when a hash is done.
    """

    def __init__(self, *, files: bool, hashes: bool, on_ready: Callable[[], None] | None = None) -> None:
        self._files = Files() if files else None
        self._hasher = Hasher(on_ready=on_ready) if hashes else None
        self._maps: dict[int, list[tuple[int, int, int]]] = {}

    def inspect(self, pid: int, details: Details) -> None:
        """
        Look at the executable of `pid`, unless these details were looked at before.
        """
        details.inspected = True
        if details.uid is not None:
            details.ns_uid = self._uid_inside(pid, _user_namespace(pid, details), details.uid)
        if details.auid is not None and details.audit_session is None:
            details.audit_session = procfs.audit_session(pid)
        if details.exe is None or details.exe_memfd:
            return
        if self._files is not None:
            found = self._files.get(pid, details.exe, details.exe_dev, details.exe_inode)
            if found is not None:
                details.exe_owner, details.exe_mode = found.owner, found.mode
                details.exe_capabilities, details.exe_upper = found.capabilities, found.upper
        if self._hasher is not None:
            details.hash = self._hasher.of(pid, details.exe, details.exe_dev, details.exe_inode)
            details.inspected = details.hash is not REFUSED

    def pending(self, details: Details) -> bool:
        """
        Whether the hash is still being computed.
        """
        return isinstance(details.hash, Hash) and not (details.hash.done or details.hash is REFUSED)

    @property
    def refused(self) -> int:
        """
        Hashes that were not computed because too many files waited.
        """
        return self._hasher.refused if self._hasher is not None else 0

    def close(self) -> None:
        """
        End the worker.
        """
        if self._hasher is not None:
            self._hasher.close()

    def _uid_inside(self, pid: int, namespace: int | None, uid: int) -> int | None:
        """
        The user's number within the process's user namespace (uid_map in user_namespaces(7)).
        """
        if namespace is None or namespace == INITIAL_USER_NAMESPACE:
            return None
        rows = self._maps.get(namespace)
        if rows is None:
            try:
                fd = os.open(f"/proc/{pid}/uid_map", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            try:
                rows = parse_id_map(os.read(fd, 1 << 16))
            except OSError:
                return None
            finally:
                os.close(fd)
            if len(self._maps) >= MAX_NAMESPACES:
                self._maps.clear()
            self._maps[namespace] = rows
        return inside(uid, rows)


def _user_namespace(pid: int, details: Details) -> int | None:
    """
    The inode number of its user namespace: as the kernel told it, else while the process lives.
    """
    if details.namespaces is not None:
        return details.namespaces.get("user")
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino
    except OSError:
        return None
