"""
What container runtimes keep on disk about their containers: one module for each habit.

Each `look(ref, tree, roots)` returns what the runtime's own files say of a container, or None where they do not know
it. No daemon is asked. Nothing raises: these files are somebody else's input.
"""

from __future__ import annotations

from msgspec import Struct

from procwatch.events import Pod


class Roots(Struct, frozen=True):
    """
    Where runtimes keep their files, as the host sees them; each is looked at in turn.

    Rootless engines keep theirs below a user's home and /run/user/UID: `of_user` gives those.
    """

    prefix: str = "/"  # the host's root directory as seen from here: "/host" for an agent in a container
    docker: tuple[str, ...] = ("/var/lib/docker",)
    containers: tuple[str, ...] = ("/var/lib/containers/storage",)  # Podman's and CRI-O's; `containers-storage.conf`
    containers_run: tuple[str, ...] = ("/run/containers/storage",)
    containerd: tuple[str, ...] = ("/run/containerd", "/run/k3s/containerd", "/run/docker/containerd")
    containerd_data: tuple[str, ...] = (
        "/var/lib/containerd",
        "/var/lib/rancher/k3s/agent/containerd",
        "/var/lib/docker/containerd/daemon",
    )
    # Directories with one subdirectory for each container, and the runtime that they belong to; "*" is any name.
    runc: tuple[tuple[str, str], ...] = (
        ("/run/runc", "runc"),
        ("/run/containerd/runc/*", "containerd"),
        ("/run/docker/runtime-runc/*", "docker"),
        ("/run/crun", "crun"),
    )
    logs: tuple[str, ...] = ("/var/log",)  # the kubelet's: pods/, containers/
    machines: tuple[tuple[str, str], ...] = (  # whose directory has LXC's containers, and under which name
        ("/var/lib/incus/containers", "incus"),
        ("/var/lib/lxd/containers", "lxd"),
        ("/var/snap/lxd/common/lxd/containers", "lxd"),
    )

    def of_user(self, home: str, uid: int) -> Roots:
        """
        The places of a user's rootless engines.
        """
        data, run = f"{home}/.local/share", f"/run/user/{uid}"
        return Roots(
            prefix=self.prefix,
            docker=(f"{data}/docker",),
            containers=(f"{data}/containers/storage",),
            containers_run=(f"{run}/containers",),
            containerd=(f"{run}/containerd", f"{run}/containerd-rootless"),
            containerd_data=(f"{data}/containerd",),
            runc=((f"{run}/runc", "runc"), (f"{run}/crun", "crun")),
            logs=(),
            machines=(),
        )


class Found(Struct):
    """
    What was found of one container; the fields of `events.Container`.
    """

    runtime: str | None = None  # None: what the cgroup says
    name: str | None = None
    image: str | None = None
    image_id: str | None = None
    pod: Pod | None = None
    labels: dict[str, str] | None = None
    created: str | None = None


def strings(value: object) -> dict[str, str]:
    """
    The entries of a JSON object that are short texts: labels, annotations.
    """
    if not isinstance(value, dict):
        return {}
    return {
        key: item
        for key, item in value.items()
        if isinstance(key, str) and isinstance(item, str) and len(key) <= 256 and len(item) <= 4096
    }


def pod_of(annotations: dict[str, str], *names: str) -> Pod | None:
    """
    A pod by the annotations that have its uid, namespace, name and the container's name.
    """
    uid, namespace, name, container = (annotations.get(key) or None for key in names)
    return Pod(uid, namespace, name, container) if uid or name else None
