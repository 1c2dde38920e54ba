"""
runc and crun used directly, or by an engine that puts its containers into any cgroup it is told to.

Their cgroup has no sign of being a container's (`runc run web` makes /web), so this goes the other way round: each
container's state file says which cgroup it has. The state is written before the container's first program starts.
"""

from __future__ import annotations

from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.mounts import Mount, cgroup_of
from procwatch.enrich.runtimes import Found, Roots, strings
from procwatch.enrich.tree import Tree, dig, text

_IMAGE = ("org.opencontainers.image.ref.name", "org.opencontainers.image.title")


def look(ref: ContainerRef, tree: Tree, roots: Roots) -> Found | None:
    """
    See the package.
    """
    for directory, runtime in directories(tree, roots):
        state = _state(tree, directory, ref.id)
        if state is None:
            continue
        notes = strings(dig(tree.json(f"{_bundle(state)}/config.json"), "annotations"))
        return Found(
            runtime=runtime,
            name=ref.id,
            image=next((notes[key] for key in _IMAGE if key in notes), None),
            labels=notes,
            created=text(state, "created"),
        )
    return None


def directories(tree: Tree, roots: Roots) -> list[tuple[str, str]]:
    """
    The state directories that may be there, and the runtime that they belong to.
    """
    found: list[tuple[str, str]] = []
    for directory, runtime in roots.runc:
        parent, _, last = directory.rpartition("/")
        found.extend((f"{parent}/{name}", runtime) for name in ([last] if last != "*" else tree.list(parent)))
    return found


def cgroups(tree: Tree, directory: str, name: str, mounts: list[Mount]) -> set[str]:
    """
    The cgroups, one for each hierarchy, of a container whose state is in `directory`.
    """
    state = _state(tree, directory, name)
    paths = dig(state, "cgroup_paths")
    found = {
        cgroup
        for path in (paths.values() if isinstance(paths, dict) else ())
        if isinstance(path, str) and (cgroup := cgroup_of(path, mounts)) is not None
    }
    if (crun := text(state, "cgroup-path")) is not None:
        found.add("/" + crun.strip("/"))
    return found - {"/"}


def _state(tree: Tree, directory: str, name: str) -> object:
    """
    runc's state.json, or crun's status: both JSON.
    """
    return tree.json(f"{directory}/{name}/state.json") or tree.json(f"{directory}/{name}/status")


def _bundle(state: object) -> str:
    """
    The directory with the container's configuration: crun says it plainly, runc in a label.
    """
    if (bundle := text(state, "bundle")) is not None:
        return bundle
    labels = dig(state, "config", "labels")
    for label in labels if isinstance(labels, list) else ():
        if isinstance(label, str) and label.startswith("bundle="):
            return label.removeprefix("bundle=")
    return ""
