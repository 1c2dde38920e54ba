"""
The kubelet's log directories name every pod and container on the node, whatever the runtime.

`pods/<namespace>_<pod>_<uid>/<container>/` and, as symbolic links, `containers/<pod>_<namespace>_<container>-<id>.log`.
Neither a namespace nor a pod may have "_" in its name, so this can be read back.
"""

from __future__ import annotations

from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Roots
from procwatch.enrich.tree import Tree
from procwatch.events import Pod


def pod(ref: ContainerRef, tree: Tree, roots: Roots) -> Pod | None:
    """
    The pod that a container belongs to.
    """
    for root in roots.logs:
        for entry in tree.list(f"{root}/containers"):
            parts = entry.removesuffix(f"-{ref.id}.log").split("_")
            if len(parts) == 3 and entry.endswith(f"-{ref.id}.log"):
                return Pod(ref.pod_uid, parts[1], parts[0], parts[2])
        if ref.pod_uid is None:
            continue
        for entry in tree.list(f"{root}/pods"):
            parts = entry.split("_")
            if len(parts) == 3 and parts[2] == ref.pod_uid:
                return Pod(ref.pod_uid, parts[0], parts[1], None)
    return None
