"""
The service: a watcher, its sinks, metrics, and what a service manager wants to know.

The order at the start matters: sources are opened with all privileges, which are then given back; sinks are opened with
what is left, so that a file which could not be opened again later fails now. The kernel gathers events meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import structs

from procwatch import config as configuration
from procwatch import privileges
from procwatch.config import RELOADED, Config, Metrics
from procwatch.errors import ConfigError, ProcwatchError
from procwatch.outlets import Outlets
from procwatch.sdnotify import Notifier
from procwatch.state import State, StateError, load
from procwatch.watcher import Watcher

if TYPE_CHECKING:
    from procwatch import metrics
    from procwatch.metrics import Port, Vitals

# Between two looks at sinks for new failures, and lines of status for the service manager.
STATUS_S = 10.0


class Agent:
    """
    One run of the service.

    Args:
        path: The configuration.
        environ: Overrides of it, and what a service manager says.
        configure_log: Makes the logger of a level and a format; called again when these change.

    Raises:
        ConfigError: The configuration cannot be.
    """

    def __init__(self, path: str, environ: Mapping[str, str], configure_log: Callable[[str, str], Any]) -> None:
        self._path = path
        self._environ = environ
        self._configure_log = configure_log
        self.config = configuration.read(path, environ)
        self._log = self._make_log()
        self._watcher = Watcher(**self.config.watcher())
        maker = self._watcher.maker
        maker.host = self.config.host or maker.host
        maker.labels = self.config.labels or None
        self._outlets = Outlets(maker, self._log)
        self._exporter = Exporter(self.vitals, self._log)
        self._notifier = Notifier(environ)
        self._running = False
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._reloads = {"ok": 0, "failed": 0}
        self._failures: dict[str, int] = {}
        self._started_s = time.time()

    async def run(self) -> None:
        """
        Until a signal, or until the sources fail.

        Raises:
            ProcwatchError: It cannot begin, or a source was lost.
        """
        for name in configuration.unknown_variables(self._environ):
            self._log.warning("no option is called like this environment variable", name=name)
        # Before all else and until the end: by default this signal would end us.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        watcher = self._watcher
        sources = watcher.open()
        try:
            self._drop(sources)
            await self._outlets.open(self.config.sinks)
            try:
                await self._exporter.change(self.config.metrics)
                await self._watch()
            finally:
                self._ended.set()
                self._notifier.stopping()
                async with self._reloading:  # a sink that is being replaced gets all that waits for it
                    await self._exporter.change(None)
                    await self._outlets.close(self.config.drain_s)
        finally:
            watcher.close()
            for task in self._tasks:
                task.cancel()
        self._save()
        watcher.raise_failure()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        watcher = self._watcher
        watcher.add_draft_sink(self._outlets)
        watcher.on_end(self._ended.set)
        watcher.start(self._load())
        ready = watcher.ready
        self._log.info("ready", backend=ready.backend, sources=ready.sources, version=ready.version)
        for skipped in ready.skipped:
            self._log.info("skipped", name=skipped.name, reason=skipped.reason, remedy=skipped.remedy)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        self._running = True
        try:
            self._notifier.ready(self._status())
            self._spawn(self._look_after())
            await self._ended.wait()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        """
        Take what the kernel has queued, and end. From now on a signal ends at once.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        self._log.info("stopping")
        self._watcher.stop()

    def _hang_up(self) -> None:
        if self._running and not self._ended.is_set():
            self._spawn(self.reload())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("a task failed; please report it", error=repr(error), exc_info=error)

    def _drop(self, sources: list[str]) -> None:
        if self.config.keep_privileges:
            return
        left = privileges.drop(privileges.needed(sources, os.uname().release), self.config.user)
        self._log.info("privileges dropped", kept=left, uid=os.getuid())

    # State

    def _load(self) -> State | None:
        if not self.config.state:
            return None
        try:
            state = load(self.config.state)
        except StateError as error:
            self._log.warning(str(error))
            return None
        if state is not None:
            self._log.info("state taken up", processes=len(state.processes), age_s=round(state.age_s, 3))
        return state

    def _save(self) -> None:
        if self.config.state:
            try:
                self._watcher.save(self.config.state)
            except StateError as error:
                self._log.warning(str(error))

    # Reload

    async def reload(self) -> None:
        """
        Take the configuration anew, without losing an event; what cannot be goes on as it was.
        """
        async with self._reloading:
            self._notifier.reloading()
            try:
                await self._change(configuration.read(self._path, self._environ))
            except ProcwatchError as error:
                self._reloads["failed"] += 1
                problems = error.problems if isinstance(error, configuration.Invalid) else [error]
                for problem in problems:
                    self._log.error("not reloaded", error=str(problem))
            else:
                self._reloads["ok"] += 1
                self._log.info("reloaded", sinks=[table.name for table in self.config.sinks])
            self._notifier.ready(self._status())

    async def _change(self, new: Config) -> None:
        old = self.config
        different = {name for name in Config.__struct_fields__ if getattr(new, name) != getattr(old, name)}
        for table in new.sinks:
            if table.events is not None and (unknown := set(table.events) - set(old.events)):
                raise ConfigError(f"sink {table.name!r}: events of kind {', '.join(sorted(unknown))} need a restart")
        for name in sorted(different - RELOADED):
            self._log.warning("needs a restart", option=name, running=getattr(old, name), file=getattr(new, name))
        self.config = structs.replace(old, **{name: getattr(new, name) for name in different & RELOADED})
        if different & {"log_level", "log_format"}:
            self._log = self._make_log()
        self._watcher.choose(self.config.keep(), self.config.names_wait_ms())
        self._watcher.maker.labels = self.config.labels or None
        await self._outlets.change(self.config.sinks, all_anew="labels" in different)
        if "metrics" in different:
            await self._exporter.change(self.config.metrics)

    def _make_log(self) -> Any:
        return self._configure_log(self.config.log_level, self.config.log_format)

    # What others are told

    async def _look_after(self) -> None:
        """
        Signs of life for the service manager, and a line for each new trouble of a sink.
        """
        every_s = min(STATUS_S, self._notifier.watchdog_s or STATUS_S)
        while True:
            await asyncio.sleep(every_s)
            self._notifier.alive(self._status())
            for name, (stats, _) in self._outlets.stats().items():
                before, self._failures[name] = self._failures.get(name, 0), stats.failures
                if stats.failures > before:
                    self._log.warning("a sink has trouble", sink=name, error=stats.error, pending=stats.pending)

    def _status(self) -> str:
        stats = self._watcher.stats()
        return f"{self._watcher.ready.backend}: {sum(stats.events.values())} events, {stats.lost} lost"

    def vitals(self) -> Vitals:
        """
        Everything that metrics tell.
        """
        from procwatch.metrics import Vitals

        watcher = self._watcher
        return Vitals(
            backend=watcher.ready.backend,
            stats=watcher.stats(),
            lost=self._outlets.lost,
            names=watcher.names(),
            sinks=self._outlets.stats(),
            started_s=self._started_s,
            reloads=self._reloads,
        )


