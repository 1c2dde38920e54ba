"""
Real servers to send to.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.conftest import need


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """
    A port of this host that nobody uses.
    """
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def program(name: str, package: str) -> str:
    """
    The path of a server's program.
    """
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin:/sbin:/bin")
    need(path, f"needs {name}: install {package}")
    assert path is not None
    return path


async def answers(port: int) -> None:
    """
    Wait until somebody listens.
    """
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            await writer.wait_closed()
            return


class NatsServer:
    """
    nats-server with JetStream; it can be killed and started again.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._program = program("nats-server", "nats-server")
        self.port = free_port()
        self._folder = folder
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """
        Where it listens.
        """
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """
        Until it answers.
        """
        command = [self._program, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self._folder / "js")]
        with open(self._folder / "nats.log", "ab") as log:
            self._process = subprocess.Popen([*command, *self._arguments], stdout=log, stderr=log)
        await answers(self.port)

    def kill(self) -> None:
        """
        kill -9.
        """
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@asynccontextmanager
async def nats_server(folder: Path, *arguments: str) -> AsyncIterator[NatsServer]:
    """
    One that answers.
    """
    folder.mkdir(exist_ok=True)
    server = NatsServer(folder, *arguments)
    await server.start()
    try:
        yield server
    finally:
        server.kill()


async def stream_messages(url: str, stream: str = "procwatch", **login: Any) -> list[Any]:
    """
    All messages of a stream, in order.
    """
    import nats

    client = await nats.connect(url, **login)
    try:
        js = client.jetstream()
        state = (await js.stream_info(stream)).state
        subscription = await js.subscribe("", stream=stream, ordered_consumer=True)
        return [await subscription.next_msg(timeout=10) for _ in range(state.messages)]
    finally:
        await client.close()
