"""
/proc/PID/mountinfo, and which mounts a path leads to.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import DecodeError
from procwatch.wire import mountinfo
from procwatch.wire.mountinfo import Mount

TEXT = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,mode=755
26 24 0:24 / /dev/pts rw,relatime shared:3 - devpts devpts rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
29 26 0:26 / /dev/pts rw,relatime - devpts devpts rw
84 27 0:39 /sub /mnt/a\040b\134c rw shared:1 master:2 - fuse.sshfs host:/x rw
"""


class TestDecode:
    def test_fields(self) -> None:
        """
        Number, parent, device, mount point with escapes undone, and type, whatever optional fields stand between.
        """
        mounts = mountinfo.decode(TEXT)

        assert Mount(27, 1, "254:0", "/", "ext4") == mounts[3]
        assert Mount(84, 27, "0:39", "/mnt/a b\\c", "fuse.sshfs") == mounts[5]

    @pytest.mark.parametrize("line", [b"x", b"1 2 0:1 / /", b"a 2 0:1 / / rw - ext4 x rw", b"1 2 0:1 / / rw ext4 x rw"])
    def test_other_lines_are_refused(self, line: bytes) -> None:
        """
        A line without the kernel's fields is refused.
        """
        with pytest.raises(DecodeError):
            mountinfo.decode(line)

    @given(st.binary() | st.text("0123456789 -:/\\abc\n").map(str.encode))
    def test_any_bytes(self, data: bytes) -> None:
        """
        Whatever comes, there are mounts or a DecodeError, and each reachable one is among them.
        """
        try:
            mounts = mountinfo.decode(data)
        except DecodeError:
            return

        assert all(mount in mounts for mount in mountinfo.reachable(mounts))


class TestReachable:
    def test_mounted_over_is_hidden(self) -> None:
        """
        Of two mounts on one point the later is reached.
        """
        assert [mount.id for mount in mountinfo.reachable(mountinfo.decode(TEXT))] == [22, 24, 27, 29, 84]

    def test_below_a_covered_directory_is_hidden(self) -> None:
        """
        A mount on /a hides one on /a/b that was there before, and shows one that was mounted on top of it.
        """
        root = Mount(1, 0, "8:1", "/", "ext4")
        below, cover, above = (
            Mount(2, 1, "0:2", "/a/b", "tmpfs"),
            Mount(3, 1, "0:3", "/a", "tmpfs"),
            Mount(4, 3, "0:4", "/a/b", "tmpfs"),
        )

        assert [root, cover, above] == mountinfo.reachable([root, below, cover, above])

    def test_no_root(self) -> None:
        """
        Without a mount on / nothing is reached: a process whose root is no mount point.
        """
        assert mountinfo.reachable([Mount(2, 1, "0:2", "/a", "tmpfs")]) == []