class Exporter:
    """
    Metrics on a port and in a file, as the configuration says.

    Args:
        look: Gives what is told.
        log: For what a user should know.
    """

    def __init__(self, look: Callable[[], Vitals], log: Any) -> None:
        self._look = look
        self._log = log
        self._port: Port | None = None
        self._writer: asyncio.Task[None] | None = None

    async def change(self, table: Metrics | None) -> None:
        """
        End what there was, and begin what `table` says.

        Raises:
            ProcwatchError: The port is not to be had, or the library is not installed.
        """
        if self._port is not None:
            await self._port.close()
        if self._writer is not None:
            self._writer.cancel()
        self._port = self._writer = None
        if table is None:
            return
        from procwatch import metrics

        source = metrics.Metrics(self._look)
        if table.port:
            port = metrics.Port(source)
            await port.open(table.address, table.port)
            self._port = port
        if table.textfile:
            self._writer = asyncio.ensure_future(self._write(source, table.textfile, table.interval_s))

    async def _write(self, source: metrics.Metrics, path: str, interval_s: float) -> None:
        from procwatch.metrics import write_textfile

        failed = False
        while True:
            try:
                await write_textfile(source, path)
                failed = False
            except OSError as error:
                if not failed:
                    self._log.warning("metrics cannot be written", path=path, error=error.strerror)
                failed = True
            await asyncio.sleep(interval_s)
