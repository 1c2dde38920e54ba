"""
Which events are shown. A filter is any callable that takes an event of a process and says whether to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

from procwatch.errors import ConfigError
from procwatch.events import ProcessEvent

Predicate = Callable[[ProcessEvent], bool]
# Events wait so long for the names of a container when a filter asks for them, if nothing else is said: a name that is
# not known yet must not hide an event.
NAMES_WAIT_MS = 1000.0


class Filter:
    """
    Keeps the events that fit every criterion that is given; within one, any of its values will do.

    Args:
        container: Names, or ids or their beginnings (at least 4 characters).
        pod: "namespace/name" or "name", with wildcards.
        user: Names or numeric uids.
        unit: Names of systemd units, with wildcards.
        exe: Paths of executables, with wildcards (`*` matches `/`, too), or base names without any `/`.

    Raises:
        ConfigError: An empty value.
    """

    def __init__(
        self,
        *,
        container: Collection[str] = (),
        pod: Collection[str] = (),
        user: Collection[str] = (),
        unit: Collection[str] = (),
        exe: Collection[str] = (),
    ) -> None:
        for name, values in (("container", container), ("pod", pod), ("user", user), ("unit", unit), ("exe", exe)):
            if "" in values:
                raise ConfigError(f"{name} needs a value")
        self._tests: list[Predicate] = []
        if container:
            self._tests.append(lambda event: _in_container(event, container))
        if pod:
            self._tests.append(lambda event: _in_pod(event, pod))
        if user:
            self._tests.append(lambda event: event.user in user or str(event.uid) in user)
        if unit:
            self._tests.append(lambda event: any(fnmatchcase(event.unit or "", pattern) for pattern in unit))
        if exe:
            self._tests.append(lambda event: any(_matches_path(event.exe, pattern) for pattern in exe))
        # These are known for certain only when the names are.
        self.needs_names = bool(container or pod)

    def __bool__(self) -> bool:
        return bool(self._tests)

    def __call__(self, event: ProcessEvent) -> bool:
        """
        Whether to keep the event.
        """
        return all(test(event) for test in self._tests)


def both(first: Predicate | None, second: Predicate | None) -> Predicate | None:
    """
    What is true when both are; None is always true.
    """
    if first is None or second is None:
        return first or second
    return lambda event: first(event) and second(event)


def _in_container(event: ProcessEvent, wanted: Collection[str]) -> bool:
    container = event.container
    if container is None:
        return False
    ids = [container.id, *(container.outer or ())]
    return container.name in wanted or any(
        one == value or (len(value) >= 4 and one.startswith(value)) for one in ids for value in wanted
    )


def _in_pod(event: ProcessEvent, wanted: Collection[str]) -> bool:
    pod = event.container.pod if event.container is not None else None
    if pod is None:
        return False
    full = f"{pod.namespace}/{pod.name}"
    return any(fnmatchcase(full if "/" in value else pod.name or "", value) for value in wanted)


def _matches_path(path: str | None, pattern: str) -> bool:
    if path is None:
        return False
    return fnmatchcase(path if "/" in pattern else path.rpartition("/")[2], pattern)
