"""
Each runtime's files give the names of its containers; what is broken or forged in them gives none.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procwatch.enrich.containers import parse
from procwatch.enrich.names import Names
from procwatch.enrich.runtimes import Roots, containerd
from procwatch.events import Container, Pod

A = "3f4e9c1ab0d27786e5a1c90b8d7f6e5d4c3b2a190817f6e5d4c3b2a1908f7e6d"
UID = "7a3f1c2e-9b4d-4e6f-8a01-c2d3e4f5a6b7"
CAPTURES = Path(__file__).parent / "captures"

Put = Callable[[str, object], None]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """
    Write a file of the host that the test makes up.
    """

    def put(path: str, content: object) -> None:
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return put


def names(root: Path, cgroup: str) -> Container | None:
    """
    What that host's files say of a cgroup.
    """
    finder = Names(Roots(prefix=str(root)))
    ref = finder.find(cgroup, parse(cgroup))
    return finder.lookup(ref) if ref else None


DOCKER: dict[str, Any] = {
    "ID": A,
    "Created": "2024-05-01T10:00:00.123456789Z",
    "Name": "/web",
    "Image": "sha256:" + "ab" * 32,
    "Config": {"Image": "nginx:1.25", "Labels": {"com.docker.compose.project": "shop", "maintainer": "x"}},
    "State": {"Pid": 4711},
}


def test_docker(tmp_path: Path, put: Put) -> None:
    """
    Docker's own configuration has all.
    """
    put(f"/var/lib/docker/containers/{A}/config.v2.json", DOCKER)
    assert names(tmp_path, f"/system.slice/docker-{A}.scope") == Container(
        A,
        "docker",
        "web",
        "nginx:1.25",
        None,
        image_id="sha256:" + "ab" * 32,
        labels={"com.docker.compose.project": "shop"},
        created="2024-05-01T10:00:00.123456789Z",
    )


def test_pod_in_docker(tmp_path: Path, put: Put) -> None:
    """
    What the kubelet's shim for Docker labels is a pod.
    """
    keys = {"pod.uid": UID, "pod.namespace": "prod", "pod.name": "shop-1", "container.name": "server"}
    labels = {f"io.kubernetes.{key}": value for key, value in keys.items()}
    put(f"/var/lib/docker/containers/{A}/config.v2.json", {**DOCKER, "Config": {"Labels": labels}})
    container = names(tmp_path, f"/kubepods/burstable/pod{UID}/{A}")
    assert container is not None
    assert container.runtime == "docker"
    assert container.pod == Pod(UID, "prod", "shop-1", "server")


def test_other_id_in_the_file(tmp_path: Path, put: Put) -> None:
    """
    A file of another container is not believed.
    """
    put(f"/var/lib/docker/containers/{A}/config.v2.json", {**DOCKER, "ID": "0" * 64})
    assert names(tmp_path, f"/docker/{A}") is None


def test_podman_storage(tmp_path: Path, put: Put) -> None:
    """
    Podman's list of containers is enough where its database cannot be read.
    """
    about = {"image-name": "docker.io/library/alpine:3", "image-id": "cd" * 32, "name": "web", "created-at": 1}
    entry = {
        "id": A,
        "names": ["web"],
        "image": "cd" * 32,
        "metadata": json.dumps(about),
        "created": "2024-05-01T10:00:00Z",
    }
    put("/var/lib/containers/storage/overlay-containers/containers.json", [{"id": "x"}, 3, entry])
    assert names(tmp_path, f"/machine.slice/libpod-{A}.scope/container") == Container(
        A,
        "podman",
        "web",
        "docker.io/library/alpine:3",
        None,
        image_id="cd" * 32,
        created="2024-05-01T10:00:00Z",
    )


def test_podman_4_database(tmp_path: Path, put: Put) -> None:
    """
    The bolt database of Podman before 5 has the name, the image and the labels.
    """
    capture = gzip.decompress((CAPTURES / "podman-4.3-bolt_state.db.gz").read_bytes())
    put("/var/lib/containers/storage/libpod/bolt_state.db", capture)
    web = "b2e3f333dfde34ff5478d75174110819f187bf70f1e0aab336b2ebf00a5a0fb9"
    container = names(tmp_path, f"/libpod_parent/libpod-{web}")
    assert container is not None
    assert (container.name, container.image, container.labels) == ("web", "example.org/shop:3", {"app": "shop"})
    assert container.created == "2026-11-23T22:56:50.755501784Z"


def test_podman_5_database(tmp_path: Path, put: Put, no_leaks: None) -> None:
    """
    The SQLite database of Podman 5 is read, and nothing is written beside it.
    """
    put("/var/lib/containers/storage/db.sql", b"")
    directory = tmp_path / "var/lib/containers/storage"
    config = {
        "id": A,
        "name": "renamed",
        "rootfsImageName": "alpine:3",
        "rootfsImageID": "cd" * 32,
        "labels": {"app": "x"},
    }
    with closing(sqlite3.connect(directory / "db.sql")) as database:
        database.execute(
            "CREATE TABLE ContainerConfig (ID TEXT PRIMARY KEY, Name TEXT, PodID TEXT, JSON TEXT NOT NULL)"
        )
        database.execute("INSERT INTO ContainerConfig VALUES (?, 'renamed', NULL, ?)", (A, json.dumps(config)))
        database.commit()
    container = names(tmp_path, f"/libpod_parent/libpod-{A}")
    assert container is not None
    assert (container.name, container.image, container.labels) == ("renamed", "alpine:3", {"app": "x"})
    assert [file.name for file in directory.iterdir()] == ["db.sql"]


def test_crio(tmp_path: Path, put: Put) -> None:
    """
    CRI-O's annotations have all, labels as JSON within JSON.
    """
    notes = {
        "io.container.manager": "cri-o",
        "io.kubernetes.pod.uid": UID,
        "io.kubernetes.pod.namespace": "prod",
        "io.kubernetes.pod.name": "shop-1",
        "io.kubernetes.container.name": "server",
        "io.kubernetes.cri-o.ImageName": "quay.io/shop:3",
        "io.kubernetes.cri-o.ImageRef": "ef" * 32,
        "io.kubernetes.cri-o.Created": "2024-05-01T10:00:00Z",
        "io.kubernetes.cri-o.Labels": json.dumps({"app": "shop", "other": "x"}),
    }
    put(f"/run/containers/storage/overlay-containers/{A}/userdata/config.json", {"annotations": notes})
    slices = f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice"
    assert names(tmp_path, f"{slices}/crio-{A}.scope") == Container(
        A,
        "cri-o",
        "server",
        "quay.io/shop:3",
        Pod(UID, "prod", "shop-1", "server"),
        image_id="ef" * 32,
        labels={"app": "shop"},
        created="2024-05-01T10:00:00Z",
    )


def test_containerd_cri(tmp_path: Path, put: Put) -> None:
    """
    A task of the CRI plug-in has its pod in its annotations; without the database there is no more.
    """
    keys = {"container-name": "server", "image-name": "shop:3", "sandbox-name": "shop-1", "sandbox-namespace": "prod"}
    notes = {f"io.kubernetes.cri.{key}": value for key, value in keys.items()}
    put(f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{A}/config.json", {"annotations": notes})
    assert names(tmp_path, f"/kubepods/pod{UID}/{A}") == Container(
        A, "containerd", "server", "shop:3", Pod(UID, "prod", "shop-1", "server")
    )


def test_containerd_database(tmp_path: Path, put: Put) -> None:
    """
    Image, digest, labels and time come from containerd's metadata; plain names by the state of its runc.
    """
    task = "/run/containerd/io.containerd.runtime.v2.task/default/web-9"
    put(f"{task}/config.json", {"annotations": {}})
    put("/run/containerd/runc/default/web-9/state.json", {"cgroup_paths": {}, "cgroup-path": "/default/web-9"})
    capture = gzip.decompress((CAPTURES / "containerd-1.6-meta.db.gz").read_bytes())
    put("/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db", capture)
    container = names(tmp_path, "/default/web-9")
    assert container is not None
    assert (container.runtime, container.name, container.image) == ("containerd", "web-9", "example.org/shop:3")
    assert container.image_id is not None
    assert container.labels == {"app": "shop"}
    assert container.created is not None
    assert container.created.startswith("2026-11-23T")


def test_crun(tmp_path: Path, put: Put) -> None:
    """
    crun's status has the cgroup and the bundle, and the configuration in that has the image.
    """
    put("/run/crun/web/status", {"cgroup-path": "/some/where", "bundle": "/srv/web", "created": "2024-05-01T10:00:00Z"})
    put("/srv/web/config.json", {"annotations": {"org.opencontainers.image.ref.name": "shop:3"}})
    expected = Container("web", "crun", "web", "shop:3", None, created="2024-05-01T10:00:00Z")
    assert names(tmp_path, "/some/where") == names(tmp_path, "/some/where/inside") == expected
    assert names(tmp_path, "/some/whereelse") is names(tmp_path, "/some") is None


def test_container_below_a_plain_one(tmp_path: Path, put: Put) -> None:
    """
    A container with a telling path in one without is known with the outer one.
    """
    put("/run/crun/box/status", {"cgroup-path": "/box"})
    put(f"/var/lib/docker/containers/{A}/config.v2.json", DOCKER)
    container = names(tmp_path, f"/box/docker/{A}")
    assert container is not None
    assert (container.id, container.outer, container.name) == (A, ["box"], "web")


@pytest.mark.parametrize(
    "claim",
    ["/", "/system.slice/ssh.service", "/init.scope", "/user.slice/user-1000.slice/session-3.scope", "/x.slice"],
)
def test_claims_on_what_is_systemds(tmp_path: Path, put: Put, claim: str) -> None:
    """
    A state file that claims the root, a service or a session changes nothing for the processes there.
    """
    put("/run/crun/web/status", {"cgroup-path": claim})
    assert names(tmp_path, claim) is names(tmp_path, claim.rstrip("/") + "/below") is None


def test_users_claims(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A user's state files count in the user's own slice and nowhere else.
    """
    monkeypatch.setattr("procwatch.enrich.names._home", lambda uid: f"/home/{uid}")
    inside, outside = "/user.slice/user-1000.slice/box", "/user.slice/user-1001.slice/box"
    put("/run/user/1000/crun/mine/status", {"cgroup-path": inside})
    put("/run/user/1000/crun/forged/status", {"cgroup-path": outside})
    put("/run/user/1000/crun/forged-too/status", {"cgroup-path": "/box"})
    mine = names(tmp_path, inside)
    assert mine is not None
    assert mine.id == "mine"
    assert names(tmp_path, outside) is names(tmp_path, "/box") is None


