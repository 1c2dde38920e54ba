"""
Each example runs for real, beside processes that it must see.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


async def start(name: str | Path, *arguments: str) -> Process:
    """
    An example, or another script, whose lines come at once.
    """
    command = (sys.executable, "-u", "-W", "error", str(EXAMPLES / name), *arguments)
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, limit=1 << 20)


async def work(program: str, *arguments: str, until: asyncio.Event) -> None:
    """
    One process after the other, each long enough for every backend to see it.
    """
    while not until.is_set():
        process = await asyncio.create_subprocess_exec("sh", "-c", f'{program} 0.03; exit 3 # "$@"', "sh", *arguments)
        await process.wait()


async def until_it_says(name: str, wanted: str, program: str = "sleep", *arguments: str) -> list[str]:
    """
    The lines of an example up to the wanted one; it is ended then as by Ctrl-C.
    """
    example = await start(name)
    assert example.stdout is not None
    lines = [(await example.stdout.readline()).decode()]
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work(program, *arguments, until=enough))
        while wanted not in lines[-1] and lines[-1]:
            lines.append((await example.stdout.readline()).decode())
        enough.set()
    if example.returncode is None and lines[-1]:
        example.send_signal(signal.SIGINT)
    await finish(example)
    assert wanted in lines[-1]
    return lines


async def finish(example: Process) -> str:
    """
    What it said to the end, which was a good one.
    """
    said, complaints = await example.communicate()
    assert (example.returncode, complaints.decode()) == (0, "")
    return said.decode()


async def test_watch_all():
    """
    Says what watches, then each start with its arguments, and each end.
    """
    lines = await until_it_says("watch_all.py", "ended with 3")

    assert lines[0].startswith("watching by ")


async def test_build_commands():
    """
    Counts each program of a build, those of its grandchildren and subshells too, and gives its exit code.
    """
    example = await start("build_commands.py", "sh", "-c", "(sleep 0.05; sleep 0.05; true) & wait; sleep 0.05; exit 4")
    said, complaints = await example.communicate()

    assert (example.returncode, complaints.decode()) == (4, "")
    sleeps = [line.split() for line in said.decode().splitlines() if line.endswith("sleep")]
    assert [words[0] for words in sleeps] == ["3"]


async def test_who_starts_what():
    """
    Counts pairs of parent and program.
    """
    example = await start("who_starts_what.py", "1")
    assert example.stdout is not None
    assert (await example.stdout.readline()).startswith(b"watching by ")
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work("sleep", until=over))
        said = await finish(example)
        over.set()

    shell, sleep = (Path(shutil.which(name) or "").resolve() for name in ("sh", "sleep"))
    assert f"{shell} -> {sleep}\n" in said


async def test_structlog_pipeline():
    """
    Process events go through the application's processors: its context is bound, its secrets are gone.
    """
    lines = await until_it_says("structlog_pipeline.py", "password=***", "sleep", "--password=open-sesame")

    records = [json.loads(line) for line in lines]
    assert {record["app"] for record in records} == {"shop"}
    assert [record["event"] for record in records[:2]] == ["start", "ready"]
    assert not any("open-sesame" in line for line in lines)


async def test_unexpected_executable(tmp_path: Path):
    """
    Alerts on a program outside the usual places, by its path.
    """
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "odd")

    lines = await until_it_says("unexpected_executable.py", str(program), str(program))

    assert lines[-1].startswith(f"ALERT a program in an unusual place: '{program}'")


async def test_beside_busy_app():
    """
    An application that blocks the loop, and a slow consumer, do not keep the others from seeing all.
    """
    example = await start("beside_busy_app.py", "50")
    assert example.stdout is not None
    assert (await example.stdout.readline()).startswith(b"watching by ")
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work("sleep", until=over))
        said = await finish(example)
        over.set()

    assert "'stop': 1" in said
    assert "the slow one missed" in said


async def test_readme(tmp_path: Path):
    """
    The program in the README runs, and says what it says it does.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(code.replace("procwatch.watch(", "procwatch.watch(count=30, "))
    example = await start(script)
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work("sleep", until=over))
        said = await finish(example)
        over.set()

    assert " started by /" in said
    assert re.search(r"^\d+ 3 after \d+ ms$", said, re.MULTILINE)
