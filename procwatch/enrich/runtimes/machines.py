"""
LXC and systemd-nspawn: the cgroup has the name already. LXD and Incus use LXC, and their directories tell them apart.
"""

from __future__ import annotations

from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Found, Roots
from procwatch.enrich.tree import Tree


def look(ref: ContainerRef, tree: Tree, roots: Roots) -> Found | None:
    """
    See the package.
    """
    if ref.runtime not in ("lxc", "nspawn"):
        return None
    for directory, runtime in roots.machines if ref.runtime == "lxc" else ():
        if tree.stat(f"{directory}/{ref.id}") is not None:
            return Found(runtime=runtime, name=ref.id)
    return Found(runtime=ref.runtime, name=ref.id)
