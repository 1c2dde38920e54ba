"""
CRI-O: the annotations in the OCI configuration of each container, below /run/containers/storage.
"""

from __future__ import annotations

from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Found, Roots, pod_of, strings
from procwatch.enrich.tree import Tree, decode, dig

_POD = (
    "io.kubernetes.pod.uid",
    "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.name",
    "io.kubernetes.container.name",
)


def look(ref: ContainerRef, tree: Tree, roots: Roots) -> Found | None:
    """
    See the package.
    """
    for root in (*roots.containers_run, *roots.containers):
        config = tree.json(f"{root}/overlay-containers/{ref.id}/userdata/config.json")
        notes = strings(dig(config, "annotations"))
        # Podman writes into the same place, and borrows some of the annotations.
        if notes.get("io.container.manager") != "cri-o":
            continue
        return Found(
            runtime="cri-o",
            name=notes.get("io.kubernetes.container.name") or notes.get("io.kubernetes.cri-o.Name"),
            image=notes.get("io.kubernetes.cri-o.ImageName") or notes.get("io.kubernetes.cri-o.Image"),
            image_id=notes.get("io.kubernetes.cri-o.ImageRef"),
            pod=pod_of(notes, *_POD),
            labels=strings(decode(notes.get("io.kubernetes.cri-o.Labels"))),
            created=notes.get("io.kubernetes.cri-o.Created"),
        )
    return None
