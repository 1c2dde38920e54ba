"""
Real containers: id, runtime, name and image come from the cgroup of a process inside and the files of its runtime.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from procwatch.enrich.enricher import Enricher
from procwatch.enrich.runtimes import Roots
from procwatch.events import Container
from tests.conftest import need

PODMAN = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000", "--network=none")
LINES = ("pids", "memory", "cpu", "cpuacct", "cpuset", "devices", "freezer", "blkio")


def need_programs(*programs: str) -> None:
    """
    Go on only as root and with these programs.
    """
    need(os.geteuid() == 0, "containers are made by root")
    for program in programs:
        need(shutil.which(program), f"{program} is not installed")


def cgroup_of(text: str) -> str:
    """
    The path in a /proc/PID/cgroup that says most.
    """
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in text.splitlines() if line.count(":") >= 2}
    for controller in ("", "name=systemd", *LINES):
        if paths.get(controller, "/") != "/":
            return paths[controller]
    return "/"


class Seen:
    """
    An enricher, and what it announces.
    """

    def __init__(self, roots: Roots) -> None:
        self.ready = threading.Event()
        self.enricher = Enricher(roots=roots, on_ready=self.ready.set)
        self.announced: list[tuple[Container, str]] = []

    def container(self, cgroup: str) -> Container | None:
        """
        The container of a cgroup, when all is known of it.
        """
        self.enricher.place(cgroup)
        while self.enricher.pending(cgroup):
            assert self.ready.wait(30)
            self.ready.clear()
            self.announced += self.enricher.collect()
        return self.enricher.place(cgroup)[0]


@pytest.fixture
def look() -> Iterator[Callable[[Roots], Seen]]:
    """
    Enrichers that end with the test.
    """
    with ExitStack() as stack:

        def make(roots: Roots) -> Seen:
            seen = Seen(roots)
            stack.callback(seen.enricher.close)
            return seen

        yield make


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A root file system with a static busybox in it.
    """
    need_programs("busybox")
    root = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "proc", "sys", "dev", "tmp", "run", "etc"):
        (root / name).mkdir()
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for applet in ("sh", "cat", "sleep", "true"):
        (root / "bin" / applet).symlink_to("busybox")
    return root


def bundle(directory: Path, rootfs: Path, *argv: str, **spec: object) -> Path:
    """
    What runc runs: a directory with the configuration of one container.
    """
    directory.mkdir(parents=True)
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": list(argv), "rlimits": []}
    config["root"] = {"path": str(rootfs), "readonly": False}
    config |= spec
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextmanager
def running(*argv: str | Path) -> Iterator[list[str]]:
    """
    A program in a container that prints its cgroups and a line "ready", and ends when its input does.
    """
    process = subprocess.Popen([*map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if lines[-1] == "ready":
                break
        assert lines[-1:] == ["ready"], lines
        yield lines[:-1]
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


SHOW = "cat /proc/self/cgroup; echo ready; cat >/dev/null"
SHOW_IN_CTR = "PATH=/bin; " + SHOW  # an imported image has no PATH, and ctr adds none


def test_plain_runc(tmp_path: Path, rootfs: Path, look: Callable[[Roots], Seen]) -> None:
    """
    A container of plain runc, whose cgroup does not look like one, is found by its state.
    """
    need_programs("runc")
    name = f"procwatch-{os.getpid()}"
    path = bundle(
        tmp_path / "bundle", rootfs, "sh", "-c", SHOW, annotations={"org.opencontainers.image.ref.name": "busy:1"}
    )
    seen = look(Roots())
    with running("runc", "run", "--bundle", path, name) as lines:
        cgroup = cgroup_of("\n".join(lines))
        container = seen.container(cgroup)
    assert container is not None
    assert (container.id, container.runtime, container.name, container.image) == (name, "runc", name, "busy:1")
    assert container.created is not None
    assert seen.announced == [(container, cgroup)]


def test_any_cgroup_that_runc_was_told(tmp_path: Path, rootfs: Path, look: Callable[[Roots], Seen]) -> None:
    """
    The user's own cgroup path makes no difference, nor do directories within it.
    """
    need_programs("runc")
    name = f"procwatch-{os.getpid()}"
    spec = json.loads((bundle(tmp_path / "plain", rootfs, "sh", "-c", SHOW) / "config.json").read_text())
    linux = spec["linux"] | {"cgroupsPath": f"/procwatch-test-{os.getpid()}/deep/{name}"}
    path = bundle(tmp_path / "bundle", rootfs, "sh", "-c", SHOW, linux=linux)
    seen = look(Roots())
    with running("runc", "run", "--bundle", path, name) as lines:
        cgroup = cgroup_of("\n".join(lines))
        container = seen.container(cgroup + "/system.slice/inner.service")
        around = seen.container(cgroup.rpartition("/")[0])
    for directory in Path("/sys/fs/cgroup").glob(f"*/procwatch-test-{os.getpid()}"):
        (directory / "deep").rmdir()
        directory.rmdir()
    assert container is not None
    assert container.id == name
    assert around is None


# What runc needs to make a container, and what the one that it makes may have.
CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "MKNOD", "NET_ADMIN", "SETPCAP", "SETUID", "SETGID",
        "DAC_OVERRIDE", "DAC_READ_SEARCH", "CHOWN", "FOWNER", "KILL", "AUDIT_WRITE", "NET_BIND_SERVICE",
    )
]  # fmt: skip


