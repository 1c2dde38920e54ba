"""
File capabilities: the extended attribute "security.capability" as text, capabilities(7).
"""

from __future__ import annotations

import struct

from procwatch.errors import DecodeError

ATTRIBUTE = "security.capability"

# include/uapi/linux/capability.h, in order.
NAMES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip

_EFFECTIVE = 0x000001
# Revision -> pairs of 32-bit words (permitted, inheritable), and whether the uid of the namespace's root follows.
_REVISIONS = {0x01: (1, False), 0x02: (2, False), 0x03: (2, True)}


def decode(value: bytes) -> str:
    """
    `struct vfs_ns_cap_data` (linux/capability.h) in the form of getcap(8).

    >>> decode(bytes.fromhex("0100000200200000000000000000000000000000"))
    'cap_net_raw=ep'

    Raises:
        DecodeError: Not such an attribute.
    """
    if len(value) < 4:
        raise DecodeError(f"file capabilities of {len(value)} bytes")
    (magic,) = struct.unpack_from("<I", value)
    pairs, has_root = _REVISIONS.get(magic >> 24, (0, False))
    if not pairs or len(value) != 4 + 8 * pairs + 4 * has_root:
        raise DecodeError(f"file capabilities of revision {magic >> 24} in {len(value)} bytes")
    words = struct.unpack_from(f"<{2 * pairs}I", value, 4)
    permitted = sum(word << 32 * place for place, word in enumerate(words[0::2]))
    inheritable = sum(word << 32 * place for place, word in enumerate(words[1::2]))
    groups: dict[str, list[str]] = {}
    for number in range(32 * pairs):
        flags = "i" * (inheritable >> number & 1) + "p" * (permitted >> number & 1)
        if flags:
            groups.setdefault("e" * (magic & _EFFECTIVE) + flags, []).append(name(number))
    text = " ".join(f"{','.join(names)}={flags}" for flags, names in groups.items()) or "="
    return f"{text} [rootid={struct.unpack_from('<I', value, 20)[0]}]" if has_root else text


def name(number: int) -> str:
    """
    A capability's name; its number where the kernel is newer than this table.
    """
    return f"cap_{NAMES[number]}" if number < len(NAMES) else str(number)
