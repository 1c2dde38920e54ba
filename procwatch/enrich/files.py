"""
What the file system says of an executable: owner, mode, capabilities, and whether a container changed it.
"""

from __future__ import annotations

import os
import stat

from msgspec import Struct

from procwatch.enrich import capabilities, mounts
from procwatch.enrich.tree import Tree
from procwatch.errors import DecodeError

MAX_FILES = 8192


class FileFacts(Struct, frozen=True):
    """
    Facts of one file, as it is now.
    """

    owner: int  # host uid
    group: int
    mode: str  # octal, with setuid, setgid and sticky: "4755"
    capabilities: str | None  # as getcap(8) writes them
    upper: bool | None  # of an overlay: in the upper layer, so not as it is in the image; None: not on an overlay

    @property
    def setuid(self) -> bool:
        """
        Whether it runs as its owner.
        """
        return bool(int(self.mode, 8) & stat.S_ISUID)

    @property
    def setgid(self) -> bool:
        """
        Whether it runs as its group.
        """
        return bool(int(self.mode, 8) & stat.S_ISGID)


def find(pid: int, path: str | None, dev: int | None, inode: int | None) -> tuple[str, os.stat_result] | None:
    """
    A path by which the executable of a process can be opened now, and what it is: /proc/PID/exe, or `path`.

    The process may be gone, or run something else: /proc/PID/exe is believed when its device and inode are those that
    were reported, or else its path is (an overlay or btrfs reports other numbers to stat(2) than the kernel has).
    `path` is believed only by device and inode.
    """
    link = f"/proc/{pid}/exe"
    try:
        found = os.stat(link)
        if (found.st_dev, found.st_ino) == (dev, inode) or (path is not None and os.readlink(link) == path):
            return link, found
    except OSError:
        pass
    if path is None or inode is None or not path.startswith("/"):
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (path, found) if (found.st_dev, found.st_ino) == (dev, inode) else None


class Files:
    """
    File facts, remembered by device, inode and change time: a change of mode, owner or content changes that time.

    One stat(2) for a file that is known; some 0.1 ms for one that is new. At most `capacity` files are remembered,
    then all are forgotten.
    """

    def __init__(self, capacity: int = MAX_FILES) -> None:
        self._capacity = capacity
        self._facts: dict[tuple[int, int, int], FileFacts] = {}

    def get(self, pid: int, path: str | None, dev: int | None = None, inode: int | None = None) -> FileFacts | None:
        """
        Facts of the file that process `pid` runs, reported as `path`; None where it can not be had any more.
        """
        found = find(pid, path, dev, inode)
        if found is None:
            return None
        place, state = found
        key = (state.st_dev, state.st_ino, state.st_ctime_ns)
        facts = self._facts.get(key)
        if facts is None:
            if len(self._facts) >= self._capacity:
                self._facts.clear()
            facts = self._facts[key] = _read(place, state, pid, path)
        return facts


def _read(place: str, state: os.stat_result, pid: int, path: str | None) -> FileFacts:
    # Overlays have a device number without a driver (major 0), and so need not be looked for on an ordinary disk.
    upper = is_upper(pid, path) if path and os.major(state.st_dev) == 0 else None
    mode = f"{stat.S_IMODE(state.st_mode):04o}"
    return FileFacts(state.st_uid, state.st_gid, mode, _capabilities(place), upper)


def _capabilities(path: str) -> str | None:
    try:
        return capabilities.decode(os.getxattr(path, capabilities.ATTRIBUTE))
    except (OSError, DecodeError):
        return None


def is_upper(pid: int, path: str) -> bool | None:
    """
    Whether `path`, as process `pid` sees it, lies in the upper layer of an overlay. None: not on an overlay.

    stat(2) does not tell: overlayfs keeps device and inode across the copy from the lower layer. The mount's options
    do: they name the upper directory, and the overlay shows a file from there exactly when it is there (overlayfs.rst).
    The directory is named as the mounter saw it, which for container engines is the host's root.
    """
    mount = mounts.of_path(path, mounts.of(pid))
    if mount is None or mount.kind != "overlay":
        return None
    options = dict(option.partition("=")[::2] for option in mount.options.split(","))
    directory = options.get("upperdir")
    if directory is None:
        return False  # read-only: there are only lower layers
    within = mount.root.rstrip("/") + "/" + path[len(mount.point.rstrip("/")) :].lstrip("/")
    try:
        with Tree(directory, foreign=True) as tree:
            found = tree.stat(within.lstrip("/"))
    except OSError:
        return None
    return found is not None and stat.S_ISREG(found.st_mode)