def outer_bundle(directory: Path, rootfs: Path, command: str) -> Path:
    """
    A container with the host's programs, in which runc works: it finds a bundle at /inner/bundle.
    """
    bundle(directory / "inner", Path("/inner/rootfs"), "sh", "-c", SHOW)
    (directory / "root").mkdir()
    path = bundle(directory / "outer", directory / "root", "/bin/sh", "-c", command)
    config = json.loads((path / "config.json").read_text())
    config["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    config["process"]["noNewPrivileges"] = False
    config["linux"] |= {
        "maskedPaths": [],
        "readonlyPaths": [],
        "resources": {"devices": [{"allow": True, "access": "rwm"}]},
    }
    binds = {"/inner/bundle": directory / "inner", "/inner/rootfs": rootfs, "/sys/fs/cgroup": Path("/sys/fs/cgroup")}
    binds |= {place: Path(place) for place in ("/usr", "/lib", "/lib64", "/bin", "/sbin") if Path(place).exists()}
    config["mounts"] = [
        *(mount for mount in config["mounts"] if mount["destination"] != "/sys/fs/cgroup"),
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        *(
            {"destination": place, "type": "bind", "source": str(source), "options": ["rbind"]}
            for place, source in binds.items()
        ),
    ]
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_runc_in_runc(tmp_path: Path, rootfs: Path, look: Callable[[Roots], Seen], no_leaks: None) -> None:
    """
    A runc inside a runc container: the innermost wins, and the one around it is kept.
    """
    need_programs("runc")
    outer, inner = f"procwatch-outer-{os.getpid()}", f"procwatch-inner-{os.getpid()}"
    # A shell stays in the container around it, as an engine would.
    path = outer_bundle(tmp_path, rootfs, f"runc run --bundle /inner/bundle {inner}; true")
    seen = look(Roots())
    with running("runc", "run", "--bundle", path, outer) as lines:
        container = seen.container(cgroup_of("\n".join(lines)))
    assert container is not None
    assert (container.id, container.runtime, container.outer) == (inner, "runc", [outer])
    assert container.created is not None


def hierarchy() -> Path:
    """
    A cgroup hierarchy in which directories may be made.
    """
    need(os.geteuid() == 0, "cgroups are made by root")
    root = Path("/sys/fs/cgroup")
    for directory in (root / "unified", root / "systemd", root):
        if (directory / "cgroup.procs").exists():
            return directory
    need(False, "no cgroup hierarchy")
    raise AssertionError


def test_thousand_containers_come_and_go(tmp_path: Path, no_leaks: None) -> None:
    """
    Containers whose cgroups are gone are forgotten, and a new one of an old name gets its own names.
    """
    top = f"procwatch-{os.getpid()}"
    directory = hierarchy() / top / "docker"
    directory.mkdir(parents=True)
    names = [f"{os.getpid():056x}{number:08x}" for number in range(1000)]
    for name in names:
        (directory / name).mkdir()
        config = tmp_path / f"var/lib/docker/containers/{name}/config.v2.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"ID": name, "Name": f"/{name[-3:]}"}))
    ready = threading.Event()
    enricher = Enricher(roots=Roots(prefix=str(tmp_path)), on_ready=ready.set, sweep_s=0.01)
    announced = []

    def until(key: str, count: int) -> None:
        while enricher.stats()[key] != count:
            assert ready.wait(30)
            ready.clear()
            announced.extend(enricher.collect())

    try:
        for name in names:
            enricher.place(f"/{top}/docker/{name}")
        until("pending", 0)
        assert enricher.stats()["containers"] == len(announced) == 1000
        again = names.pop()
        (directory / again).rmdir()
        (directory / again).mkdir()
        until("containers", 999)
        enricher.place(f"/{top}/docker/{again}")
        until("containers", 1000)
        assert len(announced) == 1001
        names.append(again)
    finally:
        for name in names:
            (directory / name).rmdir()
        directory.rmdir()
        directory.parent.rmdir()
        until("containers", 0)
        assert enricher.stats()["cgroups"] == 0
        enricher.close()


class Podman:
    """
    Podman with a storage of its own, and an image.
    """

    image = "localhost/procwatch-test:1"

    def __init__(self, directory: Path, rootfs: Path) -> None:
        self.roots = replace(Roots(), containers=(str(directory / "root"),), containers_run=(str(directory / "run"),))
        self.command = ["podman", "--root", str(directory / "root"), "--runroot", str(directory / "run")]
        subprocess.run(
            ["sh", "-ec", f'tar -C {rootfs} -c . | "$@" import - {self.image}', "sh", *self.command],
            check=True,
            capture_output=True,
        )

    def run(self, *arguments: str) -> list[str]:
        """
        The command line of a container that ends with its input.
        """
        return [*self.command, "run", "--rm", "-i", "--runtime", shutil.which("runc") or "runc", *PODMAN, *arguments]


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Iterator[Podman]:
    """
    See `Podman`.
    """
    need_programs("podman", "runc")
    directory = tmp_path_factory.mktemp("podman")
    yield Podman(directory, rootfs)
    # Its directories have mounts of their own.
    subprocess.run(["umount", "-l", str(directory / "root/overlay")], capture_output=True, check=False)


def test_podman_image(podman: Podman, look: Callable[[Roots], Seen]) -> None:
    """
    A Podman container has its name, its image and the image's id, and the labels that were asked for.
    """
    seen = look(podman.roots)
    name = f"web-{os.getpid()}"
    with running(
        *podman.run("--name", name, "--label", "app=shop", "--label", "x=y", podman.image, "sh", "-c", SHOW)
    ) as lines:
        container = seen.container(cgroup_of("\n".join(lines)))
    assert container is not None
    assert (container.runtime, container.name, container.image) == ("podman", name, podman.image)
    assert container.image_id is not None
    assert len(container.id) == len(container.image_id) == 64
    assert container.labels == {"app": "shop"}
    assert container.created is not None


def test_podman_rootfs(podman: Podman, rootfs: Path, look: Callable[[Roots], Seen]) -> None:
    """
    A Podman container without an image has a name, and no image is made up.
    """
    seen = look(podman.roots)
    name = f"bare-{os.getpid()}"
    with running(*podman.run("--name", name, "--rootfs", str(rootfs), "sh", "-c", SHOW)) as lines:
        container = seen.container(cgroup_of("\n".join(lines)))
    assert container is not None
    assert (container.runtime, container.name, container.image) == ("podman", name, None)


def test_fifty_short_programs_in_podman(podman: Podman, look: Callable[[Roots], Seen]) -> None:
    """
    Each of 50 programs in a container is in the same place, and the container is announced once.
    """
    seen = look(podman.roots)
    loop = "i=0; while [ $i -lt 50 ]; do cat /proc/self/cgroup; echo; i=$((i+1)); done; " + SHOW
    with running(*podman.run(podman.image, "sh", "-c", loop)) as lines:
        places = [cgroup_of(text) for text in "\n".join(lines).split("\n\n")]
        found = {seen.container(cgroup) for cgroup in places if cgroup}
    assert len(places) == 51
    assert len(found) == len(seen.announced) == 1
    assert found.pop() == seen.announced[0][0]


class Containerd:
    """
    A containerd with files of its own.
    """

    image = Podman.image

    def __init__(self, directory: Path, podman: Podman) -> None:
        self.socket = directory / "containerd.sock"
        self.roots = replace(
            Roots(),
            containerd=(str(directory / "state"),),
            containerd_data=(str(directory / "root"),),
        )
        config = directory / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\n  address = "{self.socket}"\n'
        )
        self.process = subprocess.Popen(["containerd", "-c", str(config), "-l", "fatal"])
        archive = directory / "image.tar"
        subprocess.run(
            [*podman.command, "save", "--format", "oci-archive", "-o", archive, self.image],
            check=True,
            capture_output=True,
        )
        # ctr waits for the socket to answer, up to its --connect-timeout.
        self.ctr("image", "import", str(archive))

    def ctr(self, *arguments: str) -> None:
        """
        Run ctr to its end.
        """
        subprocess.run(self.command(*arguments), check=True, capture_output=True)

    def command(self, *arguments: str) -> list[str]:
        """
        A command line of ctr.
        """
        return ["ctr", "--address", str(self.socket), "--connect-timeout", "20s", *arguments]

    def close(self) -> None:
        """
        End it; its containers have ended.
        """
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory, podman: Podman) -> Iterator[Containerd]:
    """
    See `Containerd`.
    """
    need_programs("containerd", "ctr", "runc")
    server = Containerd(tmp_path_factory.mktemp("containerd"), podman)
    yield server
    server.close()


