"""
Directories of cgroup mounts and cgroup paths are told from each other.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich import mounts

HYBRID = """\
24 30 0:22 / /proc rw,nosuid shared:5 - proc proc rw
30 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
31 30 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755
32 31 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw
33 31 0:28 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,name=systemd
34 31 0:29 /docker/1 /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 30 0:40 / /mnt/with\\040blank rw - fuse.sshfs host:/ rw
36 30 0:41 / /srv rw - overlay overlay rw,lowerdir=/a:/b,upperdir=/c,workdir=/d
"""
MOUNTS = mounts.parse(HYBRID)


def test_lines() -> None:
    """
    Mount point, root, type and options of each line; escapes are undone.
    """
    assert len(MOUNTS) == 8
    assert MOUNTS[6] == mounts.Mount("/mnt/with blank", "/", "fuse.sshfs", "rw")
    assert MOUNTS[5].root == "/docker/1"


def test_cgroup_of_a_directory() -> None:
    """
    The mount point is taken off, and what is mounted there is put before.
    """
    assert mounts.cgroup_of("/sys/fs/cgroup/unified/web", MOUNTS) == "/web"
    assert mounts.cgroup_of("/sys/fs/cgroup/cpu,cpuacct/a/b", MOUNTS) == "/docker/1/a/b"
    assert mounts.cgroup_of("/sys/fs/cgroup/unified", MOUNTS) == "/"
    assert mounts.cgroup_of("/sys/fs/cgroup/unifiedx/web", MOUNTS) is None
    assert mounts.cgroup_of("/tmp", MOUNTS) is None


def test_directories_of_a_cgroup() -> None:
    """
    A cgroup may be in several hierarchies: v2 comes first; one that is not mounted here has none.
    """
    assert mounts.directories_of("/docker/1/x", MOUNTS) == [
        "/sys/fs/cgroup/unified/docker/1/x",
        "/sys/fs/cgroup/systemd/docker/1/x",
        "/sys/fs/cgroup/cpu,cpuacct/x",
    ]
    assert mounts.directories_of("/../other", MOUNTS) == []


def test_local() -> None:
    """
    Only file systems that cannot make us wait are local.
    """
    assert mounts.is_local("/var/lib", MOUNTS)
    assert mounts.is_local("/srv/x", MOUNTS)
    assert not mounts.is_local("/mnt/with blank/x", MOUNTS)
    assert not mounts.is_local("/x", [])


@given(st.text())
def test_any_text(text: str) -> None:
    """
    Any text is some mounts or none.
    """
    mounts.parse(text)


def test_this_process() -> None:
    """
    The machine's own mounts are read; a process that is gone has none.
    """
    assert any(mount.point == "/proc" for mount in mounts.of())
    assert mounts.of(2**31 - 1) == []
