"""
One thread for what may block: files on disk, the name service, hashing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Worker:
    """
    Runs jobs one after the other in a daemon thread, which is started with the first job.

    Args:
        name: Of the thread.
        capacity: Jobs that may wait. What does not fit is refused and counted in `refused`: the caller goes on without.
    """

    def __init__(self, name: str, capacity: int = 4096) -> None:
        self.refused = 0
        self.peak = 0
        self._name = name
        self._capacity = capacity
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []  # a heap by time, and order of arrival
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Callable[[], None], delay_s: float = 0.0) -> bool:
        """
        Run `job` after `delay_s` seconds; False when it was refused.
        """
        with self._wake:
            if self._closed or len(self._jobs) >= self._capacity:
                if not (self._closed or self.refused):
                    log.warning(
                        "%s: %d jobs wait; from now on some fields stay empty, counted", self._name, self._capacity
                    )
                self.refused += not self._closed
                return False
            heapq.heappush(self._jobs, (time.monotonic() + delay_s, next(self._order), job))
            self.peak = max(self.peak, len(self._jobs))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()
        return True

    def close(self) -> None:
        """
        Forget what waits, and let the job that runs end; one that hangs (a dead network file system) is left behind.
        """
        with self._wake:
            self._closed = True
            self._jobs.clear()
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                log.exception("%s: a job failed; its fields stay unknown", self._name)

    def _next(self) -> Callable[[], None] | None:
        with self._wake:
            while not self._closed:
                due = self._jobs[0][0] if self._jobs else None
                if due is not None and (wait := due - time.monotonic()) <= 0:
                    return heapq.heappop(self._jobs)[2]
                self._wake.wait(None if due is None else wait)
        return None