def test_ctr(containerd: Containerd, look: Callable[[Roots], Seen]) -> None:
    """
    `ctr run` with a name of one's own: found by the state, with the image from containerd's database.
    """
    seen = look(containerd.roots)
    name = f"web-{os.getpid()}"
    arguments = ("run", "--rm", "--label", "app=shop", containerd.image, name, "/bin/sh", "-c", SHOW_IN_CTR)
    with running(*containerd.command(*arguments)) as lines:
        container = seen.container(cgroup_of("\n".join(lines)))
    assert container is not None
    assert (container.id, container.runtime, container.name) == (name, "containerd", name)
    assert container.image == containerd.image
    assert (container.image_id or "").startswith("sha256:")
    assert container.labels == {"app": "shop"}
    assert container.created is not None


def test_kubernetes_annotations(containerd: Containerd, look: Callable[[Roots], Seen]) -> None:
    """
    A task with the annotations of the CRI plug-in, in a cgroup as a kubelet makes it, has its pod's names.
    """
    seen = look(containerd.roots)
    name, uid = f"{os.getpid():064x}", "7a3f1c2e-9b4d-4e6f-8a01-c2d3e4f5a6b7"
    notes = {
        "container-name": "server",
        "container-type": "container",
        "image-name": "registry.example/shop:3",
        "sandbox-name": "shop-7d9c",
        "sandbox-namespace": "prod",
        "sandbox-uid": uid,
    }
    flags = [flag for key, value in notes.items() for flag in ("--annotation", f"io.kubernetes.cri.{key}={value}")]
    cgroup = f"/kubepods/burstable/pod{uid}/{name}"
    arguments = ("run", "--rm", "--cgroup", cgroup, *flags, containerd.image, name, "/bin/sh", "-c", SHOW_IN_CTR)
    with running(*containerd.command(*arguments)) as lines:
        assert cgroup_of("\n".join(lines)) == cgroup
        container = seen.container(cgroup)
    for top in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for directory in (top / f"burstable/pod{uid}", top / "burstable", top):
            directory.rmdir()
    assert container is not None
    assert (container.id, container.runtime, container.name) == (name, "containerd", "server")
    assert container.image == "registry.example/shop:3"
    assert container.pod is not None
    assert (container.pod.uid, container.pod.namespace, container.pod.name) == (uid, "prod", "shop-7d9c")
    assert container.pod.container == "server"
