"""
What of this host bears on watching it: limits, other agents, what hides processes. For `procwatch doctor`.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator

from msgspec import Struct

from procwatch.sources import procfs
from procwatch.sources.ebpf import loader

# enum bpf_cmd, bpf(2)
_PROG_GET_NEXT_ID, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 11, 13, 15
_PROGRAM_NAME = slice(64, 80)  # in struct bpf_prog_info
_MOST_PROGRAMS = 1000
_CAPABILITIES = {12: "net_admin", 19: "sys_ptrace", 21: "sys_admin", 37: "audit_read", 38: "perfmon", 39: "bpf"}
_INITIAL = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}  # include/linux/proc_ns.h
_WATCHERS = ("auditd", "falco", "tetragon", "osqueryd", "sysdig", "execsnoop", "forkstat", "bpftrace", "laurel")
_ENOUGH = 8 << 20  # bytes of a socket buffer: 10,000 events


class Note(Struct, frozen=True):
    """
    One finding; an empty remedy when nothing need be done.
    """

    topic: str
    text: str
    remedy: str = ""


def notes() -> list[Note]:
    """
    All findings, each cheap.
    """
    found: list[Note] = []
    for part in (_capabilities, _namespaces, _hidden, _buffers, _fanotify, _files, _lockdown, _others, _programs):
        found += part()
    return found


def user() -> str:
    """
    Whom this runs as.
    """
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _held() -> set[str]:
    status = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    effective = int(status.get("CapEff", "0"), 16)
    return {name for bit, name in _CAPABILITIES.items() if effective >> bit & 1}


def _capabilities() -> Iterator[Note]:
    held = _held()
    lacking = [name for name in _CAPABILITIES.values() if name not in held]
    if not lacking:
        yield Note("capabilities", "all that any source needs")
        return
    yield Note(
        "capabilities",
        f"cap_{', cap_'.join(lacking)} missing",
        "run as root, or give a service AmbientCapabilities=CAP_BPF CAP_PERFMON CAP_SYS_PTRACE",
    )


def _namespaces() -> Iterator[Note]:
    for kind, initial in _INITIAL.items():
        try:
            inode = os.stat(f"/proc/self/ns/{kind}").st_ino
        except OSError:
            continue
        if inode != initial:
            yield Note("namespaces", f"this is not the host's {kind} namespace", f"share the host's {kind} namespace")


def _hidden() -> Iterator[Note]:
    if procfs.hidden():
        yield Note(
            "hidepid",
            "/proc hides the processes of other users",
            "mount -o remount,hidepid=0 /proc, or run with the group that its option gid= names",
        )


def _buffers() -> Iterator[Note]:
    most = _number("/proc/sys/net/core/rmem_max")
    if "net_admin" not in _held() and most is not None and most < _ENOUGH:
        yield Note(
            "net.core.rmem_max",
            f"socket buffers are limited to {most} bytes, which a storm fills in {most / 832 / 10:.0f} ms",
            f"sysctl net.core.rmem_max={_ENOUGH}, or grant CAP_NET_ADMIN",
        )


def _fanotify() -> Iterator[Note]:
    groups = _number("/proc/sys/fs/fanotify/max_user_groups")
    queued = _number("/proc/sys/fs/fanotify/max_queued_events")
    if groups is not None and queued is not None:
        yield Note("fs.fanotify", f"{groups} groups a user, {queued} queued events (as root the queue is unlimited)")


def _files() -> Iterator[Note]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < 4096:
        yield Note("open files", f"limited to {limit}; the scan keeps one for each process", "ulimit -n 65536")


def _lockdown() -> Iterator[Note]:
    text = _read("/sys/kernel/security/lockdown")
    if "[confidentiality]" in text:
        yield Note(
            "lockdown", "confidentiality: no program may read the kernel's memory", "boot with lockdown=integrity"
        )
    if _read("/proc/sys/kernel/unprivileged_bpf_disabled") == "0":
        yield Note("bpf", "any user may load BPF programs", "sysctl kernel.unprivileged_bpf_disabled=2")


def _others() -> Iterator[Note]:
    names = {state.comm for pid in procfs.pids() if (state := procfs.stat(pid)) is not None}
    for name in _WATCHERS:
        if name in names:
            yield Note("beside us", f"{name} runs; both work, each costs the host its own share")
    if "auditd" in names and "audit_read" in _held():
        yield Note("audit", "procwatch never changes audit rules and leaves auditd its subscription")


def _programs() -> Iterator[Note]:
    """
    Names of the BPF programs that are loaded; only CAP_SYS_ADMIN may ask.
    """
    names: list[str] = []
    identity = 0
    try:
        while len(names) < _MOST_PROGRAMS:
            answer = loader.bpf(_PROG_GET_NEXT_ID, struct.pack("<III", identity, 0, 0), "list programs")[1]
            (identity,) = struct.unpack_from("<I", answer, 4)
            names.append(_program_name(identity))
    except loader.LoadError:  # ENOENT: that was the last; or we may not ask
        pass
    if names:
        shown = ", ".join(sorted({name for name in names if name})[:8])
        yield Note("other eBPF", f"{len(names)} programs are loaded" + (f": {shown}" if shown else ""))


def _program_name(identity: int) -> str:
    import ctypes

    fd = loader.bpf(_PROG_GET_FD_BY_ID, struct.pack("<III", identity, 0, 0), "open a program")[0]
    try:
        info = ctypes.create_string_buffer(_PROGRAM_NAME.stop)
        question = struct.pack("<IIQ", fd, len(info), ctypes.addressof(info))
        loader.bpf(_OBJ_GET_INFO_BY_FD, question, "describe a program")
        return info.raw[_PROGRAM_NAME].split(b"\0")[0].decode("ascii", "replace")
    finally:
        os.close(fd)
