"""
A real agent, as a process of its own, for tests to talk to.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 30.0


class Agent:
    """
    An agent that runs. It is known to be ready, reloaded or alive because it says so, as to a service manager.
    """

    def __init__(self, process: subprocess.Popen[bytes], notify: socket.socket, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._notify = notify
        self._log = log
        self.told: list[str] = []

    def wait(self, message: str) -> str:
        """
        Until it tells something that begins so; gives all of that datagram.
        """
        end = time.monotonic() + START_S
        while True:
            try:
                told = self._notify.recv(4096).decode()
            except TimeoutError:
                assert self.process.poll() is None, self._log.read_text()
                assert time.monotonic() < end, self._log.read_text()
            else:
                self.told.append(told)
                if told.startswith(message):
                    return told

    def hang_up(self) -> None:
        """
        SIGHUP, and wait until it was taken.
        """
        os.kill(self.pid, signal.SIGHUP)
        self.wait("RELOADING=1")
        self.wait("READY=1")

    def stop(self) -> list[dict[str, Any]]:
        """
        SIGTERM, and its end with 0; gives its diagnostics.
        """
        self.process.terminate()
        assert self.process.wait(START_S) == 0, self._log.read_text()
        return self.log()

    def log(self) -> list[dict[str, Any]]:
        """
        Its diagnostics so far.
        """
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@contextmanager
def agent(
    directory: Path, text: str, *, state: bool = False, prefix: Sequence[str] = (), **environ: str
) -> Iterator[Agent]:
    """
    `procwatch agent` with a configuration, ready; killed at the end of the block if it runs still.

    Args:
        directory: For its files.
        text: The configuration, procwatch.toml in the directory.
        state: Keep the table over restarts.
        prefix: A command that starts it.
        environ: Variables in addition.
    """
    path = directory / "procwatch.toml"
    path.write_text(text)
    address = directory / "notify"
    address.unlink(missing_ok=True)
    variables = {
        "NOTIFY_SOCKET": str(address),
        "PROCWATCH_STATE": str(directory / "state.json") if state else "",
        **environ,
    }
    command = [*prefix, sys.executable, "-m", "procwatch", "agent", "--config", str(path)]
    log = directory / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(log, "wb") as errors:
        notify.bind(str(address))
        address.chmod(0o666)
        notify.settimeout(START_S)
        out = directory / "out"
        with (
            open(out, "ab") as output,
            subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **variables}) as process,
        ):
            running = Agent(process, notify, log)
            try:
                running.wait("READY=1")
                yield running
            finally:
                process.kill()


def lines(path: Path) -> list[dict[str, Any]]:
    """
    The events in a file; fails on a line that is not whole.
    """
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def execs(events: list[dict[str, Any]], exe: object) -> list[str]:
    """
    The ids of those that executed a file.
    """
    return [event["id"] for event in events if event["event"] == "exec" and event["exe"] == str(exe)]
