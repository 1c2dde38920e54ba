"""
A fleet on one machine: a nats-server, two agents with host names of their own, and a question to the stream.

    fleet.py [EXECUTABLE]

Both agents watch this one kernel, so both tell of every process; the second one begins later, which the answer shows.
On real hosts each has an agent with agent.toml, and nothing else.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def start(stack: ExitStack, *command: str, **options: Any) -> subprocess.Popen[bytes]:
    """
    A program that is ended, and waited for, at the end.
    """
    process = subprocess.Popen(command, **options)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def free_port() -> int:
    """
    A port that nobody uses.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_server(stack: ExitStack, folder: Path) -> str:
    """
    nats-server with JetStream; returns its URL when it answers.
    """
    program = shutil.which("nats-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/bin")
    if program is None:
        sys.exit("fleet.py needs nats-server: apt-get install nats-server")
    port = free_port()
    command = (program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder / "jetstream"))
    start(stack, *command, stderr=subprocess.DEVNULL)
    until(lambda: connects(port), "nats-server answers")
    return f"nats://127.0.0.1:{port}"


def connects(port: int) -> bool:
    """
    Whether somebody listens.
    """
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def start_agent(stack: ExitStack, folder: Path, host: str, server: str) -> None:
    """
    An agent with a host name of its own; returns when it watches.
    """
    folder = folder / host
    folder.mkdir()
    text = (HERE / "agent.toml").read_text()
    for name, value in (("host", host), ("folder", folder), ("server", server)):
        text = text.replace("{" + name + "}", str(value))
    config, log = folder / "procwatch.toml", folder / "log"
    config.write_text(text)
    with log.open("w") as file:
        agent = start(stack, sys.executable, "-m", "procwatch", "agent", "--config", str(config), stderr=file)
    until(lambda: "ready" in log.read_text() or agent.poll() is not None, f"{host} watches")
    if agent.poll() is not None:
        sys.exit(f"{host}: {log.read_text().strip()}")


def until(true: Callable[[], bool], what: str) -> None:
    """
    Wait for something that another program does.
    """
    deadline = time.monotonic() + 20
    while not true():
        if time.monotonic() > deadline:
            sys.exit(f"gave up waiting: {what}")
        time.sleep(0.02)


def ask(folder: Path, server: str, exe: str) -> bool:
    """
    Whether both hosts have told of the executable; prints what is known when they have.
    """
    command = (sys.executable, str(HERE / "who_ran.py"), "--server", server, "--db", str(folder / "fleet.duckdb"), exe)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode not in (0, 1):
        sys.exit(answer.stderr)
    complete = all(host in answer.stdout for host in ("web-1", "db-1"))
    if complete:
        print(answer.stdout, end="")
    return complete


def main() -> None:
    """
    Start all, run something, ask who ran it.
    """
    exe = os.path.realpath(shutil.which(sys.argv[1] if len(sys.argv) > 1 else "uptime") or sys.exit("no such program"))
    with tempfile.TemporaryDirectory(prefix="procwatch-fleet-") as name, ExitStack() as stack:
        folder = Path(name)
        server = start_server(stack, folder)
        start_agent(stack, folder, "web-1", server)
        subprocess.run([exe], check=False, stdout=subprocess.DEVNULL)
        start_agent(stack, folder, "db-1", server)
        for _ in range(3):
            subprocess.run([exe], check=False, stdout=subprocess.DEVNULL)
        print(f"who ran {exe}?")
        until(lambda: ask(folder, server, exe), "both hosts in the stream")


if __name__ == "__main__":
    main()