def test_forged_scope_of_a_user(tmp_path: Path, put: Put) -> None:
    """
    A user who names a scope of his own after the host's container does not get that container's names.
    """
    put(f"/var/lib/docker/containers/{A}/config.v2.json", DOCKER)
    assert names(tmp_path, f"/user.slice/user-1000.slice/user@1000.service/app.slice/docker-{A}.scope") is None


def test_rootless(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A user's Docker keeps its files below the user's home.
    """
    monkeypatch.setattr("procwatch.enrich.names._home", lambda uid: f"/home/{uid}")
    put(f"/home/1000/.local/share/docker/containers/{A}/config.v2.json", DOCKER)
    container = names(tmp_path, f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope")
    assert container is not None
    assert container.name == "web"


@pytest.mark.parametrize(
    "path",
    [f"/var/log/containers/shop-1_prod_server-{A}.log", f"/var/log/pods/prod_shop-1_{UID}/server/0.log"],
)
def test_kubelet_logs(tmp_path: Path, put: Put, path: str) -> None:
    """
    The kubelet's directories name the pod where no runtime is known to.
    """
    put(path, b"")
    container = names(tmp_path, f"/kubepods/besteffort/pod{UID}/{A}")
    assert container is not None
    assert container.runtime is None
    assert container.pod is not None
    assert (container.pod.uid, container.pod.namespace, container.pod.name) == (UID, "prod", "shop-1")


def test_lxc_kinds(tmp_path: Path, put: Put) -> None:
    """
    The directory that knows an LXC container says whose it is.
    """
    put("/var/lib/incus/containers/web/backup.yaml", b"")
    assert [names(tmp_path, f"/lxc.payload.{name}") for name in ("web", "db")] == [
        Container("web", "incus", "web", None, None),
        Container("db", "lxc", "db", None, None),
    ]


def test_id_that_is_a_path(tmp_path: Path, put: Put) -> None:
    """
    An id cannot lead to another directory.
    """
    put("/etc/state.json", {"created": "x"})
    assert names(tmp_path, "/system.slice/runc-..\\x2f..\\x2fetc.scope") is None
    assert names(tmp_path, "/system.slice/runc-...scope") is None


FILES = {
    f"/var/lib/docker/containers/{A}/config.v2.json": f"/docker/{A}",
    "/var/lib/containers/storage/overlay-containers/containers.json": f"/libpod_parent/libpod-{A}",
    "/var/lib/containers/storage/libpod/bolt_state.db": f"/libpod_parent/libpod-{A}",
    "/var/lib/containers/storage/db.sql": f"/libpod_parent/libpod-{A}",
    f"/run/containers/storage/overlay-containers/{A}/userdata/config.json": f"/crio-{A}",
    f"/run/containerd/io.containerd.runtime.v2.task/x/{A}/config.json": f"/k8s.io/{A}",
    "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db": f"/k8s.io/{A}",
    "/run/runc/web/state.json": "/web",
    "/run/crun/web/status": "/web",
}
KEYS = st.sampled_from(
    ["ID", "Name", "Image", "Config", "Labels", "Created", "id", "names", "metadata", "annotations", "cgroup_paths",
     "cgroup-path", "config", "labels", "bundle", "io.container.manager"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from([A, "/web", "cri-o", "bundle=/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("path", FILES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100) | VALUES)
def test_any_content(tmp_path: Path, put: Put, path: str, content: object) -> None:
    """
    Whatever a file holds, there are names or none, and no text in them is endless.
    """
    put(path, content)
    container = names(tmp_path, FILES[path])
    if container is not None:
        assert isinstance(container.name, str | None)
        assert isinstance(container.image, str | None)


@pytest.mark.parametrize("value", [b"", b"\1", b"\1" + b"\x7f" * 14, b"\1" + b"\xff" * 14, b"\5" + b"\0" * 14])
def test_odd_times(value: bytes) -> None:
    """
    A time that is none is None.
    """
    assert containerd.go_time(value) is None
