"""
From a container's id to its names, by the files of its runtime. May block: only for a worker thread.

Containers in containers are looked up in the tree of the one around them, through /proc/PID/root of a process of it:
the Docker in a Docker container keeps its files there. Such a tree is hostile. What it claims counts only below the
cgroup of the container that it belongs to, as what a user's files claim counts only in that user's slice.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase

from msgspec import Struct
from msgspec.structs import replace

from procwatch.enrich import mounts
from procwatch.enrich.containers import ContainerRef, Place, parse
from procwatch.enrich.runtimes import Found, Roots, containerd, crio, docker, kubelet, machines, podman, runc
from procwatch.enrich.tree import Tree
from procwatch.events import Container, Pod

# Labels that say what a container is for, not how it was made.
LABELS: tuple[str, ...] = (
    "app",
    "app.kubernetes.io/*",
    "k8s-app",
    "com.docker.compose.project",
    "com.docker.compose.service",
)
_MAX_LABELS = 32

Look = Callable[[ContainerRef, Tree, Roots], Found | None]
# Whose files are asked for a container of which runtime; None: its path did not say.
_LOOKS: dict[str | None, tuple[Look, ...]] = {
    "docker": (docker.look, containerd.look),
    "containerd": (containerd.look,),
    "cri-o": (crio.look,),
    "podman": (podman.look,),
    "kata": (containerd.look, crio.look),
    "lxc": (machines.look,),
    "nspawn": (machines.look,),
    "runc": (runc.look,),
    "crun": (runc.look,),
    None: (containerd.look, docker.look, crio.look),
}
_USER_SLICE = re.compile(r"(?P<slice>/user\.slice/user-(?P<uid>[1-9][0-9]{0,9})\.slice/)(?P<manager>user@[0-9])?").match
# Directories that engines make for their containers: no container themselves.
_ENGINES = frozenset({"", "docker", "buildkit", "moby", "default", "k8s.io", "libpod_parent", "kubepods", "burstable",
                      "besteffort", "guaranteed", "lxc", "lxc.payload", "ecs"})  # fmt: skip
_MAX_DEPTH = 4  # containers in containers that only their state files tell
_MAX_STATES = 10_000
_FOREIGN_PATHS = ("/run", "/var/lib", "/var/log")


class _Trees(Struct, frozen=True):
    """
    Files to look in: whose they are, and the cgroups that they may speak of.
    """

    tree: Tree
    roots: Roots
    mounts: list[mounts.Mount]  # as its runtimes see them; []: the host's
    within: str


class Names:
    """
    Finds containers and their names on disk.

    Args:
        roots: Where runtimes keep their files.
        labels: Patterns of the labels that are reported, as fnmatch has them.
    """

    def __init__(self, roots: Roots | None = None, labels: tuple[str, ...] = LABELS) -> None:
        self._roots = roots or Roots()
        self._labels = labels
        # State files do not change their cgroup, so each is read once: place and inode -> cgroups.
        self._states: dict[tuple[str, str, str, int, int], set[str]] = {}
        self._own_mounts: list[mounts.Mount] = []

    def find(self, cgroup: str, place: Place) -> ContainerRef | None:
        """
        The innermost container of a cgroup, with what only state files tell: plain runc, any `--cgroup-parent`.
        """
        found = _within(self._claimed_around(place.container), place.container)
        for _ in range(_MAX_DEPTH):
            inner = self._claimed(cgroup, found)
            if inner is None:
                break
            found = inner
        return found if found is not None else self._elsewhere(cgroup)

    def _elsewhere(self, cgroup: str) -> ContainerRef | None:
        """
        The container of a cgroup by its processes' places in the other hierarchies.

        On hosts with v1 and v2 side by side, runc in a container makes its v2 cgroup outside of that container's.
        """
        pid = self._process_of(cgroup, "") if len(self._mounts()) > 1 else None
        others = _cgroups_of(pid) if pid else set()
        if cgroup not in others:
            return None
        for other in sorted(others - {cgroup, "/"}, key=len):
            place = parse(other)
            found = place.container
            if found is None and may_be_claimed(other, place):
                found = self._claimed(other, None)
            if found is not None:
                return self._claimed(other, found) or found
        return None

    def lookup(self, ref: ContainerRef) -> Container | None:
        """
        A container with its names, or None where no runtime's files know it.
        """
        if "/" in ref.id or ref.id in (".", ".."):
            return None
        looks = _LOOKS.get(ref.runtime, ())
        with closing(self._trees(ref.around, ref.cgroup)) as everywhere:
            for trees in everywhere:
                found = next((found for look in looks if (found := look(ref, trees.tree, trees.roots))), None)
                pod = found.pod if found else None
                if pod is None and ref.pod_uid is not None:
                    pod = kubelet.pod(ref, trees.tree, trees.roots)
                if found or pod:
                    return self._container(ref, found or Found(name=pod.container if pod else None), pod)
        return None

    def identity(self, cgroup: str) -> int | None:
        """
        The inode of a cgroup's directory, which a new cgroup of the same name does not have; None when it is gone.
        """
        for directory in mounts.directories_of(cgroup, self._mounts()):
            try:
                return os.stat(directory).st_ino
            except OSError:
                continue
        return None

    def _container(self, ref: ContainerRef, found: Found, pod: Pod | None) -> Container:
        labels = {
            key: value
            for key, value in (found.labels or {}).items()
            if any(fnmatchcase(key, pattern) for pattern in self._labels)
        }
        return replace(
            unnamed(ref),
            runtime=found.runtime or ref.runtime,
            name=found.name,
            image=found.image,
            image_id=found.image_id,
            pod=replace(pod, uid=pod.uid or ref.pod_uid) if pod else unnamed(ref).pod,
            labels=dict(list(labels.items())[:_MAX_LABELS]) or None,
            created=found.created,
        )

    def _mounts(self) -> list[mounts.Mount]:
        if not self._own_mounts:
            self._own_mounts = [mount for mount in mounts.of() if mount.kind in ("cgroup", "cgroup2")]
        return self._own_mounts

    def _claimed_around(self, ref: ContainerRef | None) -> ContainerRef | None:
        """
        The plain container around all those that a path has shown.
        """
        if ref is None:
            return None
        while ref.around is not None:
            ref = ref.around
        parent = ref.cgroup.rpartition("/")[0]
        return None if all(map(_is_nobodys, parent.split("/"))) else self._claimed(parent, None)

    def _claimed(self, cgroup: str, around: ContainerRef | None) -> ContainerRef | None:
        """
        The container just inside `around` (None: the host) whose state file claims `cgroup` or one above it.
        """
        if cgroup == "/" or (around is not None and cgroup == around.cgroup):
            return None
        best: ContainerRef | None = None
        with closing(self._trees(around, cgroup, claims=True)) as everywhere:
            for name, runtime, claim in (claim for trees in everywhere for claim in self._claims(trees)):
                if mounts.is_below(cgroup, claim) and (best is None or len(claim) > len(best.cgroup)):
                    best = ContainerRef(name, runtime, claim, around=around)
        return best

    def _claims(self, trees: _Trees) -> Iterator[tuple[str, str, str]]:
        """
        Id, runtime and cgroup of the containers of which there is a state file.
        """
        for directory, runtime in runc.directories(trees.tree, trees.roots):
            for name in trees.tree.list(directory):
                for claim in self._cgroups(trees, directory, name):
                    if claim.startswith(trees.within):
                        yield name, runtime, claim

    def _cgroups(self, trees: _Trees, directory: str, name: str) -> set[str]:
        state = trees.tree.stat(f"{directory}/{name}/state.json") or trees.tree.stat(f"{directory}/{name}/status")
        if state is None:
            return set()
        key = (trees.tree.root, directory, name, state.st_ino, state.st_mtime_ns)
        known = self._states.get(key)
        if known is None:
            if len(self._states) >= _MAX_STATES:
                self._states.clear()
            seen = trees.mounts or self._host_mounts()
            claims = runc.cgroups(trees.tree, directory, name, seen)
            # A runtime that may not make cgroups leaves its container where it was started: in somebody's session.
            known = self._states[key] = {claim for claim in claims if may_be_claimed(claim, parse(claim))}
        return known

    def _trees(
        self, around: ContainerRef | None, cgroup: str, *, claims: bool = False
    ) -> Generator[_Trees, None, None]:
        """
        Where to look for a container: in the one around it, then on the host, then at a user's.

        With `claims`, to see whose a cgroup is: then a container's are looked for only in the container itself.
        """
        if around is not None:
            with self._inside(around, cgroup) as trees:
                if trees is not None:
                    yield trees
            if claims:
                return
        try:
            host = Tree(self._roots.prefix)
        except OSError:
            return
        with host:
            user = _USER_SLICE(cgroup)
            # A user's manager makes any scope he asks for, "docker-<id of another's container>.scope" too.
            if claims or user is None or user["manager"] is None:
                yield _Trees(host, self._roots, [], "/")
            if user and (home := _home(int(user["uid"]))):
                yield _Trees(host, self._roots.of_user(home, int(user["uid"])), [], user["slice"])

    def _host_mounts(self) -> list[mounts.Mount]:
        """
        The cgroup mounts that the host's runtimes see, which are not ours where the agent is in a container.
        """
        return [mount for mount in mounts.of(1) if mount.kind in ("cgroup", "cgroup2")] or self._mounts()

    @contextmanager
    def _inside(self, around: ContainerRef, cgroup: str) -> Iterator[_Trees | None]:
        """
        The tree of a container, by one of its processes.
        """
        pid = self._process_of(around.cgroup, cgroup)
        seen = mounts.of(pid) if pid else []
        if pid is None or not all(mounts.is_local(path, seen) for path in _FOREIGN_PATHS):
            yield None
            return
        try:
            tree = Tree(f"/proc/{pid}/root", foreign=True)
        except OSError:
            yield None
            return
        with tree:
            # Only now, with the root held: a number could be another process's by the time that it was opened.
            same = any(mounts.is_below(cgroup, around.cgroup) for cgroup in _cgroups_of(pid))
            yield _Trees(tree, replace(self._roots, prefix="/"), seen, around.cgroup + "/") if same else None

    def _process_of(self, cgroup: str, besides: str) -> int | None:
        """
        A process of a container that is not in the container at `besides` within it.
        """
        for directory in mounts.directories_of(cgroup, self._mounts()):
            for place in (directory, *_children(directory)):
                name = place.removeprefix(directory)
                if besides and name and mounts.is_below(besides, cgroup + name):
                    continue
                try:
                    with open(f"{place}/cgroup.procs", encoding="ascii") as file:
                        pid = file.readline().strip()
                except OSError:
                    continue
                if pid and pid != "0":
                    return int(pid)
        return None


def unnamed(ref: ContainerRef) -> Container:
    """
    A container as long as only its cgroup is known.
    """
    pod = Pod(ref.pod_uid, None, None) if ref.pod_uid else None
    return Container(ref.id, ref.runtime, None, None, pod, outer=ref.outer or None)


def _within(around: ContainerRef | None, ref: ContainerRef | None) -> ContainerRef | None:
    """
    `ref` with one more container around its outermost one.
    """
    if around is None or ref is None:
        return ref
    return replace(ref, around=around if ref.around is None else _within(around, ref.around))


def may_be_claimed(cgroup: str, place: Place) -> bool:
    """
    Whether a runtime may have made this cgroup without a sign of it: not the root, a service, a session or a slice.
    """
    last = cgroup.rpartition("/")[2]
    is_unit = last == "" or last == place.unit
    return not is_unit or (last.endswith(".scope") and last != "init.scope" and not last.startswith("session-"))


def _is_nobodys(segment: str) -> bool:
    return segment in _ENGINES or segment.endswith(".slice") or segment.startswith("pod")


def _home(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_dir.rstrip("/") or None
    except KeyError:
        return None


def _cgroups_of(pid: int) -> set[str]:
    """
    Where a process is in all hierarchies.
    """
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return {line.rstrip("\n").split(":", 2)[2] for line in file if line.count(":") >= 2}
    except OSError:
        return set()


def _children(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
