"""
A cgroup path says which container, pod and unit a process belongs to, and says nothing where it cannot know.
"""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.enrich.containers import Place, parse

A = "3f4e9c1ab0d27786e5a1c90b8d7f6e5d4c3b2a190817f6e5d4c3b2a1908f7e6d"
B = "b1946ac92492d2347c6235b4d2611184f0b2c1a3d4e5f60718293a4b5c6d7e8f"
C = "0c6c5f8a7e2b4d1f9a8b7c6d5e4f30213243546576879801a2b3c4d5e6f70819"
UID = "7a3f1c2e-9b4d-4e6f-8a01-c2d3e4f5a6b7"
UID_ = UID.replace("-", "_")
STATIC = "4a1b2c3d4e5f60718293a4b5c6d7e8f9"  # the digest that names a static pod
KIND = "/kubelet.slice/kubelet-kubepods.slice/"
STEP = "x5h7oizyhrunip3o2urd7of1d"

# path, runtime, id, pod, ids around it, unit, its user
PATHS = [
    # Docker
    (f"/docker/{A}", "docker", A, None, [], None, None),
    (f"/system.slice/docker-{A}.scope", "docker", A, None, [], f"docker-{A}.scope", None),
    (f"/mine.slice/docker-{A}.scope", "docker", A, None, [], f"docker-{A}.scope", None),  # --cgroup-parent mine.slice
    (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope",  # rootless
        "docker", A, None, [], f"docker-{A}.scope", 1000,
    ),
    (f"/system.slice/docker.service/docker/{A}", "docker", A, None, [], "docker.service", None),
    (f"/moby/{A}", "docker", A, None, [], None, None),
    (f"/docker/{A}/init.scope", "docker", A, None, [], None, None),  # systemd inside
    (f"/docker/{A}/system.slice/sshd.service", "docker", A, None, [], None, None),
    (f"/system.slice/docker-{A}.scope/system.slice/sshd.service", "docker", A, None, [], f"docker-{A}.scope", None),
    (f"/system.slice/docker-{A}.scope/init.scope", "docker", A, None, [], f"docker-{A}.scope", None),  # minikube
    (f"/../{A}", None, A, None, [], None, None),  # read in a container with its own cgroup namespace
    (f"/../../system.slice/docker-{A}.scope", "docker", A, None, [], None, None),
    # Docker in Docker
    (f"/docker/{A}/docker/{B}", "docker", B, None, [A], None, None),
    (f"/docker/{A}/docker/{B}/docker/{C}", "docker", C, None, [A, B], None, None),
    (f"/system.slice/docker-{A}.scope/docker/{B}", "docker", B, None, [A], f"docker-{A}.scope", None),
    (
        f"/system.slice/docker-{A}.scope/system.slice/docker-{B}.scope",
        "docker", B, None, [A], f"docker-{A}.scope", None,
    ),
    # BuildKit
    (f"/docker/buildkit/{STEP}", "buildkit", STEP, None, [], None, None),
    (f"/buildkit/{STEP}", "buildkit", STEP, None, [], None, None),
    (f"/docker/{A}/buildkit/{STEP}", "buildkit", STEP, None, [A], None, None),
    (f"/system.slice/docker-{STEP}.scope", "buildkit", STEP, None, [], f"docker-{STEP}.scope", None),
    # containerd: ctr with a digest, nerdctl
    (f"/default/{A}", "containerd", A, None, [], None, None),
    (f"/k8s.io/{A}", "containerd", A, None, [], None, None),
    (f"/system.slice/nerdctl-{A}.scope", "containerd", A, None, [], f"nerdctl-{A}.scope", None),
    (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/nerdctl-{A}.scope",
        "containerd", A, None, [], f"nerdctl-{A}.scope", 1000,
    ),
    # Podman
    (f"/libpod_parent/libpod-{A}", "podman", A, None, [], None, None),
    (f"/libpod_parent/{B}/libpod-{A}", "podman", A, None, [], None, None),  # in a pod of podman's own
    (f"/machine.slice/libpod-{A}.scope", "podman", A, None, [], f"libpod-{A}.scope", None),
    (f"/machine.slice/libpod-{A}.scope/container", "podman", A, None, [], f"libpod-{A}.scope", None),
    (
        f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope/container",
        "podman", A, None, [], f"libpod-{A}.scope", None,
    ),
    (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container",
        "podman", A, None, [], f"libpod-{A}.scope", 1000,
    ),
    (f"/system.slice/nginx.service/libpod-payload-{A}", "podman", A, None, [], "nginx.service", None),  # quadlet
    (
        f"/user.slice/user-1001.slice/user@1001.service/app.slice/caddy.service/libpod-payload-{A}",
        "podman", A, None, [], "caddy.service", 1001,
    ),
    # Kubernetes, cgroupfs driver
    (f"/kubepods/pod{UID}/{A}", None, A, UID, [], None, None),
    (f"/kubepods/burstable/pod{UID}/{A}", None, A, UID, [], None, None),
    (f"/kubepods/besteffort/pod{UID}/{A}", None, A, UID, [], None, None),
    (f"/kubepods/burstable/pod{STATIC}/{A}", None, A, STATIC, [], None, None),
    (f"/kubepods/burstable/pod{UID}/crio-{A}", "cri-o", A, UID, [], None, None),
    (f"/kubepods/besteffort/pod{UID}/{A}/system.slice/cron.service", None, A, UID, [], None, None),
    (f"/../../pod{UID}/{A}", None, A, UID, [], None, None),
    # Kubernetes, systemd driver
    (
        f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{A}.scope",
        "containerd", A, UID, [], f"cri-containerd-{A}.scope", None,
    ),
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/cri-containerd-{A}.scope",
        "containerd", A, UID, [], f"cri-containerd-{A}.scope", None,
    ),
    (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/docker-{A}.scope",
        "docker", A, UID, [], f"docker-{A}.scope", None,
    ),
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/crio-{A}.scope",
        "cri-o", A, STATIC, [], f"crio-{A}.scope", None,
    ),
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-{A}.scope/container",
        "cri-o", A, UID, [], f"crio-{A}.scope", None,
    ),
    # containerd without the systemd driver below a kubelet with it
    (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{A}",
        "containerd", A, UID, [], "containerd.service", None,
    ),
    (f"/system.slice:docker:{A}", "docker", A, None, [], None, None),
    # kind, k3s in Docker, minikube
    (
        f"/docker/{A}{KIND}kubelet-kubepods-besteffort-pod{UID_}.slice/cri-containerd-{B}.scope",
        "containerd", B, UID, [A], None, None,
    ),
    (
        f"/system.slice/docker-{A}.scope{KIND}kubelet-kubepods-pod{UID_}.slice/cri-containerd-{B}.scope",
        "containerd", B, UID, [A], f"docker-{A}.scope", None,
    ),
    (f"/docker/{A}/kubelet/kubepods/burstable/pod{UID}/{B}", None, B, UID, [A], None, None),
    (
        f"/system.slice/docker-{A}.scope/kubepods.slice/kubepods-pod{UID_}.slice/docker-{B}.scope",
        "docker", B, UID, [A], f"docker-{A}.scope", None,
    ),
    # A container made inside a pod's container is not the pod's
    (f"/kubepods/burstable/pod{UID}/{A}/docker/{B}", "docker", B, None, [A], None, None),
    # LXC, LXD, Incus, Proxmox
    ("/lxc/web", "lxc", "web", None, [], None, None),
    ("/lxc/101/ns/init.scope", "lxc", "101", None, [], None, None),
    ("/lxc.payload/web", "lxc", "web", None, [], None, None),
    ("/lxc.payload.web", "lxc", "web", None, [], None, None),
    ("/lxc.payload.web/system.slice/ssh.service", "lxc", "web", None, [], None, None),
    ("/lxc.payload.fleet_worker/init.scope", "lxc", "fleet_worker", None, [], None, None),  # Incus: project_name
    (
        "/user.slice/user-1000.slice/user@1000.service/lxc.payload.web/init.scope",
        "lxc", "web", None, [], "user@1000.service", None,
    ),
    (f"/lxc.payload.web/system.slice/docker-{A}.scope", "docker", A, None, ["web"], None, None),
    (f"/lxc.payload.web/docker/{A}", "docker", A, None, ["web"], None, None),
    ("/lxc.payload.web/lxc/inner", "lxc", "inner", None, ["web"], None, None),
    # systemd-nspawn, and what else systemd-machined knows
    (
        "/machine.slice/systemd-nspawn@web.service/payload/init.scope",
        "nspawn", "web", None, [], "systemd-nspawn@web.service", None,
    ),
    (
        "/machine.slice/systemd-nspawn@web\\x2d1.service/payload/system.slice/ssh.service",
        "nspawn", "web-1", None, [], "systemd-nspawn@web\\x2d1.service", None,
    ),
    ("/machine.slice/machine-web.scope/payload", "nspawn", "web", None, [], "machine-web.scope", None),
    (
        "/machine.slice/machine-lxc\\x2d4242\\x2dold\\x2dbox.scope",  # libvirt
        "lxc", "old-box", None, [], "machine-lxc\\x2d4242\\x2dold\\x2dbox.scope", None,
    ),
    # runc and crun with systemd
    ("/system.slice/runc-demo.scope", "runc", "demo", None, [], "runc-demo.scope", None),
    ("/user.slice/crun-demo-1.scope", "crun", "demo-1", None, [], "crun-demo-1.scope", None),
    # AWS ECS and Fargate
    (f"/ecs/{STATIC}/{A}", "docker", A, None, [], None, None),
    (f"/ecs/cluster/{STATIC}/{A}", "docker", A, None, [], None, None),
    (f"/ecstasks.slice/ecstasks-{STATIC}.slice/docker-{A}.scope", "docker", A, None, [], f"docker-{A}.scope", None),
    (f"/ecs/{STATIC}/{STATIC}-2531612879", "ecs", f"{STATIC}-2531612879", None, [], None, None),
    # Kata: what is seen on the host is the virtual machine of the pod
    (
        f"/kubepods/burstable/pod{UID}/kata_{A}",
        "kata", A, UID, [], None, None,
    ),
]  # fmt: skip

