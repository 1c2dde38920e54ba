"""
Container, unit and user of an event, without ever waiting.

`place` and `user` are dict hits. What is met for the first time is answered with what the path itself says, and
looked up by a worker thread meanwhile; `on_ready` is called from that thread when there is something for `collect`.
Everything else happens in the thread that calls: there are no locks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from procwatch.enrich import containers
from procwatch.enrich.containers import ContainerRef, Place
from procwatch.enrich.names import LABELS, Names, may_be_claimed, unnamed
from procwatch.enrich.runtimes import Roots
from procwatch.enrich.users import Users
from procwatch.enrich.worker import Worker
from procwatch.events import Container

Placed = tuple[Container | None, str | None, int | None]
_NOWHERE: Placed = (None, None, None)

# Seconds until a lookup that found nothing is tried again: files appear some milliseconds after the first process,
# or much later where the runtime's disk is slow. An event may be held only for the first ones.
RETRIES: tuple[float, ...] = (0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
_HELD = 3
_HELD_IN_CONTAINER = 5  # where the path says that there is one: its runtime may be slow, 12 s on a busy disk


class Remembered(Struct, frozen=True, array_like=True):
    """
    What is kept of a container over a restart: the names that one of its cgroups had.
    """

    cgroup: str
    key: str  # the container's own cgroup
    identity: int  # the inode of that
    container: Container


class _Answer(NamedTuple):
    """
    What the worker found out: of `cgroup`, whose container is at `key`.
    """

    cgroup: str
    ref: ContainerRef | None
    container: Container | None
    identity: int | None
    final: bool  # no need to hold an event any longer


class _Known(NamedTuple):
    """
    A container, with its names when it is `named`.
    """

    container: Container
    named: bool
    identity: int | None  # the inode of its cgroup; another one is another container of the same name
    cgroups: set[str]  # in `_places`


class Enricher:
    """
    Args:
        roots: Where runtimes keep their files.
        labels: Patterns of the container labels that are reported.
        on_ready: Called from a worker thread when `collect` has something.
        capacity: Cgroups that are remembered; the one unused for longest goes first, and is looked up again if met.
        sweep_s: Seconds between two looks for containers that are gone. They are forgotten at the second one.
    """

    def __init__(
        self,
        *,
        roots: Roots | None = None,
        labels: tuple[str, ...] = LABELS,
        on_ready: Callable[[], None] | None = None,
        capacity: int = 8192,
        sweep_s: float = 5.0,
    ) -> None:
        self._names = Names(roots, labels)
        self._on_ready = on_ready
        self._capacity = capacity
        self._sweep_s = sweep_s
        # Two threads, because a name service may hang for minutes.
        self._worker = Worker("procwatch-containers")
        self._user_worker = Worker("procwatch-users")
        self.generation = 1  # grows when an answer that was given before would be another now
        self._users = Users(self._user_worker, changed=self._changed)
        self._places: OrderedDict[str, Placed] = OrderedDict()
        self._known: dict[str, _Known] = {}  # by the container's own cgroup
        self._keys: dict[str, str] = {}  # cgroup -> that of its container, in `_known`
        self._pending: set[str] = set()
        self._unclear: set[str] = set()  # of these, those that nobody has looked up once
        self._answers: deque[_Answer] = deque()
        self._gone: deque[list[str]] = deque()
        self._fading: set[str] = set()  # cgroups that the last sweep found gone
        self._sweeping = False

    def place(self, cgroup: str | None) -> Placed:
        """
        Container, unit and uid of the unit's user, as far as they are known now.
        """
        if cgroup is None:
            return _NOWHERE
        placed = self._places.get(cgroup)
        if placed is None:
            return self._first(cgroup)
        self._places.move_to_end(cgroup)
        return placed

    def user(self, uid: int | None) -> str | None:
        """
        The name of a user of the host, as far as it is known now.
        """
        return None if uid is None else self._users.name(uid)

    def pending(self, cgroup: str | None) -> bool:
        """
        Whether the names for this cgroup may come within about half a second.
        """
        return cgroup in self._pending

    def unclear(self, cgroup: str | None) -> bool:
        """
        Whether only the lookup that is under way can say if this is a container's cgroup. Begins it.
        """
        self.place(cgroup)
        return cgroup in self._unclear

    def collect(self) -> list[tuple[Container, str]]:
        """
        The containers whose names have become known since the last call, each with its own cgroup.
        """
        while self._gone:
            for key in self._gone.popleft():
                self._forget(key)
            self._sweeping = False
        found: list[tuple[Container, str]] = []
        while self._answers:
            answer = self._answers.popleft()
            self._unclear.discard(answer.cgroup)
            if answer.final:
                self._pending.discard(answer.cgroup)
            if answer.ref is None or answer.cgroup not in self._places:
                continue
            key = answer.ref.cgroup
            known = self._known.get(key)
            if known is None or (answer.container is not None and not known.named):
                known = self._learn(key, answer.ref, answer)
                if known.named:
                    found.append((known.container, key))
            self._put(answer.cgroup, known.container)
            self.generation += 1
            self._join(answer.cgroup, key, known)
        if self._known and not self._sweeping:
            self._sweep_later()
        return found

    def remember(self) -> list[Remembered]:
        """
        The containers that have names, for `recall` after a restart.
        """
        return [
            Remembered(cgroup, key, known.identity, known.container)
            for key, known in self._known.items()
            if known.named and known.identity is not None
            for cgroup in known.cgroups
        ]

    def recall(self, remembered: list[Remembered]) -> None:
        """
        Go on with the names of containers that are still there; disks need not be asked again.
        """
        for one in remembered:
            if self._names.identity(one.key) != one.identity or one.cgroup in self._places:
                continue
            known = self._known.setdefault(one.key, _Known(one.container, True, one.identity, set()))
            place = containers.parse(one.cgroup)
            self._places[one.cgroup] = (one.container, place.unit, place.unit_user)
            self._join(one.cgroup, one.key, known)

    def stats(self) -> dict[str, int]:
        """
        Sizes, and lookups that were refused because too many waited.
        """
        return {
            "cgroups": len(self._places),
            "containers": len(self._known),
            "pending": len(self._pending),
            "refused": self._worker.refused + self._user_worker.refused,
        }

    def _changed(self) -> None:
        self.generation += 1

    def close(self) -> None:
        """
        End the threads.
        """
        self._on_ready = None
        self._worker.close()
        self._user_worker.close()

    def _first(self, cgroup: str) -> Placed:
        place = containers.parse(cgroup)
        ref = place.container
        known = self._known.get(ref.cgroup) if ref else None
        container = known.container if known else unnamed(ref) if ref else None
        placed = (container, place.unit, place.unit_user)
        while len(self._places) >= self._capacity:
            self._drop(next(iter(self._places)))
        self._places[cgroup] = placed
        if known is not None and ref is not None:
            self._join(cgroup, ref.cgroup, known)
        if self._is_new(cgroup, place) and self._worker.submit(lambda: self._look(cgroup, place, 0)):
            self._pending.add(cgroup)
            if container is None:
                self._unclear.add(cgroup)
        return placed

    def _is_new(self, cgroup: str, place: Place) -> bool:
        """
        Whether disks may have something to add.
        """
        if place.container is None:
            return may_be_claimed(cgroup, place)
        # Below a known container there may be another one, which only state files tell.
        return place.container.cgroup != cgroup or cgroup not in self._known

    def _learn(self, key: str, ref: ContainerRef, answer: _Answer) -> _Known:
        """
        A container is new, or has its names now: all that is in it has them.
        """
        before = self._known.get(key)
        cgroups = before.cgroups if before else set()
        container = answer.container or unnamed(ref)
        known = self._known[key] = _Known(container, answer.container is not None, answer.identity, cgroups)
        for cgroup in cgroups:
            self._put(cgroup, container)
        return known

    def _put(self, cgroup: str, container: Container) -> None:
        _, unit, user = self._places[cgroup]
        self._places[cgroup] = (container, unit, user)

    def _join(self, cgroup: str, key: str, known: _Known) -> None:
        """
        `cgroup` is in the container `known` now, and not in one around it any more.
        """
        if self._keys.get(cgroup, key) != key:
            self._leave(cgroup)
        self._keys[cgroup] = key
        known.cgroups.add(cgroup)

    def _leave(self, cgroup: str) -> None:
        key = self._keys.pop(cgroup, None)
        if key is not None:
            self._known[key].cgroups.discard(cgroup)
            if not self._known[key].cgroups:
                del self._known[key]

    def _drop(self, cgroup: str) -> None:
        del self._places[cgroup]
        self._pending.discard(cgroup)
        self._unclear.discard(cgroup)
        self._leave(cgroup)

    def _forget(self, key: str) -> None:
        for cgroup in list(self._known[key].cgroups) if key in self._known else ():
            self._drop(cgroup)

    # In the worker.

    def _look(self, cgroup: str, place: Place, tries: int) -> None:
        ref = self._names.find(cgroup, place)
        held = _HELD if ref is None else _HELD_IN_CONTAINER
        container = self._names.lookup(ref) if ref else None
        identity = self._names.identity(ref.cgroup) if ref else None
        # Later tries are for containers that are still there.
        more = container is None and tries < (_HELD if identity is None else len(RETRIES))
        self._answers.append(_Answer(cgroup, ref, container, identity, final=not more or tries >= held))
        if more:
            self._worker.submit(lambda: self._look(cgroup, place, tries + 1), RETRIES[tries])
        self._wake()

    def _wake(self) -> None:
        if (wake := self._on_ready) is not None:
            wake()

    # Containers that are gone are forgotten, but not at once: their last exits may still be on their way.

    def _sweep_later(self) -> None:
        # Without an identity there is no way to see that it goes (no cgroup file system here): age has to do.
        keys = [(key, known.identity) for key, known in self._known.items() if known.identity is not None]
        self._sweeping = self._worker.submit(lambda: self._sweep(keys), self._sweep_s)

    def _sweep(self, keys: list[tuple[str, int]]) -> None:
        now = {key: self._names.identity(key) for key, _ in keys}
        gone = {key for key, _ in keys if now[key] is None}
        replaced = [key for key, identity in keys if now[key] is not None and now[key] != identity]
        self._gone.append([*(gone & self._fading), *replaced])
        self._fading = gone
        self._wake()
