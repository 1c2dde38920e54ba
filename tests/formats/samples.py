"""
One event of each shape, and the golden files made of them: `python -m tests.formats.samples` writes those anew.
"""

from __future__ import annotations

from pathlib import Path

from procwatch import __version__, events
from procwatch.clock import Clock
from procwatch.events import Container, Event, Parent, Pod, Skipped
from procwatch.facts import Details
from procwatch.formats import FORMATS
from procwatch.table.draft import FORKED, Draft, End, Failed, Maker, Tracer, Via, Who

GOLDEN = Path(__file__).parent / "golden"
NOW_NS = 1_700_000_000_123_456_789
POD = Pod("0f1e2d3c-aaaa-bbbb-cccc-1234567890ab", "shop", "web-0", "nginx", {"app": "web"})
CONTAINER = Container(
    "4c01db0b339c" * 5 + "abcd",
    "containerd",
    "web",
    "nginx:1.27",
    POD,
    image_id="sha256:ab12",
    labels={"tier": "front"},
)
PARENT = Parent("e470cff3-1-12", 1, "/usr/lib/systemd/systemd", "systemd")


class Names:
    """
    Users and containers as a host with one of each has them.
    """

    generation = 1

    def user(self, uid: int | None) -> str | None:
        """
        The only one.
        """
        return {0: "root", 33: "www-data"}.get(-1 if uid is None else uid)

    def place(self, cgroup: str | None) -> tuple[Container | None, str | None, int | None]:
        """
        By the path's beginning.
        """
        if cgroup is None:
            return None, None, None
        if cgroup.startswith("/kubepods"):
            return CONTAINER, None, None
        return None, "cron.service", None

    def pending(self, cgroup: str | None) -> bool:
        """
        Never.
        """
        return False

    unclear = pending


MAKER = Maker("web-1", Clock(offset_ns=NOW_NS), Names())
NGINX = Details(
    exe="/usr/sbin/nginx", exe_deleted=False, file="nginx", comm="nginx", cwd="/", uid=0, gid=0, euid=33, egid=33,
    tty="", session=1, cgroup="/kubepods/pod0f1e2d3c/4c01db0b", exe_dev=66306, exe_inode=4711, exe_size=1_234_567,
    namespaces={"pid": 4026532758, "mnt": 4026532755}, auid=1000, privileges=["setuid"],
)  # fmt: skip
SHELL = Details(
    exe="/usr/bin/dash", exe_deleted=False, file="./job", script="/srv/job", comm="job", cwd="/srv", uid=33, gid=33,
    euid=33, egid=33, tty="pts/0", session=7, cgroup="/system.slice/cron.service",
)  # fmt: skip
GONE = Details(ppid=1, comm="a=b\n\x1b[2J")
ODD = Details(exe='/tmp/\udcff "x"', comm="odd", uid=0)


def draft(kind, known, argv, tail=None, missing=None, inferred=(), ns_pid=None, ancestors=None) -> Draft:
    """
    A draft of process 4242.
    """
    who = Who("e470cff3-4242-269569", 4242, 1, argv, False, PARENT, ns_pid=ns_pid, ancestors=ancestors)
    return Draft(kind, 1_000_000_000, who, known, missing or {}, inferred, tail)


DRAFTS = [
    draft(events.Exec, NGINX, ["nginx", "-g", "daemon off;"], FORKED, ns_pid=17, ancestors=[PARENT]),
    draft(events.Exec, SHELL, ["sh", "./job", "it's", ""]),
    draft(events.Exec, GONE, None, missing={"exe": "exited", "argv": "exited"}, inferred=["uid", "cwd"]),
    draft(events.Exec, ODD, ["odd\n", "\udcff"]),
    draft(events.Fork, SHELL, ["sh", "./job"]),
    draft(events.Running, NGINX, ["nginx"], Via("snapshot")),
    draft(events.Exit, SHELL, ["sh", "./job"], End(3, None, False, 1_500_000, 1_000_000, 0, 1 << 20, 512, 0)),
    draft(events.Exit, NGINX, ["nginx"], End(None, 11, True, 9_000_000_000, None, None, None)),
    draft(events.ExecFailed, Details(file="/no/such", uid=33, comm="sh"), ["sh"], Failed(2, "ENOENT")),
    draft(events.Ptrace, SHELL, ["sh"], Tracer(99)),
    draft(events.Uid, SHELL, ["sh"]),
]
TIME = MAKER.clock.stamp(2_000_000_000)
OTHERS: list[Event] = [
    events.Ready(
        time=TIME, host="web-1", boot_id="e470cff3-0000-4000-8000-000000000000", version="1.2.3", backend="ebpf",
        sources=["ebpf"], skipped=[Skipped("fanotify", "not needed", "")], kernel="6.18.0",
    ),
    events.ContainerEvent(time=TIME, host="web-1", container=CONTAINER, cgroup="/kubepods/x"),
    events.Lost(time=TIME, host="web-1", count=12, exact=True, where="ring_buffer", since=TIME, until=TIME,
                kinds={"exec": 12}),
    events.Stop(time=TIME, host="web-1", counts={"exec": 4}, lost=12, duration_ns=5_000_000_000, cpu_ns=9_000_000,
                max_rss_bytes=40 << 20),
]  # fmt: skip
EVENTS: list[Event] = [*map(MAKER.event, DRAFTS), *OTHERS]


def lines(form: str) -> bytes:
    """
    All of them in one format.
    """
    encode_into = FORMATS[form](MAKER)
    buffer = bytearray()
    items: list[Event | Draft] = [*DRAFTS, *OTHERS]
    for item in items:
        encode_into(item, buffer)
    return bytes(buffer).replace(b'"%b"' % __version__.encode(), b'"VERSION"')


if __name__ == "__main__":
    for name in ("json", "ecs", "otel", "logfmt"):
        (GOLDEN / f"{name}.txt").write_bytes(lines(name))