# path, unit, its user: no container here
OUTSIDE = [
    ("/", None, None),
    ("", None, None),
    ("/init.scope", "init.scope", None),
    ("/system.slice", "system.slice", None),
    ("/system.slice/ssh.service", "ssh.service", None),
    ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", None),
    ("/system.slice/_cpu.service", "cpu.service", None),
    ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", None),
    ("/user.slice/user-1000.slice/user@1000.service/init.scope", "init.scope", 1000),
    ("/user.slice/user-1000.slice/user@1000.service", "user@1000.service", None),
    (
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-firefox-2211.scope",
        "app-gnome-firefox-2211.scope",
        1000,
    ),
    ("/user.slice/user-1000.slice/user@1000.service/snap.code.code-1.scope", "snap.code.code-1.scope", 1000),
    ("/user.slice/user-0.slice/user@0.service/gpg-agent.service", "gpg-agent.service", 0),
    # The engines themselves
    ("/system.slice/docker.service", "docker.service", None),
    ("/system.slice/containerd.service", "containerd.service", None),
    ("/system.slice/docker-agent.service", "docker-agent.service", None),
    (f"/system.slice/docker-agent.service/{A}", "docker-agent.service", None),
    ("/docker.server", None, None),
    ("/podruntime/docker", None, None),
    ("/libpod_parent/conmon", None, None),
    (f"/libpod_parent/libpod-conmon-{A}", None, None),
    (f"/machine.slice/libpod-conmon-{A}.scope", f"libpod-conmon-{A}.scope", None),
    (f"/system.slice/crio-conmon-{A}.scope", f"crio-conmon-{A}.scope", None),
    (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-conmon-{A}.scope",
     f"crio-conmon-{A}.scope", None),
    ("/system.slice/nginx.service/runtime", "nginx.service", None),
    ("/lxc.monitor.web", None, None),
    ("/lxc.pivot", None, None),
    ("/lxc", None, None),
    ("/system.slice/lxc/web", "system.slice", None),
    ("/machine.slice/systemd-nspawn@web.service/supervisor", "systemd-nspawn@web.service", None),
    ("/machine.slice/machine-web.scope/supervisor", "machine-web.scope", None),
    ("/machine.slice/machine-qemu\\x2d1\\x2dvm.scope", "machine-qemu\\x2d1\\x2dvm.scope", None),  # a virtual machine
    (f"/kata_overhead/{A}", None, None),
    # Pods as such
    ("/kubepods", None, None),
    (f"/kubepods/burstable/pod{UID}", None, None),
    (f"/kubepods.slice/kubepods-pod{UID_}.slice", f"kubepods-pod{UID_}.slice", None),
    # Directories that happen to look like it
    (f"/{A}", None, None),
    (f"/home/{A}", None, None),
    (f"/user.slice/user-1000.slice/user@1000.service/app.slice/build.scope/{A}", "build.scope", 1000),
    (f"/user.slice/user-1000.slice/session-2.scope/{A}", "session-2.scope", None),
    (f"/system.slice/cache-{A}.service", f"cache-{A}.service", None),
    (f"/system.slice/backup-{A}.scope", f"backup-{A}.scope", None),
    (f"/docker/{A[:63]}", None, None),
    (f"/docker/{A}0", None, None),
    (f"/docker/{A.upper()}", None, None),
    (f"/docker-{A}", None, None),
    (f"/podman/{A}", None, None),
    (f"/pods/{A}", None, None),
    (f"/pod{UID}x/{A}", None, None),
    ("/default/web", None, None),
    ("/.scope", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "runtime", "name", "pod", "outer", "unit", "user"), PATHS)
