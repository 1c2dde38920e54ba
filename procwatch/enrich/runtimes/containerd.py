"""
containerd: the task's bundle below its state directory, and its metadata, a bolt database.

The bundle's config.json is there before the first process; the CRI plug-in (Kubernetes) writes pod and image into its
annotations, nerdctl its names. What `ctr run` was given as an image, and all labels, are only in the metadata:
v1/<namespace>/containers/<id>/{image,createdat,labels}.
"""

from __future__ import annotations

import mmap
import os
import struct
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from procwatch.enrich import bolt
from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Found, Roots, pod_of, strings
from procwatch.enrich.tree import Tree, dig
from procwatch.errors import DecodeError

_POD = (
    "io.kubernetes.cri.sandbox-uid",
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-name",
    "io.kubernetes.cri.container-name",
)


class _Record(Struct):
    """
    What the metadata say of one container.
    """

    image: str | None = None
    image_id: str | None = None
    created: str | None = None
    labels: dict[str, str] = {}


def look(ref: ContainerRef, tree: Tree, roots: Roots) -> Found | None:
    """
    See the package.
    """
    for state, data in zip(roots.containerd, roots.containerd_data, strict=False):
        tasks = f"{state}/io.containerd.runtime.v2.task"
        for namespace in tree.list(tasks):
            config = tree.json(f"{tasks}/{namespace}/{ref.id}/config.json")
            if isinstance(config, dict):
                return _found(ref.id, namespace, strings(dig(config, "annotations")), tree, data)
    return None


def _found(name: str, namespace: str, notes: dict[str, str], tree: Tree, data: str) -> Found:
    sandbox = notes.get("io.kubernetes.cri.sandbox-id")
    record, pod_record = _records(tree, data, namespace, name, sandbox)
    labels = {**(pod_record.labels if pod_record else {}), **record.labels}
    pod = pod_of(notes, *_POD)
    return Found(
        runtime="docker" if namespace == "moby" else "containerd",
        name=(pod.container if pod else None) or notes.get("nerdctl/name") or labels.get("nerdctl/name") or name,
        image=notes.get("io.kubernetes.cri.image-name") or record.image,
        image_id=record.image_id,
        pod=pod,
        labels=labels,
        created=record.created,
    )


def _records(tree: Tree, data: str, namespace: str, name: str, sandbox: str | None) -> tuple[_Record, _Record | None]:
    """
    The records of a container, and of the sandbox of its pod, whose labels are the pod's.
    """
    fd = tree.open(f"{data}/io.containerd.metadata.v1.bolt/meta.db")
    if fd is None:
        return _Record(), None
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as content:
            record = _record(content, namespace, name)
            return record, _record(content, namespace, sandbox) if sandbox and sandbox != name else None
    except (OSError, ValueError, DecodeError):
        return _Record(), None
    finally:
        os.close(fd)


def _record(content: mmap.mmap, namespace: str, name: str) -> _Record:
    place = (b"v1", namespace.encode("utf-8", "surrogateescape"))
    container = (*place, b"containers", name.encode("utf-8", "surrogateescape"))
    image = bolt.get(content, *container, b"image")
    digest = bolt.get(content, *place, b"images", image, b"target", b"digest") if image else None
    created = bolt.get(content, *container, b"createdat")
    labels = bolt.items(content, *container, b"labels")
    return _Record(
        image=_text(image),
        image_id=_text(digest),
        created=go_time(created) if created else None,
        labels=strings({_text(key): _text(value) for key, value in labels.items()}),
    )


def _text(value: bytes | None) -> str | None:
    return value.decode("utf-8", "surrogateescape") if value and len(value) <= 4096 else None


def go_time(value: bytes) -> str | None:
    """
    The binary form of Go's time.Time as RFC 3339 in UTC: version, seconds since the year 1, nanoseconds, zone.
    """
    try:
        version, seconds, nanoseconds = struct.unpack_from(">BqI", value)
        if version not in (1, 2) or nanoseconds >= 1_000_000_000:
            return None
        moment = datetime(1, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    except (struct.error, OverflowError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"
