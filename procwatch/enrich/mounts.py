"""
Where cgroups are mounted, so that a directory below /sys/fs/cgroup and a path in /proc/PID/cgroup can be compared.
"""

from __future__ import annotations

from msgspec import Struct

# File systems that answer from memory or a local disk. Others (FUSE, NFS) may make us wait for ever, and a container
# may have mounted one on purpose.
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay"})


class Mount(Struct, frozen=True):
    """
    A line of /proc/PID/mountinfo, proc(5).
    """

    point: str
    root: str  # which part of the file system is mounted; for a cgroup: its path
    kind: str
    options: str  # of the file system: "rw,pids"


def parse(mountinfo: str) -> list[Mount]:
    """
    The mounts in a /proc/PID/mountinfo; lines that are none are left out.
    """
    mounts: list[Mount] = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) >= 5 and rest[0]:
            mounts.append(Mount(_plain(fields[4]), _plain(fields[3]), rest[0], rest[-1]))
    return mounts


def of(pid: int | str = "self") -> list[Mount]:
    """
    The mounts that a process sees; [] when it is gone.
    """
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return parse(file.read())
    except OSError:
        return []


def cgroup_of(directory: str, mounts: list[Mount]) -> str | None:
    """
    The cgroup path of a directory in a cgroup file system.

    >>> cgroup_of("/sys/fs/cgroup/pids/web", [Mount("/sys/fs/cgroup/pids", "/docker/1", "cgroup", "rw,pids")])
    '/docker/1/web'
    """
    best: Mount | None = None
    for mount in mounts:
        if mount.kind not in ("cgroup", "cgroup2") or not is_below(directory, mount.point):
            continue
        if best is None or len(mount.point) > len(best.point):
            best = mount
    if best is None:
        return None
    return (best.root.rstrip("/") + directory[len(best.point.rstrip("/")) :]) or "/"


def directories_of(cgroup: str, mounts: list[Mount]) -> list[str]:
    """
    Where the directory of a cgroup may be found: v2, then systemd's, then the others.
    """
    if ".." in cgroup.split("/"):
        return []  # outside of what our cgroup namespace shows
    ordered = sorted(
        (mount for mount in mounts if mount.kind in ("cgroup", "cgroup2") and is_below(cgroup, mount.root)),
        key=lambda mount: (mount.kind != "cgroup2", "name=systemd" not in mount.options),
    )
    return [mount.point.rstrip("/") + "/" + cgroup[len(mount.root.rstrip("/")) :].lstrip("/") for mount in ordered]


def of_path(path: str, mounts: list[Mount]) -> Mount | None:
    """
    The mount that `path` is on.
    """
    best: Mount | None = None
    for mount in mounts:
        # Of two mounts at one place the later one hides the other.
        if is_below(path, mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def is_local(path: str, mounts: list[Mount]) -> bool:
    """
    Whether reading `path` cannot hang on a server.
    """
    mount = of_path(path, mounts)
    return mount is not None and mount.kind in _LOCAL


def is_below(path: str, directory: str) -> bool:
    """
    Whether `path` is `directory` or is in it.
    """
    return directory == "/" or path == directory or path.startswith(directory + "/")


def _plain(field: str) -> str:
    """
    Without the octal escapes that mountinfo has for blanks and backslashes.
    """
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, char)
    return field