def test_path_names_the_innermost_container(
    path: str, runtime: str | None, name: str, pod: str | None, outer: list[str], unit: str | None, user: int | None
) -> None:
    """
    The innermost container wins, those around it are kept, and the unit is the host's.
    """
    place = parse(path)
    assert place.container is not None
    container = place.container
    assert (container.runtime, container.id, container.pod_uid, container.outer) == (runtime, name, pod, outer)
    assert (place.unit, place.unit_user) == (unit, user)
    assert path == container.cgroup or path.startswith(container.cgroup + "/")


@pytest.mark.parametrize(("path", "unit", "user"), OUTSIDE)
def test_path_outside_of_containers(path: str, unit: str | None, user: int | None) -> None:
    """
    Engines, monitors, machines and directories with 64 hex digits are not containers.
    """
    place = parse(path)
    assert (place.container, place.unit, place.unit_user) == (None, unit, user)


@given(st.text())
def test_any_text_has_a_place(text: str) -> None:
    """
    Whatever the text, there is an answer.
    """
    place = parse(text)
    if place.container is not None:
        assert place.container.id
        assert place.container.outer == place.container.outer


segments = st.sampled_from(
    ["docker", A, B, f"docker-{A}.scope", "kubepods", "burstable", f"pod{UID}", "system.slice", "x.service", "lxc",
     "..", "user@7.service", f"kubepods-pod{UID_}.slice", f"a.slice:docker:{B}", "machine-x\\xff.scope", "supervisor",
     "_a.scope"]
)  # fmt: skip


