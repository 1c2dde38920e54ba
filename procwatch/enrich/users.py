"""
Names of users, and numbers of users within user namespaces.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable

from procwatch.enrich.worker import Worker

_MAX_PASSWD = 4 << 20  # bytes; more is a directory service's export, and the name service has it too
_MAX_USERS = 100_000
_RECHECK_S = 1.0


class Users:
    """
    uid -> name: /etc/passwd at once, everything else (LDAP, sssd, systemd's dynamic users) by a worker.

    Not for threads: one thread asks. The worker only asks the name service, which may take seconds.

    Args:
        worker: Runs the name service.
        changed: Called, from either thread, when a name that was asked for before has become known.
        file: In the form of passwd(5).
    """

    def __init__(
        self,
        worker: Worker,
        file: str = "/etc/passwd",
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker = worker
        self._changed = changed
        self._file = file
        self._clock = clock
        self._names: dict[int, str | None] = {}
        self._version: tuple[int, int, int] | None = None
        self._checked = float("-inf")

    def name(self, uid: int) -> str | None:
        """
        The user's name, or None while it is unknown.
        """
        name = self._names.get(uid)
        return name if name is not None else self._missed(uid)

    def _missed(self, uid: int) -> str | None:
        now = self._clock()
        if now - self._checked >= _RECHECK_S:
            self._checked = now
            self._reread()
        if uid not in self._names:
            if len(self._names) >= _MAX_USERS:
                self._names.clear()
                self._version = None
            self._names[uid] = None
            self._worker.submit(lambda: self._ask(uid))
        return self._names[uid]

    def _reread(self) -> None:
        """
        Take the file in again when it is another one: users that were unknown are asked for anew.
        """
        try:
            with open(self._file, "rb") as file:
                state = os.fstat(file.fileno())
                version = (state.st_ino, state.st_mtime_ns, state.st_size)
                if version == self._version:
                    return
                self._version = version
                content = file.read(_MAX_PASSWD)
        except OSError:
            return
        self._names = dict(parse_passwd(content))
        self._changed()

    def _ask(self, uid: int) -> None:
        try:
            name = pwd.getpwuid(uid).pw_name
        except (KeyError, OverflowError):
            return
        names = self._names
        if names.get(uid) is None:
            names[uid] = name
            self._changed()


def parse_passwd(content: bytes) -> dict[int, str]:
    """
    Names by uid in a passwd(5) file; the first of several wins, as it does for getpwuid(3). Other lines are left out.
    """
    names: dict[int, str] = {}
    for line in content.splitlines():
        fields = line.split(b":")
        if len(fields) >= 7 and fields[0] and fields[2].isdigit() and len(fields[2]) <= 10:
            names.setdefault(int(fields[2]), fields[0].decode("utf-8", "surrogateescape"))
    return names


def parse_id_map(content: bytes) -> list[tuple[int, int, int]]:
    """
    The rows of /proc/PID/uid_map or gid_map, user_namespaces(7): first id inside, first id outside, how many.

    "Outside" is the user namespace of the reader: the host's ids, when the agent is on the host.
    """
    rows: list[tuple[int, int, int]] = []
    for line in content.splitlines():
        fields = line.split()
        if len(fields) == 3 and all(field.isdigit() and len(field) <= 10 for field in fields):
            rows.append((int(fields[0]), int(fields[1]), int(fields[2])))
    return rows


def inside(uid: int, id_map: list[tuple[int, int, int]]) -> int | None:
    """
    What a host's uid is within the namespace of `id_map`; None where it has no number there.

    >>> inside(100_033, [(0, 100_000, 65_536)])
    33
    """
    for first_inside, first_outside, count in id_map:
        if first_outside <= uid < first_outside + count:
            return first_inside + uid - first_outside
    return None
