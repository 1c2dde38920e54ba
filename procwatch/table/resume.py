"""
A process that an earlier run of the agent knew, and that still lives: what was known of it, and what /proc says now.
"""

from __future__ import annotations

from procwatch.facts import Details
from procwatch.table.process import Process, inherit

# What /proc cannot tell of a program that runs already; the rest is as /proc says now.
_KEPT = (
    "file", "script", "cwd", "uid", "gid", "euid", "egid", "tty", "session", "cgroup", "exe", "exe_deleted", "argv",
    "comm", "exe_dev", "exe_inode", "exe_size", "exe_memfd", "namespaces", "auid", "privileges", "audit_session",
    "exe_owner", "exe_mode", "exe_capabilities", "exe_upper", "hash", "ns_uid",
)  # fmt: skip


def go_on(process: Process, now: Details) -> bool:
    """
    Take what /proc says now.

    Returns:
        Whether it still runs the same executable. If not, it executed another one while nobody looked.
    """
    before = process.details
    same = _agree(before.exe, now.exe)
    if same and _agree(process.argv, now.argv):
        inherit(before, now, _KEPT, inferred=False)
        now.inspected = before.inspected
        if now.argv is None and process.argv is not None:  # a source in the kernel told it of this process alone
            now.argv, now.argv_truncated = process.argv, process.argv_truncated
            now.missing = {name: why for name, why in now.missing.items() if name != "argv"}
    process.set_details(now)
    return same


def _agree(before: object, now: object) -> bool:
    return before is None or now is None or before == now