@given(st.lists(segments, max_size=12))
def test_any_nesting_has_a_place(parts: list[str]) -> None:
    """
    Segments that mean something give an answer in any order, and each container's cgroup is within the path.
    """
    path = "/" + "/".join(parts)
    container = parse(path).container
    while container is not None:
        assert (path + "/").startswith(container.cgroup + "/")
        container = container.around


ids = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.lists(ids, min_size=1, max_size=5, unique=True), st.booleans())
def test_nested_ids_come_back(names: list[str], systemd: bool) -> None:
    """
    The ids that a path was made of are read from it, in their order.
    """
    path = "".join(f"/system.slice/docker-{name}.scope" if systemd else f"/docker/{name}" for name in names)
    container = parse(path).container
    assert container is not None
    assert [*container.outer, container.id] == names
    assert container.cgroup == path


@given(ids, st.uuids(), st.sampled_from(["", "burstable", "besteffort", "guaranteed"]), st.booleans())
def test_pod_comes_back(name: str, uid: UUID, quality: str, systemd: bool) -> None:
    """
    A pod's uid is read back from directories and from slices, in its own form.
    """
    if systemd:
        middle = f"-{quality}" if quality else ""
        path = f"/kubepods.slice/kubepods{middle}-pod{str(uid).replace('-', '_')}.slice/crio-{name}.scope"
    else:
        path = "/".join(part for part in ("/kubepods", quality, f"pod{uid}", name) if part)
    container = parse(path).container
    assert container is not None
    assert (container.id, container.pod_uid) == (name, str(uid))


def test_nowhere_is_nowhere() -> None:
    """
    The root cgroup says nothing at all.
    """
    assert parse("/") == Place()
