"""
Docker: `containers/<id>/config.v2.json` below its data directory, written before the first process starts.
"""

from __future__ import annotations

from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Found, Roots, pod_of, strings
from procwatch.enrich.tree import Tree, dig, text

# What the kubelet's shim for Docker (dockershim, cri-dockerd) writes on its containers.
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
    for root in roots.docker:
        config = tree.json(f"{root}/containers/{ref.id}/config.v2.json")
        if text(config, "ID") != ref.id:
            continue
        labels = strings(dig(config, "Config", "Labels"))
        return Found(
            runtime="docker",
            name=(text(config, "Name") or "").removeprefix("/") or None,
            image=text(config, "Config", "Image"),
            image_id=text(config, "Image"),
            pod=pod_of(labels, *_POD),
            labels=labels,
            created=text(config, "Created"),
        )
    return None
