"""
Which container, pod and systemd unit a cgroup path stands for. Pure: text in, `Place` out, never an exception.

Container engines put each container into a cgroup of its own, and name the cgroup after the container. The path is
read from the outside in, one segment after the other, with one row of `_NAMED` or `_BELOW` for each habit of an
engine. The last container met is the innermost one; those before it are around it. An id is believed only in the
place where an engine would put it: 64 hex digits anywhere else are somebody's directory.

What a path cannot tell (plain runc and `ctr` use any name, and so does Docker with `--cgroup-parent`), the runtime's
own records can: see `runtimes/runc.py`. The unit follows systemd's rule (cg_path_get_unit in
src/basic/cgroup-util.c): slices first, then the unit; what is below it belongs to the unit itself, and is read again
only for user@UID.service, which is a manager of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

_HEX64 = re.compile(r"[0-9a-f]{64}").fullmatch
# AWS Fargate: the task's id, a dash, a number.
_FARGATE = re.compile(r"[0-9a-f]{32}-[0-9]{1,10}").fullmatch

# A kubelet's pod: the directory "pod<uid>", or a slice below "kubepods" (kind puts "kubelet-" before it). The uid is a
# UUID, or the 32 digits of a static pod's digest; slices write "_" for "-", which has a meaning of its own there.
_UID = r"(?P<uid>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"
_POD_DIRECTORY = re.compile("pod" + _UID).fullmatch
_QUALITY = "(?:-burstable|-besteffort|-guaranteed)?"
_POD_SLICE = re.compile(r"(?:[^-/]+-)*kubepods" + _QUALITY + "-pod" + _UID + r"\.slice").fullmatch

# What stands before the id in the name of a scope: systemd driver.
_SCOPES: dict[str, str] = {
    "docker": "docker",
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod": "podman",
}
_SCOPE = re.compile(r"(?P<engine>[a-z-]+)-(?P<id>[0-9a-f]{64})\.scope").fullmatch
# BuildKit names its steps with 25 digits of base 36; dockerd has one built in.
_STEP = re.compile(r"[0-9a-z]{25}").fullmatch
_STEP_SCOPE = re.compile(r"docker-(?P<id>[0-9a-z]{25})\.scope").fullmatch
# Low-level runtimes told to use systemd name the scope after themselves, and the id is any name.
_PLAIN_SCOPE = re.compile(r"(?P<engine>runc|crun)-(?P<id>.+)\.scope").fullmatch

# The same in the name of a directory: cgroupfs driver.
_DIRECTORIES: dict[str, str] = {
    "libpod-": "podman",
    "libpod-payload-": "podman",  # --cgroups=split: the container's part of its service
    "crio-": "cri-o",
    "kata_": "kata",
}
_DIRECTORY = re.compile(r"(?P<engine>[a-z-]+[-_])(?P<id>[0-9a-f]{64})").fullmatch

# "slice:engine:id" is what a runtime is given for systemd; without systemd's driver it makes a directory of that name.
_TRIPLE = re.compile(r"(?P<slice>[^:]*):(?P<engine>[a-z-]+):(?P<id>[0-9a-f]{64})").fullmatch

# A directory whose children are containers: what their names look like, and whose they are.
_BELOW: dict[str, tuple[Callable[[str], object], str]] = {
    "docker": (_HEX64, "docker"),
    "moby": (_HEX64, "docker"),
    "default": (_HEX64, "containerd"),
    "k8s.io": (_HEX64, "containerd"),
    "buildkit": (_STEP, "buildkit"),
}
# The same, with any name: only at the top of the host or of a container, the words being too common elsewhere.
_BELOW_TOP = {"lxc": "lxc", "lxc.payload": "lxc"}

_LXC_PAYLOAD = re.compile(r"lxc\.payload\.(?P<name>.+)").fullmatch
_NSPAWN_SERVICE = re.compile(r"systemd-nspawn@(?P<name>.+)\.service").fullmatch
_MACHINE_SCOPE = re.compile(r"machine-(?P<name>.+)\.scope").fullmatch
_LIBVIRT_LXC = re.compile(r"lxc-[0-9]+-(?P<name>.+)").fullmatch

_USER_MANAGER = re.compile(r"user@(?P<uid>[0-9]{1,10})\.service").fullmatch
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


class ContainerRef(Struct, frozen=True):
    """
    A container as its cgroup names it.

    `cgroup` is the path of the container's own cgroup: everything below it is inside. `runtime` is None where
    several engines use the same path (a kubelet with the cgroupfs driver).
    """

    id: str
    runtime: str | None
    cgroup: str
    pod_uid: str | None = None
    around: ContainerRef | None = None

    @property
    def outer(self) -> list[str]:
        """
        Ids of the containers around this one, outermost first.
        """
        ids: list[str] = []
        around = self.around
        while around is not None:
            ids.insert(0, around.id)
            around = around.around
        return ids


class Place(Struct, frozen=True):
    """
    What a cgroup path says.

    `unit` is a unit of the host's manager, or of a user's manager: then `unit_user` is that user's uid. Units of a
    systemd inside a container are not the host's, and are not reported.
    """

    container: ContainerRef | None = None
    unit: str | None = None
    unit_user: int | None = None


def parse(cgroup: str) -> Place:
    """
    Read a cgroup path, as /proc/PID/cgroup has it.

    >>> place = parse("/system.slice/docker-" + "ab" * 32 + ".scope")
    >>> place.container.runtime, place.container.id == "ab" * 32
    ('docker', True)
    >>> parse("/user.slice/user-1000.slice/user@1000.service/app.slice/vim.scope")
    Place(container=None, unit='vim.scope', unit_user=1000)
    """
    segments = [segment for segment in cgroup.split("/") if segment]
    containers = _containers(segments)
    outermost = containers
    while outermost is not None and outermost.around is not None:
        outermost = outermost.around
    own = segments if outermost is None else segments[: outermost.cgroup.count("/")]
    unit, unit_user = _unit(own)
    return Place(containers, unit, unit_user)


def _containers(segments: list[str]) -> ContainerRef | None:
    """
    The innermost container of a path, linked to those around it.
    """
    found: ContainerRef | None = None
    inside: list[str] = []  # the segments between the last container, or the host's top, and this one
    pod: str | None = None
    for index, segment in enumerate(segments):
        named = _container(segment, inside, segments[index + 1 : index + 2])
        if named is None:
            inside.append(segment)
            pod = _pod(segment) or pod
            continue
        if found is None or found.id != named[0]:
            path = "/" + "/".join(segments[: index + 1])
            found = ContainerRef(named[0], named[1], path, _pod(segment) or pod, found)
        inside, pod = [], None
    return found


def _container(segment: str, inside: list[str], after: list[str]) -> tuple[str, str | None] | None:
    """
    Id and runtime when this segment, found below `inside`, is a container's cgroup.
    """
    if segment.endswith(".scope"):
        return _scope(segment, after)
    if named := _TRIPLE(segment):
        return (named["id"], _SCOPES[named["engine"]]) if named["engine"] in _SCOPES else None
    if named := _DIRECTORY(segment):
        return (named["id"], _DIRECTORIES[named["engine"]]) if named["engine"] in _DIRECTORIES else None
    if payload := _LXC_PAYLOAD(segment):
        return payload["name"], "lxc"
    if service := _NSPAWN_SERVICE(segment):
        return None if after == _SUPERVISOR else (_unescape(service["name"]), "nspawn")
    return _child(segment, inside)


def _child(segment: str, inside: list[str]) -> tuple[str, str | None] | None:
    """
    The same for a segment that only its surroundings make a container's.
    """
    if not inside:
        return None
    if len(inside) == 1 and inside[0] in _BELOW_TOP:
        return segment, _BELOW_TOP[inside[0]]
    if inside[0] == "ecs" and _FARGATE(segment):
        return segment, "ecs"
    shape, runtime = _BELOW.get(inside[-1], (None, None))
    if shape is not None:
        return (segment, runtime) if shape(segment) else None
    if not _HEX64(segment):
        return None
    if inside[0] == "ecs":
        return segment, "docker"
    # ".." is what a cgroup namespace shows of its surroundings: below it are the reader's own siblings.
    if _pod(inside[-1]) or all(outside == ".." for outside in inside):
        return segment, None
    return None


_SUPERVISOR = ["supervisor"]  # the cgroup of systemd-nspawn itself, which is on the host's side


def _scope(segment: str, after: list[str]) -> tuple[str, str | None] | None:
    """
    The same for a scope of systemd.
    """
    if named := _SCOPE(segment):
        return (named["id"], _SCOPES[named["engine"]]) if named["engine"] in _SCOPES else None
    if named := _STEP_SCOPE(segment):
        return named["id"], "buildkit"
    if named := _PLAIN_SCOPE(segment):
        return _unescape(named["id"]), named["engine"]
    if (named := _MACHINE_SCOPE(segment)) and after != _SUPERVISOR:
        return _machine(_unescape(named["name"]))
    return None


def _machine(name: str) -> tuple[str, str] | None:
    """
    What systemd-machined knows: systemd-nspawn's containers by their name, libvirt's by their driver, number and name.
    """
    if name.startswith("qemu-"):
        return None  # a virtual machine
    libvirt = _LIBVIRT_LXC(name)
    return (libvirt["name"], "lxc") if libvirt else (name, "nspawn")


def _pod(segment: str) -> str | None:
    """
    The uid of the pod whose cgroup this segment is, or that it names in the "slice:engine:id" form.
    """
    pod = _POD_SLICE(segment.partition(":")[0]) or _POD_DIRECTORY(segment)
    return pod["uid"].replace("_", "-") if pod else None


def _unit(segments: list[str]) -> tuple[str | None, int | None]:
    """
    The innermost unit of the host's manager, or of a user's, and the uid of that user.
    """
    unit, rest = _first_unit(segments)
    manager = _USER_MANAGER(unit) if unit else None
    if manager is None:
        return unit, None
    inner, _ = _first_unit(rest)
    return (unit, None) if inner is None else (inner, int(manager["uid"]))


def _first_unit(segments: list[str]) -> tuple[str | None, list[str]]:
    """
    The service or scope after any slices, else the last slice; and the segments after it.
    """
    unit: str | None = None
    for index, segment in enumerate(segments):
        # systemd puts "_" before a name that the kernel could take for a control file (cg_escape).
        name = segment.removeprefix("_")
        if name.endswith(".slice") and len(name) > 6 and ":" not in name:
            unit = name
            continue
        if name.endswith((".service", ".scope")) and not name.startswith("."):
            return name, segments[index + 1 :]
        break
    return unit, []


def _unescape(name: str) -> str:
    """
    A unit's name without systemd's "\\x2d" (systemd.unit(5)); what would not be UTF-8 becomes surrogates.
    """
    if "\\x" not in name or not name.isascii():
        return name
    raw = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)
    return raw.encode("latin-1").decode("utf-8", "surrogateescape")
