"""
Give back what is not needed once the sources are open.

Opening a source is what needs privileges: a ring, a socket or a mark that is open stays open. What has to be looked at
later is /proc of other users' processes (CAP_SYS_PTRACE) and the files of container runtimes (CAP_DAC_READ_SEARCH);
these two are kept, if we have them, and all others go, for good: from the permitted, inheritable, ambient and bounding
sets, with no_new_privs (prctl(2), capabilities(7)).

Capabilities belong to threads. Those that sources have started before keep theirs: the one that marks filesystems which
are mounted later cannot do that without CAP_SYS_ADMIN, and the process of hold mode reads memory. All threads that are
started later have no more than the one that calls this.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct

from procwatch.errors import ConfigError

CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
KEPT = frozenset({"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"})
# Before Linux 5.19 an open map cannot be read without it where unprivileged_bpf_disabled is set.
BPF_READERS = (5, 19)

_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 8, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522  # of struct __user_cap_header_struct: two words for each set
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# By architecture, the generic numbers being those of all newer ones: include/uapi/asm-generic/unistd.h. The functions
# of the C library would change all threads; see above.
_SYSCALLS = {"x86_64": (125, 126, 116, 117, 119)}.get(os.uname().machine, (90, 91, 159, 147, 149))
_CAPGET, _CAPSET, _SETGROUPS, _SETRESUID, _SETRESGID = _SYSCALLS


def needed(sources: list[str], release: str) -> frozenset[str]:
    """
    What must be kept for the sources that are open.

    >>> sorted(needed(["ebpf"], "5.17.1")), sorted(needed(["ebpf"], "6.1.0"))
    (['CAP_BPF', 'CAP_DAC_READ_SEARCH', 'CAP_SYS_PTRACE'], ['CAP_DAC_READ_SEARCH', 'CAP_SYS_PTRACE'])
    """
    major, minor = (int("".join(filter(str.isdecimal, part)) or 0) for part in release.split(".")[:2])
    kept = set(KEPT)
    if "ebpf" in sources and (major, minor) < BPF_READERS:
        kept.add("CAP_BPF")
    if "hold" in sources:  # its process is root's, and one that does not leave must be ended
        kept.add("CAP_KILL")
    return frozenset(kept)


def drop(keep: frozenset[str], user: str = "") -> list[str]:
    """
    Give back all capabilities but `keep` (of which none is gained), for this thread and those it will start.

    Args:
        keep: Names of capabilities.
        user: Go on as this user and its groups; "": stay who we are. Takes CAP_SETUID and CAP_SETGID.

    Returns:
        What is left.

    Raises:
        ConfigError: No such user, or the user cannot be changed.
    """
    has = permitted()
    left = has & keep
    if "CAP_SETPCAP" in has:
        for number in range(len(CAPABILITIES)):
            if CAPABILITIES[number] not in left:
                _prctl(_PR_CAPBSET_DROP, number)  # EINVAL for those that this kernel does not know
    if user:
        _become(user)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    mask = sum(1 << CAPABILITIES.index(name) for name in left)
    words = [mask & 0xFFFFFFFF, mask & 0xFFFFFFFF, 0, mask >> 32, mask >> 32, 0]  # effective, permitted, inheritable
    _capability(_CAPSET, struct.pack("=6I", *words))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return sorted(left)


def permitted() -> frozenset[str]:
    """
    The capabilities that this thread may use.
    """
    data = struct.unpack("=6I", _capability(_CAPGET, bytes(24)))
    mask = data[1] | data[4] << 32
    return frozenset(name for number, name in enumerate(CAPABILITIES) if mask >> number & 1)


def _become(user: str) -> None:
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"no user {user!r}: add it, or leave `user` out") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    _prctl(_PR_SET_KEEPCAPS, 1)
    try:
        _syscall(_SETGROUPS, len(groups), (ctypes.c_uint32 * len(groups))(*groups))
        _syscall(_SETRESGID, entry.pw_gid, entry.pw_gid, entry.pw_gid)
        _syscall(_SETRESUID, entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        raise ConfigError(f"cannot become user {user!r}: {error.strerror}: start as root") from error


def _capability(call: int, data: bytes) -> bytes:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    buffer = ctypes.create_string_buffer(data, len(data))
    _syscall(call, header, buffer)
    return buffer.raw


def _syscall(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
