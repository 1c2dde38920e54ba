"""
The command line as a user has it: processes, signals, pipes and terminals.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need

COMMAND = [sys.executable, "-W", "error", "-m", "procwatch"]
WATCH = [*COMMAND, "watch", "--backend", "scan"]  # which works for everybody, everywhere
ROOT = Path(__file__).parent.parent
PIPE = subprocess.PIPE
pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def running(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """
    A watching command that has said `ready`, as JSON in its standard output.
    """
    command = [*WATCH, "--format", "json", *arguments]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, **options) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["event"] == "ready"
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """
    A command run to its end.
    """
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 30, **options}
    return subprocess.run([*COMMAND, *arguments], **options)


def lines(output: str) -> list[dict[str, Any]]:
    """
    JSON lines, each whole.
    """
    assert output == "" or output.endswith("\n")
    return [json.loads(line) for line in output.splitlines()]


# Ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_stops(number: signal.Signals):
    """
    What happened before it is told, `stop` is last, and the exit code is 0.
    """
    with running() as process:
        subprocess.run(["sleep", "0.1", "0.001"], check=True)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    found = lines(output)
    assert (process.returncode, errors) == (0, "")
    assert found[-1]["event"] == "stop"
    mine = [event["event"] for event in found if event.get("argv") == ["sleep", "0.1", "0.001"]]
    assert mine == ["exec", "exit"]
    counts = found[-1]["counts"]
    assert counts["exec"] == sum(event["event"] == "exec" for event in found)
    assert {"lost", "duration_ns", "cpu_ns", "max_rss_bytes"} <= set(found[-1])


def test_a_second_signal_ends_at_once():
    """
    Also while nobody reads what is to be written.
    """
    with running("--initial", "--latency-ms", "0") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert '"event"' in process.stdout.readline()
        while process.poll() is None:  # until the second one is after the first; a flood would only hold it up
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.returncode in (0, -signal.SIGTERM)


def test_a_closed_pipe_ends_quietly():
    """
    `procwatch watch | head -1`.
    """
    with running("--initial") as process:
        assert process.stdout is not None
        process.stdout.close()
        subprocess.run(["sleep", "0.05"], check=True)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_ps_into_a_closed_pipe_ends_quietly():
    """
    `procwatch ps | head -1`.
    """
    command = f"{sys.executable} -m procwatch ps --format json | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert lines(done.stdout)[0]["event"] == "running"


def test_count_and_for():
    """
    Both end by themselves, with `stop`.
    """
    ended = run("watch", "--backend", "scan", "--initial", "--count", "3", "--format", "json")
    assert [event["event"] for event in lines(ended.stdout)] == ["ready", "running", "running", "running", "stop"]
    ended = run("watch", "--backend", "scan", "--for", "0.1", "--exe", "/nosuch", "--format", "json")
    assert [event["event"] for event in lines(ended.stdout) if event["event"] != "lost"] == ["ready", "stop"]


# Mistakes


def test_a_user_who_is_not_there():
    """
    It is said, for it may be a slip; and waited for, for the user may come.
    """
    ended = run(
        "watch", "--backend", "scan", "--for", "0.1", "--user", "nobody", "--user", "no\x1bsuch", "--user", "4242"
    )
    assert ended.returncode == 0
    assert ended.stderr == "procwatch: --user no\\esuch: there is no such user, yet\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["watch", "--nosuch"],
        ["watch", "extra"],
        ["watch", "--backend", "nosuch"],
        ["watch", "--format", "xml"],
        ["watch", "--events", "exec,nosuch"],
        ["watch", "--events", ""],
        ["watch", "--buffer", "1"],
        ["watch", "--buffer", "1TiB"],
        ["watch", "--buffer", "9" * 400],
        ["watch", "--for", "-1"],
        ["watch", "--for", "soon"],
        ["watch", "--count", "0"],
        ["watch", "--latency-ms", "inf"],
        ["watch", "--fork-hold-ms", "nan"],
        ["watch", "--without", "nosuch"],
        ["watch", "--output", "/nonexistent/x"],
        ["watch", "--output", "/"],
        ["watch", "--output", "/nonexistent/\n\x1b[31m"],
        ["ps", "--output", "/nonexistent/x"],
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(arguments: list[str]):
    """
    On standard error, with exit code 2, and nothing on standard output.
    """
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("procwatch: ")
    assert "\x1b" not in done.stderr


def test_a_backend_that_cannot_work_says_why_and_what_would_help():
    """
    netlink in another pid namespace: one line, exit code 1.
    """
    need(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    command = ["unshare", "--pid", "--fork", "--mount-proc", *COMMAND, "watch", "--backend", "netlink"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("procwatch: netlink: the kernel sends process events only to the initial")
    assert "run on the host itself" in done.stderr
    assert done.stderr.count("\n") == 1


def test_auto_in_another_pid_namespace_still_works_and_says_what_does_not():
    """
    ready.skipped has name, reason and remedy.
    """
    need(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    command = ["unshare", "--pid", "--fork", "--mount-proc", *COMMAND, "watch", "--for", "0.1", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    ready = lines(done.stdout)[0]
    assert done.returncode == 0
    assert "netlink" in {skipped["name"] for skipped in ready["skipped"]} or ready["backend"] == "ebpf"
    assert all(skipped["reason"] for skipped in ready["skipped"])


@pytest.mark.parametrize("command", ["watch", "ps"])
def test_a_full_disk_is_one_line(command: str):
    """
    Exit code 1, with the kernel's reason.
    """
    with open("/dev/full", "wb") as full:
        done = run(command, "--format", "json", capture_output=False, stdout=full, stderr=PIPE)
    assert (done.returncode, done.stderr) == (1, "procwatch: cannot write: No space left on device\n")


@pytest.mark.parametrize(("command", "code"), [("watch", 2), ("ps", 2), ("watch --count 1 --initial --output", 0)])
def test_standard_output_may_be_closed(command: str, code: int, tmp_path: Path):
    """
    Then a file is needed, and enough.
    """
    file = tmp_path / "lines" if command.endswith("--output") else ""
    script = f"{sys.executable} -m procwatch {command} {file} >&-"
    done = subprocess.run(["sh", "-c", script], stderr=PIPE, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if code else 0)
    if file:
        assert [event["event"] for event in lines(Path(file).read_text())] == ["ready", "running", "stop"]


def test_a_file_is_private_and_appended_to(tmp_path: Path):
    """
    Mode 0640; two runs are two `ready`.
    """
    file = tmp_path / "lines"
    for _ in range(2):
        run("watch", "--backend", "scan", "--for", "0", "--output", str(file))
    assert file.stat().st_mode & 0o777 == 0o640
    assert [event["event"] for event in lines(file.read_text())].count("ready") == 2


# The terminal


@contextmanager
def writing(file: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """
    A command that watches into a file.
    """
    command = [*WATCH, "--output", str(file), "--format", "json", *arguments]
    with subprocess.Popen(command, stderr=PIPE, text=True, cwd=ROOT) as process:
        try:
            until(lambda: file.exists() and b"ready" in file.read_bytes())
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def until(done: Callable[[], bool]) -> None:
    """
    Wait for another process's work.
    """
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def told(file: Path, child: subprocess.Popen[bytes]) -> list[str]:
    """
    The kinds of events of a child that a file has; its last line may be in the writing.
    """
    text = file.read_text()
    return [event["event"] for event in lines(text[: text.rfind("\n") + 1]) if event.get("pid") == child.pid]


def live(file: Path) -> subprocess.Popen[bytes]:
    """
    A child that lives until a file has its birth; it is ended, and not reaped.
    """
    child = subprocess.Popen(["cat"], stdin=PIPE)
    assert child.stdin is not None
    until(lambda: "exec" in told(file, child))
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_file_is_opened_anew_at_a_signal(number: signal.Signals, tmp_path: Path):
    """
    What was told before is in the file that was moved away; the new one is there at once, and has the rest.
    """
    file, old = tmp_path / "lines", tmp_path / "lines.1"
    with writing(file) as process:
        with live(file) as first:
            until(lambda: "exit" in told(file, first))
        file.rename(old)
        process.send_signal(number)
        until(file.exists)
        with live(file) as second:
            pass
        process.terminate()
        errors = process.communicate()[1]
    assert (process.returncode, errors) == (0, "")
    assert (told(old, first), told(old, second)) == (["exec", "exit"], [])
    assert (told(file, first), told(file, second)) == ([], ["exec", "exit"])


def test_logrotate(tmp_path: Path):
    """
    logrotate(8) itself, as an administrator would set it up: nothing is lost between two files.
    """
    need(shutil.which("logrotate"), "needs logrotate")
    file, setup = tmp_path / "lines", tmp_path / "logrotate.conf"
    tmp_path.chmod(0o755)
    children = []
    with writing(file) as process:
        setup.write_text(f"{file} {{\n rotate 2\n create 0600\n postrotate\n kill -HUP {process.pid}\n endscript\n}}\n")
        for rotate in (True, True, False):
            with live(file) as child:
                children.append(child)
            if rotate:
                subprocess.run(["logrotate", "--force", "--state", tmp_path / "state", setup], check=True)
        process.terminate()
        errors = process.communicate()[1]
    assert (process.returncode, errors) == (0, "")
    files = [tmp_path / name for name in ("lines.2", "lines.1", "lines")]
    for child in children:
        assert [kind for one in files for kind in told(one, child)] == ["exec", "exit"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_hangup_ends_what_writes_to_standard_output():
    """
    As it ends every program whose terminal goes away.
    """
    with running() as process:
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGHUP


def test_a_full_disk_is_waited_for(small_disk: Path):
    """
    The watch goes on, says so once, and writes what happened meanwhile when there is room.
    """
    file, ballast = small_disk / "lines", small_disk / "ballast"
    with writing(file) as process:
        assert process.stderr is not None
        ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
        while not select.select([process.stderr], [], [], 0)[0]:
            subprocess.run(["true"], check=True)
        with subprocess.Popen(["cat"], stdin=PIPE) as child:
            subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
            until(lambda: told(file, child) == ["exec"])
            child.communicate()
        process.terminate()
        errors = process.communicate()[1]
    assert process.returncode == 0
    assert errors.count("\n") == 1
    assert "No space left on device" in errors
    assert lines(file.read_text())[-1]["event"] == "stop"


def on_terminal(*arguments: str, **environment: str) -> str:
    """
    What a command shows on a terminal.
    """
    reader, writer = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    with subprocess.Popen([*COMMAND, *arguments], stdout=writer, stderr=writer, cwd=ROOT, env=env) as process:
        os.close(writer)
        shown = b""
        while True:
            try:
                data = os.read(reader, 65536)
            except OSError:  # EIO: the other end is closed
                break
            shown += data
        process.wait()
    os.close(reader)
    return shown.decode()


def test_a_terminal_has_colour_unless_it_is_not_wanted():
    """
    console is the format there; NO_COLOR is respected.
    """
    arguments = ("watch", "--backend", "scan", "--initial", "--count", "2")
    coloured, plain = on_terminal(*arguments), on_terminal(*arguments, NO_COLOR="1")
    assert "\x1b[" in coloured
    assert "\x1b" not in plain
    assert "COMMAND" in coloured
    assert "COMMAND" in plain


def test_console_into_a_pipe_has_no_colour():
    """
    Asked for by name.
    """
    done = run("watch", "--backend", "scan", "--initial", "--count", "2", "--format", "console")
    assert "COMMAND" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_hostile_process_cannot_write_to_the_terminal(tmp_path: Path):
    """
    Control characters in argv, name and path are shown as escapes, in a line of their own process.
    """
    evil = tmp_path / "e\x1b]0;owned\x07\nvil"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", evil)
    arguments: list[str | bytes] = ["sh", "-c", "read x", "\x1b[2J", "\r\nforged line", "\u202egnp.exe", b"\xff\x9b31m"]
    with subprocess.Popen([evil, "100"]) as first, subprocess.Popen(arguments, stdin=PIPE) as second:
        try:
            shown = on_terminal("ps", NO_COLOR="1")
        finally:
            first.kill()
            second.communicate()
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert r"e\e]0;owned\a\nvil" in shown
    (line,) = [line for line in shown.splitlines() if "forged" in line]
    assert r"$'\e[2J' $'\r\nforged line'" in line
    assert r"\xff\x9b31m" in line


def test_python_m_and_version():
    """
    Help and version work.
    """
    import procwatch

    assert procwatch.__version__ in run("--version").stdout
    assert "--backend" in run("watch", "--help").stdout


def test_diagnostics_go_to_standard_error():
    """
    And are as many as asked for.
    """
    done = run("watch", "--backend", "scan", "--for", "0", "--log-level", "info", "--log-format", "json")
    assert json.loads(done.stderr.splitlines()[0])["event"] == "ready"
    assert run("watch", "--backend", "scan", "--for", "0").stderr == ""
