"""
watch(): the pipeline on an asyncio loop. Owns the loop's readers, the timers and the shutdown.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator
from contextlib import suppress
from types import TracebackType
from typing import Self

from procwatch import options
from procwatch.clock import Clock
from procwatch.enrich.enricher import Enricher
from procwatch.enrich.inspector import Inspector
from procwatch.enrich.runtimes import Roots
from procwatch.errors import ConfigError, ProcwatchError, SourceLost
from procwatch.events import DEFAULT_KINDS, AnyEvent, Event, Exit, Lost, Ready, Running, Stop, Vanished
from procwatch.facts import Alive
from procwatch.formats.native import Lines
from procwatch.pipeline import Pipeline, Stats
from procwatch.policy.filter import NAMES_WAIT_MS, Filter, Predicate, both
from procwatch.sources import procfs, select
from procwatch.sources.base import Source, Ticking
from procwatch.state import State, save
from procwatch.table.draft import Draft, Maker
from procwatch.table.process import Process

QUEUE = 65_536
# Ends that wait_exit() still answers for, after the process left the table.
RECENT_EXITS = 4096
# snapshot() waits so long for the names of containers, which a thread reads from disk.
NAMES_S = 1.0
Sink = Callable[[list[Event]], None]
DraftSink = Callable[[list[Event | Draft]], None]


class Subscription:
    """
    One consumer's bounded queue: `async for event in subscription`.

    When it is full, events are dropped for this consumer only, counted, and a `lost` event with `where="consumer"`
    stands where they were.
    """

    def __init__(self, watcher: Watcher, size: int) -> None:
        self._watcher = watcher
        self._size = size
        self._queue: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._dropped = 0
        self._since: str | None = None
        self.peak = 0  # most events that ever waited

    def put(self, batch: list[Event]) -> None:
        """
        Take events; called by the watcher.
        """
        queue = self._queue
        room = self._size - len(queue)
        if self._dropped and room > 0:
            self._tell_dropped(batch[0].time if batch else None)
            room -= 1
        queue.extend(batch[: max(room, 0)])
        dropped = batch[max(room, 0) :]
        last = dropped.pop() if dropped and type(dropped[-1]) is Stop else None
        if dropped:
            self._since = self._since or dropped[0].time
            self._dropped += len(dropped)
        if last is not None:  # it comes always
            if self._dropped:
                self._tell_dropped(last.time)
            queue.append(last)
        self.peak = max(self.peak, len(queue))
        self._wake.set()

    def _tell_dropped(self, until: str | None) -> None:
        self._queue.append(
            Lost(
                time=until or self._since or "",
                host=self._watcher.ready.host,
                count=self._dropped,
                exact=True,
                where="consumer",
                since=self._since,
                until=until,
            )
        )
        self._dropped, self._since = 0, None

    def close(self) -> None:
        """
        No more events; what is queued is still given.
        """
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyEvent:
        while not self._queue:
            if self._dropped:
                self._tell_dropped(None)
            elif self._closed:
                self._watcher.raise_failure()
                raise StopAsyncIteration
            else:
                self._wake.clear()
                await self._wake.wait()
        return self._queue.popleft()  # type: ignore[return-value]

    async def batch(self) -> list[Event]:
        """
        All that is queued, at least one event; empty at the end.
        """
        try:
            first = await anext(self)
        except StopAsyncIteration:
            return []
        rest, self._queue = list(self._queue), deque()
        return [first, *rest]


class Watcher:
    """
    Watch the processes of this host, as an async context manager and async iterator.

    Args:
        backend: "auto" for the best that works here, or "netlink", "scan" ...
        events: Kinds of events, see `procwatch.KINDS`, or the same with commas; ready, lost and stop always come.
        initial: Begin with a `running` event for each process that is there.
        buffer: Kernel buffer of each source, in bytes or as "1MiB"; None: each source's default (64 MiB for netlink).
        latency_ms: How long events may gather under load, milliseconds.
        fork_hold_ms: How long a fork may wait for its exec, so that both are one event; 0: always tell both.
        without: Sources to leave out, such as "fanotify".
        ancestors: Put so many `ancestors` into each event.
        count: Stop after so many events of processes.
        strict: Stop after the first `lost`.
        for_s: Stop after so many seconds.
        keep: Show only the events of processes for which this callable is true.
        container: Only in these containers: names, ids or their beginnings.
        pod: Only in these pods: "namespace/name", with wildcards.
        user: Only of these users: names or numbers.
        unit: Only in these systemd units, with wildcards.
        exe: Only of these executables: paths or base names, with wildcards.
        under: Show only the process with this pid and its descendants.
        hold: Make each exec of this host wait until it has been read: see docs/hold.md for what that costs and risks.
        container_wait_ms: How long events may wait for the names of a new container; 0: they go out with its id alone;
            None: 0, or 1000 with `container` or `pod`.
        roots: Where container runtimes keep their files, see procwatch.enrich.runtimes.Roots; None: their defaults.
        hash: "sha256": the hash of each executable, from the file that ran, in a worker.
        hash_wait_ms: How long events may wait for it; later events of the same file have it at once.
        file_facts: Owner, mode and capabilities of each executable, and whether a container changed it.
        queue: Events that a consumer may be behind; beyond that it gets a `lost` event.
        sources: Opened or not, instead of `backend`: for tests, see procwatch.testing.

    Raises:
        ConfigError: A value that cannot be.
        SourceUnavailable: On entering: the backend cannot work here.

    Example:
        >>> async def first() -> str:
        ...     async with Watcher(backend="scan") as watcher:
        ...         async for event in watcher:
        ...             return event.event
        >>> asyncio.run(first())
        'ready'
    """

    def __init__(
        self,
        *,
        backend: str = "auto",
        events: Collection[str] | str = DEFAULT_KINDS,
        initial: bool = False,
        buffer: int | str | None = None,
        latency_ms: float = 20,
        fork_hold_ms: float = 100,
        without: Collection[str] = (),
        ancestors: int = 0,
        count: int | None = None,
        strict: bool = False,
        for_s: float | None = None,
        keep: Predicate | None = None,
        container: Collection[str] | str = (),
        pod: Collection[str] | str = (),
        user: Collection[str] | str = (),
        unit: Collection[str] | str = (),
        exe: Collection[str] | str = (),
        under: int | None = None,
        hold: bool = False,
        container_wait_ms: float | None = None,
        roots: Roots | None = None,
        hash: str | None = None,  # noqa: A002
        hash_wait_ms: float = 0,
        file_facts: bool = False,
        queue: int = QUEUE,
        sources: list[Source] | None = None,
    ) -> None:
        kinds = options.event_kinds(events)
        for name, value, least in (
            ("latency_ms", latency_ms, 0),
            ("fork_hold_ms", fork_hold_ms, 0),
            ("ancestors", ancestors, 0),
            ("container_wait_ms", container_wait_ms, 0),
            ("hash_wait_ms", hash_wait_ms, 0),
            ("queue", queue, 1),
            ("count", count, 1),
            ("for_s", for_s, 0),
        ):
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{name}={value} cannot be: {least} or more")
        if sources is not None and not sources:
            raise ConfigError("sources=[] cannot be: at least one")
        if hash not in (None, "sha256"):
            raise ConfigError(f"no hash {hash!r}: only sha256")
        self._backend = backend
        self._kinds = kinds | ({"running"} if initial else frozenset())
        self._initial = initial
        self._count = count
        self._strict = strict
        self._for_s = for_s
        chosen = Filter(
            container=_several(container),
            pod=_several(pod),
            user=_several(user),
            unit=_several(unit),
            exe=_several(exe),
        )
        if container_wait_ms is None:
            asks = chosen.needs_names or (isinstance(keep, Filter) and keep.needs_names)
            container_wait_ms = NAMES_WAIT_MS if asks else 0
        self._keep = both(keep, chosen if chosen else None)
        self._under = under
        self._name_wait_ns = int(container_wait_ms * 1_000_000)
        self._hash_wait_ns = int(hash_wait_ms * 1_000_000)
        self._roots = roots
        self._hash = hash
        self._file_facts = file_facts
        self._options = select.Options(
            options.buffer_bytes(buffer), latency_ms / 1000, tuple(without), self._kinds, hold
        )
        self._hold_ns = int(fork_hold_ms * 1_000_000)
        self._ancestors = ancestors
        self._queue = queue
        self._given = sources
        self.maker = Maker(socket.gethostname(), Clock())  # makes events of the drafts that sinks get
        self._enricher: Enricher | None = None
        self._inspector: Inspector | None = None
        self._selection: select.Selection | None = None
        self._opened_ns = 0
        self._pipeline: Pipeline | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fds: dict[int, Source] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._due_ns: int | None = None  # of the timer "deadline"
        self._subscriptions: list[Subscription] = []
        self._sinks: list[Sink] = []
        self._draft_sinks: list[DraftSink] = []
        self._lines: Lines | None = None
        self._default: Subscription | None = None
        self._exits: OrderedDict[str, Draft] = OrderedDict()
        # By pid, for an id may be corrected by a tick; with the process, if it is still in the table.
        self._waiting: dict[int, list[tuple[asyncio.Future[Draft | None], Process | None]]] = {}
        self._on_end: list[Callable[[], None]] = []
        self._failure: BaseException | None = None
        self._stopped = False
        self._stop_wanted = False

    # Life

    async def __aenter__(self) -> Self:
        """
        Open the sources and look through /proc in a thread: that takes some 100 ms, and a busy loop must go on.
        """
        beginning = asyncio.ensure_future(asyncio.to_thread(self._begin))
        try:
            alive = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            with suppress(ProcwatchError):
                await beginning  # what it opens must be closed again
            self.close()
            raise
        self.start(alive=alive)
        if self._stop_wanted:
            self.stop()
        return self

    def _begin(self) -> list[Alive]:
        self.open()
        return procfs.snapshot()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> list[str]:
        """
        Open the sources only, so that privileges can be dropped before `start`; the kernel gathers meanwhile.

        Returns:
            Their names.
        """
        if self._selection is not None:
            raise ProcwatchError("a watcher can be started only once: make another")
        self._opened_ns = self.maker.clock.now_ns()
        self._selection = self._select()
        return [source.name for source in self._selection.sources]

    def start(self, state: State | None = None, alive: list[Alive] | None = None) -> None:
        """
        Open the sources, if `open` did not, and begin; `ready` is set then. Called by `async with`.

        Args:
            state: What an earlier run of the same boot knew, see procwatch.state.
            alive: Who is alive, looked for since `open`; None: look now.
        """
        if self._pipeline is not None:
            raise ProcwatchError("a watcher can be started only once: make another")
        self._loop = asyncio.get_running_loop()
        if self._selection is None:
            self.open()
        assert self._selection is not None
        selection, started_ns = self._selection, self._opened_ns
        self._inspector = Inspector(
            files=self._file_facts, hashes=self._hash is not None, on_ready=self._wake_for_names
        )
        self._enricher = Enricher(roots=self._roots, on_ready=self._wake_for_names)
        self.maker.names = self._enricher
        if state is not None:
            self._enricher.recall(state.containers)
        try:
            self._pipeline = Pipeline(
                selection.backend,
                selection.sources,
                selection.skipped + select.limits(selection.sources),
                maker=self.maker,
                started_ns=started_ns,
                kinds=self._kinds,
                hold_ns=self._hold_ns,
                ancestors=self._ancestors,
                limit=self._count,
                strict=self._strict,
                keep=self._keep,
                under=self._under,
                name_wait_ns=self._name_wait_ns,
                hash_wait_ns=self._hash_wait_ns,
                inspector=self._inspector,
                listen=self._listen,
            )
            self._pipeline.express(self._lines)
            self._default = None if self._sinks or self._draft_sinks else self.subscribe()
            before = state.processes if state is not None else ()
            self._give(self._pipeline.start(initial=self._initial, before=before, alive=alive))
        except BaseException:
            for source in selection.sources:
                source.close()
            raise
        for source in selection.sources:
            self._listen(source, True)
        lead = selection.sources[0]
        if lead.fileno() is None:
            self._turn_later(lead, lead.quiet if isinstance(lead, Ticking) else None)
        if self._for_s is not None:
            self._timers["for"] = self._loop.call_later(self._for_s, self.stop)
        if self._pipeline.finished:  # what was alive was enough
            self.stop()
        self._schedule()

    def _select(self) -> select.Selection:
        if self._given is None:
            return select.open_sources(self._backend, self._options)
        try:
            for source in self._given:
                source.open()
        except BaseException:
            for source in self._given:
                source.close()
            raise
        return select.Selection(self._given[0].name, list(self._given), [])

    def stop(self) -> None:
        """
        Take what the kernel has queued, give `stop` as the last event, and end the iteration.

        While it is being entered, that is done as soon as it has begun.
        """
        if self._pipeline is None or self._stopped:
            self._stop_wanted = True
            return
        self._detach()
        try:
            self._give(self._pipeline.stop())
        except SourceLost as error:
            self._failure = error
        finally:
            self._finish()

    def close(self) -> None:
        """
        End at once: sources closed, consumers get what they have queued. May be called twice.
        """
        if not self._stopped:
            self._detach()
            self._finish()

    def _detach(self) -> None:
        self._stopped = True
        if self._loop is not None:
            for fd in self._fds:
                self._loop.remove_reader(fd)
        self._fds.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _finish(self) -> None:
        if self._enricher is not None:
            self._enricher.close()
        if self._inspector is not None:
            self._inspector.close()
        if self._selection is not None:
            for source in self._selection.sources:
                source.close()
        for subscription in self._subscriptions:
            subscription.close()
        for call in self._on_end:
            call()
        for waiting in self._waiting.values():
            for future, _ in waiting:
                if not future.done():
                    future.set_result(None)
        self._waiting.clear()

    def raise_failure(self) -> None:
        """
        Raise what ended the watcher, if anything did.
        """
        if self._failure is not None:
            raise self._failure

    # Turns

    def _listen(self, source: Source, on: bool) -> None:
        """
        Be woken by a source, or no longer.
        """
        assert self._loop is not None
        fd = source.fileno()
        if on and fd is not None and not self._stopped:
            self._fds[fd] = source
            self._loop.add_reader(fd, self._readable, fd)
        elif not on and fd in self._fds:
            del self._fds[fd]
            self._loop.remove_reader(fd)
            if timer := self._timers.pop(f"fd{fd}", None):
                timer.cancel()

    def _readable(self, fd: int) -> None:
        source = self._fds[fd]
        delay = source.delay_s()
        if not delay:
            self._turn()
            return
        # Let facts gather: the wake-ups are the cost. The descriptor would stay readable meanwhile.
        assert self._loop is not None
        self._loop.remove_reader(fd)
        self._timers[f"fd{fd}"] = self._loop.call_later(delay, self._gathered, fd)

    def _gathered(self, fd: int) -> None:
        self._turn()
        if self._stopped:
            return
        assert self._loop is not None
        assert self._pipeline is not None
        source = self._fds.get(fd)
        if source is None:  # it failed, and has another one now
            return
        # Under load a timer alone is enough, and saves two changes of the poll set and a wake-up for each turn.
        if source is self._pipeline.sources[0] and self._pipeline.found and (delay := source.delay_s()):
            self._timers[f"fd{fd}"] = self._loop.call_later(delay, self._gathered, fd)
        else:
            with suppress(OSError):  # closed by somebody else: the pipeline finds that out
                self._loop.add_reader(fd, self._readable, fd)

    def _turn_later(self, source: Source, quiet: Callable[[], bool] | None) -> None:
        assert self._loop is not None
        self._timers["tick"] = self._loop.call_later(source.delay_s(), self._tick, source, quiet)

    def _tick(self, source: Source, quiet: Callable[[], bool] | None) -> None:
        if quiet is None or not quiet():
            self._turn()
        if not self._stopped:
            self._turn_later(source, quiet)

    def _turn(self) -> None:
        assert self._pipeline is not None
        try:
            self._give(self._pipeline.turn())
        except Exception as error:
            self._failure = error
            self.close()
        else:
            if self._waiting:
                self._end_waits()
            if self._pipeline.finished:
                self.stop()
            self._schedule()

    def _wake_for_names(self) -> None:
        """
        Called in a worker's thread.
        """
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._named)
        except RuntimeError:  # the loop was closed meanwhile
            pass

    def _named(self) -> None:
        """
        A worker has found names.
        """
        if not self._stopped and self._pipeline is not None and self._enricher is not None:
            self._give(self._pipeline.announce(self._enricher.collect()))

    def _schedule(self) -> None:
        """
        Wake for what the table waits for, and for nothing else: an idle host costs nothing.
        """
        if self._stopped:
            return
        assert self._pipeline is not None
        assert self._loop is not None
        deadline = self._pipeline.deadline_ns()
        if deadline == self._due_ns:
            return
        self._due_ns = deadline
        timer = self._timers.pop("deadline", None)
        if timer is not None:
            timer.cancel()
        if deadline is not None:
            wait = max((deadline - self._pipeline.clock.now_ns()) / 1e9, 0.001)
            self._timers["deadline"] = self._loop.call_later(wait, self._due)

    def _due(self) -> None:
        self._due_ns = None
        self._turn()

    def _give(self, drafts: list[Event | Draft]) -> None:
        if not drafts:
            return
        for draft_sink in self._draft_sinks:
            draft_sink(drafts)
        if self._subscriptions or self._sinks:
            batch = list(map(self.maker.event, drafts))
            for sink in self._sinks:
                sink(batch)
            for subscription in self._subscriptions:
                subscription.put(batch)
        if self._lines is not None:  # only lines are wanted, so nobody waits
            return
        for draft in drafts:
            if isinstance(draft, Draft) and (draft.kind is Exit or draft.kind is Vanished):
                self._ended(draft)

    def _ended(self, draft: Draft) -> None:
        if draft.kind is Exit:
            self._exits[draft.who.id] = draft
            if len(self._exits) > RECENT_EXITS:
                self._exits.popitem(last=False)
        for future, _ in self._waiting.pop(draft.who.pid, ()):
            if not future.done():
                future.set_result(draft)

    def _end_waits(self) -> None:
        """
        Of a process that vanished no event tells, unless that kind is wanted; nor of an end that is filtered out.
        """
        pipeline = self._started()
        for pid, waiting in list(self._waiting.items()):
            for future, process in waiting:
                if process is not None and process.ended and not future.done() and not pipeline.is_ending(process.id):
                    future.set_exception(_unseen(process.id))
            self._waiting[pid] = [one for one in waiting if not one[0].done()]
            if not self._waiting[pid]:
                del self._waiting[pid]

    # For users

    @property
    def ready(self) -> Ready:
        """
        What watches and what does not, as the first event says.
        """
        return self._started().ready

    @property
    def processes(self) -> dict[int, Process]:
        """
        The live table, by pid; for reading only.
        """
        return self._started().table.processes

    def get(self, pid: int) -> Process | None:
        """
        The live process with this pid, as the table knows it, or None.
        """
        return self.processes.get(pid)

    def kernel_words(self) -> dict[str, str]:
        """
        What the kernel said at length of sources that it refused, such as the BPF verifier's log; by source.
        """
        failures = self._selection.failures if self._selection is not None else []
        return {error.name: log for error in failures if (log := getattr(error.__cause__, "log", ""))}

    def stats(self) -> Stats:
        """
        Counters since the start.
        """
        return self._started().stats()

    def names(self) -> dict[str, int]:
        """
        Sizes of what is known of containers, and lookups (of names, users, hashes) that were given up.
        """
        if self._enricher is None or self._inspector is None:
            return {}
        names = self._enricher.stats()
        return {**names, "refused": names["refused"] + self._inspector.refused}

    def choose(self, keep: Predicate | None, container_wait_ms: float) -> None:
        """
        From now on show other events than those that `keep` and `container_wait_ms` chose at the start.
        """
        self._started().choose(keep, int(container_wait_ms * 1_000_000))

    def save(self, path: str) -> None:
        """
        Keep the table for a later run, see procwatch.state; after `stop`.

        Raises:
            StateError: It cannot be written.
        """
        save(path, self.processes.values(), self._enricher)

    def subscribe(self, queue: int | None = None) -> Subscription:
        """
        Another consumer, with a queue of its own; it gets the events from now on.
        """
        subscription = Subscription(self, queue or self._queue)
        self._subscriptions.append(subscription)
        self._need_events()
        return subscription

    def add_sink(self, sink: Sink) -> None:
        """
        Call `sink` with each batch of events. One that is added before the start replaces the default consumer, so
        nobody needs to iterate.
        """
        self._sinks.append(sink)
        self._need_events()

    def add_draft_sink(self, sink: DraftSink, lines: Lines | None = None) -> None:
        """
        The same for a sink that can write drafts, which `maker` makes events of.

        Args:
            sink: Called with each batch.
            lines: What it writes them with. If all others want the same, it may get lines that are written already.
        """
        self._lines = lines if not (self._draft_sinks or self._sinks or self._subscriptions) else None
        self._draft_sinks.append(sink)
        if self._lines is None:
            self._need_events()

    def _need_events(self) -> None:
        """
        No more lines without events: somebody wants these.
        """
        self._lines = None
        if self._pipeline is not None:
            self._pipeline.express(None)

    def on_end(self, call: Callable[[], None]) -> None:
        """
        Call `call` once when the watcher has ended, for whatever reason.
        """
        self._on_end.append(call)

    async def wait_exit(self, id: str) -> Exit:  # noqa: A002
        """
        The end of a process, by the `id` of its events.

        Raises:
            ConfigError: The watcher does not make `exit` events.
            LookupError: No such process is alive, nor was among the last 4096 that ended; or its end was not seen.
            ProcwatchError: The watcher ended first.
        """
        if "exit" not in self._kinds:
            raise ConfigError("wait_exit() needs the kind 'exit' among the watcher's kinds")
        self._need_events()
        ended: Draft | None = self._exits.get(id)
        if ended is None:
            parts = id.split("-")
            pid = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0
            process = self.get(pid)
            if process is not None and process.id != id:
                process = None
            if self._stopped or (process is None and not self._started().is_ending(id)):
                raise LookupError(f"no process {id!r} is alive")
            future: asyncio.Future[Draft | None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(pid, []).append((future, process))
            ended = await future
            if ended is None:
                raise ProcwatchError(f"the watcher ended before {id!r} did")
            if ended.kind is not Exit:
                raise _unseen(id)
        event = self.maker.event(ended)
        assert isinstance(event, Exit)
        return event

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        self._started()
        if self._default is None:
            raise ProcwatchError("this watcher feeds sinks: subscribe() to iterate, too")
        return self._default

    def _started(self) -> Pipeline:
        if self._pipeline is None:
            raise ProcwatchError("the watcher is not started: use `async with Watcher() as watcher`")
        return self._pipeline


async def watch(**arguments: object) -> AsyncGenerator[AnyEvent, None]:
    """
    Every process of this host as it starts and ends; takes the arguments of `Watcher`.

    The first event is `ready`. Leaving the loop closes everything, at the latest when the generator is closed; wrap it
    in `contextlib.aclosing()` to have that at once.

    Example:
        async for event in procwatch.watch(events=["exec"]):
            print(event)
    """
    async with Watcher(**arguments) as watcher:  # type: ignore[arg-type]
        async for event in watcher:
            yield event


def watch_sync(**arguments: object) -> Generator[AnyEvent, None, None]:
    """
    The same without asyncio: an ordinary generator, on a private loop.

    While your code works between two events, nothing is read and the kernel's buffer fills: take events promptly, or
    give a larger `buffer`.
    """
    if asyncio._get_running_loop() is not None:
        raise ProcwatchError("watch_sync() would block the running event loop: use `async for` with watch()")
    with asyncio.Runner() as runner:
        watcher = Watcher(**arguments)  # type: ignore[arg-type]

        async def begin() -> Subscription:
            watcher.start()
            assert watcher._default is not None
            return watcher._default

        subscription = runner.run(begin())
        try:
            while batch := runner.run(subscription.batch()):
                yield from batch  # type: ignore[misc]
        finally:
            runner.run(_close(watcher))


async def _close(watcher: Watcher) -> None:
    watcher.close()


def _unseen(identity: str) -> LookupError:
    return LookupError(f"the end of {identity!r} was not seen")


def _several(values: Collection[str] | str) -> Collection[str]:
    return (values,) if isinstance(values, str) else values


def snapshot(*, keep: Predicate | None = None, under: int | None = None) -> list[Running]:
    """
    The processes that live now, as `running` events.

    Args:
        keep: Only those for which this callable is true.
        under: Only the process with this pid and its descendants.

    Raises:
        ConfigError: There is no process `under`.
    """
    enricher = Enricher()
    maker = Maker(socket.gethostname(), Clock(), enricher)
    unnamed = Maker(maker.host, maker.clock)  # holds nothing back
    try:
        drafts = Pipeline("scan", [], [], maker=unnamed, kinds=("running",), under=under).start(initial=True)
        names_wanted = {draft.details.cgroup for draft in drafts if isinstance(draft, Draft)}
        for cgroup in names_wanted:
            enricher.place(cgroup)
        deadline = time.monotonic() + NAMES_S
        while any(map(enricher.pending, names_wanted)) and time.monotonic() < deadline:
            time.sleep(0.005)
            enricher.collect()
        events = list(map(maker.event, drafts))
    finally:
        enricher.close()
    return [event for event in events if type(event) is Running and (keep is None or keep(event))]
