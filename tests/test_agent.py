"""
The service: real agents, real signals, real files.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from procwatch import privileges
from procwatch.clock import Clock
from procwatch.config import SinkTable
from procwatch.errors import ProcwatchError
from procwatch.events import Ready
from procwatch.outlets import Outlets
from procwatch.sdnotify import Notifier
from procwatch.table.draft import Maker
from tests.agents import agent, execs, lines
from tests.conftest import need
from tests.living import living

FILE = '[[sinks]]\ntype = "file"\npath = "{}"\n'
STORM = 'i=0; while [ $i -lt "$2" ]; do "$1"; i=$((i+1)); done'


def root() -> None:
    need(os.geteuid() == 0, "needs root")


@pytest.fixture
def sink(tmp_path: Path) -> str:
    """
    A table for one file, events.jsonl.
    """
    return FILE.format(tmp_path / "events.jsonl")


def storm(tiny: Path, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", STORM, "sh", tiny, str(count)])


def grown(path: Path, count: int) -> bytes:
    """
    What a file has when it has so many lines.
    """
    while not path.exists() or (data := path.read_bytes()).count(b"\n") < count:
        time.sleep(0.001)
    return data


class TestLife:
    """
    From the start to the end.
    """

    def test_whole_life(self, tmp_path: Path, sink: str, tiny: Path):
        """
        ready comes first and stop last, with all labels; what ran is in the file; the service manager hears of it.
        """
        with agent(tmp_path, 'host = "h1"\nlabels = { site = "a" }\n' + sink, WATCHDOG_USEC="20000") as running:
            running.wait("WATCHDOG=1\nSTATUS=")
            subprocess.run([tiny], check=True)
            log = running.stop()
            running.wait("STOPPING=1")
        events = lines(tmp_path / "events.jsonl")

        assert (events[0]["event"], events[-1]["event"]) == ("ready", "stop")
        assert {(event["host"], event["labels"]["site"]) for event in events} == {("h1", "a")}
        assert events[-1]["counts"]["exec"] == sum(event["event"] == "exec" for event in events)
        assert {"ready", "stopping"} <= {line["event"] for line in log}

    def test_filters(self, tmp_path: Path, tiny: Path):
        """
        Each sink has its own kinds, filter and format, within those of the top level.
        """
        text = f'[filter]\nexe = ["{tiny}", "/usr/bin/true"]\n'
        text += FILE.format(tmp_path / "a") + f'events = ["exec"]\nfilter = {{ exe = "{tiny}" }}\n'
        text += FILE.format(tmp_path / "b") + 'format = "logfmt"\n'
        with agent(tmp_path, text) as running:
            for _ in range(3):
                subprocess.run([tiny], check=True)
            running.stop()
        a, b = lines(tmp_path / "a"), (tmp_path / "b").read_text().splitlines()

        assert {event["event"] for event in a} == {"ready", "exec", "stop"}
        assert all(event["exe"] == str(tiny) for event in a if event["event"] == "exec")
        assert "event=stop" in b[-1]

    @pytest.mark.parametrize(
        ("text", "code", "error"),
        [
            ("backed = 1", 2, r"procwatch: .*procwatch\.toml:3: no option 'backed'; did you mean 'backend'\?"),
            (FILE.format("/nowhere/events"), 1, "procwatch: file: cannot write to /nowhere/events: .*"),
            ("[metrics]\naddress = '192.0.2.1'", 1, "procwatch: metrics: cannot listen on 192.0.2.1:9123: .*"),
        ],
    )
    def test_cannot_begin(self, tmp_path: Path, text: str, code: int, error: str):
        """
        One line, and 2 for what the file says, 1 for what cannot be here.
        """
        path = tmp_path / "procwatch.toml"
        path.write_text(f'log_level = "error"\nstate = ""\n{text}')
        command = [sys.executable, "-m", "procwatch", "agent", "--config", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)

        assert ended.returncode == code, ended.stderr
        assert re.fullmatch(error + "\n", ended.stderr), ended.stderr

    def test_metrics(self, tmp_path: Path, sink: str, tiny: Path):
        """
        Numbers come from the port and into the file.
        """
        port, prom = 20_000 + os.getpid() % 10_000, tmp_path / "p.prom"
        with agent(tmp_path, f'[metrics]\nport = {port}\ntextfile = "{prom}"\ninterval_s = 1\n{sink}') as running:
            subprocess.run([tiny], check=True)
            while True:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    text = answer.read().decode()
                written = re.search(r'procwatch_sink_written_total{sink="file"} (\d+)', text)
                if written and int(written[1]) > 2:
                    break
            running.stop()

        assert 'procwatch_events_total{backend="' in text
        assert 'procwatch_sink_latency_seconds_bucket{le="+Inf",sink="file"}' in text
        assert "procwatch_build_info" in prom.read_text()

    def test_foreign_variables(self, tmp_path: Path, sink: str):
        """
        A variable that begins like ours is told, and nothing else happens.
        """
        with agent(tmp_path, sink, PROCWATCH_PORT="tcp://10.0.0.1:80") as running:
            log = running.stop()

        assert [line["name"] for line in log if line["level"] == "warning"] == ["PROCWATCH_PORT"]


class TestReload:
    """
    SIGHUP.
    """

    def test_loses_nothing(self, tmp_path: Path, tiny: Path):
        """
        In a storm, sinks go, come and change, and every exec is in a file once.
        """
        first, second, third = (tmp_path / name for name in "abc")
        config = tmp_path / "procwatch.toml"
        steps = [
            (first, FILE.format(second)),  # the same sink, elsewhere
            (second, FILE.format(second) + 'format = "ecs"\n' + FILE.format(third)),
            (third, 'labels = { a = "b" }\n' + FILE.format(second) + FILE.format(third)),
        ]
        with agent(tmp_path, FILE.format(first)) as running:
            for path, text in steps:
                with storm(tiny, 500):
                    grown(path, 50)
                    config.write_text(text)
                    running.hang_up()
            log = running.stop()
        both = lines(second)
        ecs, native = [event for event in both if "@timestamp" in event], [event for event in both if "time" in event]
        ids = execs(lines(first), tiny) + execs(native, tiny) + _ecs_execs(ecs, tiny)

        assert (len(ids), len(set(ids))) == (1500, 1500)
        late = lines(third)
        assert late[0]["event"] == "ready"
        assert set() < set(execs(late, tiny)) < set(ids)
        assert ecs
        assert [line["event"] for line in log].count("reloaded") == 3

    def test_moved_file(self, tmp_path: Path, sink: str):
        """
        A sink that is unchanged opens its file anew, for logrotate.
        """
        path, moved = tmp_path / "events.jsonl", tmp_path / "moved"
        with agent(tmp_path, sink) as running:
            grown(path, 1)
            path.rename(moved)
            running.hang_up()
            running.stop()

        assert lines(moved)[0]["event"] == "ready"
        assert lines(path)[-1]["event"] == "stop"

    def test_at_the_end(self, tmp_path: Path, sink: str):
        """
        A SIGHUP while it stops does not end it early.
        """
        with agent(tmp_path, sink) as running:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                running.process.send_signal(number)
            assert running.process.wait(30) == 0

        assert lines(tmp_path / "events.jsonl")[-1]["event"] == "stop"

    def test_problems_change_nothing(self, tmp_path: Path, sink: str, tiny: Path):
        """
        A file that cannot be, or a sink that cannot begin, leaves what was before; both are said.
        """
        config = tmp_path / "procwatch.toml"
        with agent(tmp_path, sink) as running:
            config.write_text("backed = 1\nx = 2")
            running.hang_up()
            config.write_text('[[sinks]]\ntype = "file"\npath = "/nowhere/x"\n')
            running.hang_up()
            subprocess.run([tiny], check=True)
            log = running.stop()
        events = lines(tmp_path / "events.jsonl")

        assert len(execs(events, tiny)) == 1
        assert events[-1]["event"] == "stop"
        errors = [line["error"] for line in log if line["event"] == "not reloaded"]
        assert [re.sub(r".*toml:", "", error)[:20] for error in errors[:2]] == [
            "1: no option 'backed",
            "2: no option 'x'",
        ]
        assert "cannot write to /nowhere/x" in errors[2]

    def test_needs_restart(self, tmp_path: Path, sink: str):
        """
        What only a restart changes is named, and stays.
        """
        with agent(tmp_path, 'backend = "scan"\n' + sink) as running:
            (tmp_path / "procwatch.toml").write_text('backend = "netlink"\nlog_level = "debug"\n' + sink)
            running.hang_up()
            log = running.stop()

        (told,) = [line for line in log if line["event"] == "needs a restart"]
        assert (told["option"], told["running"], told["file"]) == ("backend", "scan", "netlink")


def _ecs_execs(events: list[dict[str, Any]], exe: Path) -> list[str]:
    found = []
    for event in events:
        process, action = event.get("process") or {}, (event.get("event") or {}).get("action")
        if action == "exec" and process.get("executable") == str(exe):
            found.append(process["entity_id"])
    return found


class TestKilled:
    """
    kill -9.
    """

    @pytest.mark.parametrize("backend", ["ebpf", "netlink"])
    def test_in_a_storm(self, tmp_path: Path, tiny: Path, backend: str):
        """
        What was written before is there in whole lines; afterwards living processes have the ids they had.
        """
        root()
        path = tmp_path / "events.jsonl"
        text = f'backend = "{backend}"\ninitial = true\n' + FILE.format(path)
        with storm(tiny, 1_000_000) as storming, living(["cat"]) as lives:
            try:
                with agent(tmp_path, text, state=True) as running:
                    before = grown(path, 500)
                    running.process.kill()
                    running.process.wait()
                assert path.read_bytes().startswith(before)
                with agent(tmp_path, text, state=True) as running:
                    grown(path, path.read_bytes().count(b"\n") + 500)
                    running.stop()
            finally:
                storming.kill()
            events = lines(path)
            known = [event["id"] for event in events if event["event"] == "running" and event["pid"] == lives.pid]

        starts = [at for at, event in enumerate(events) if event["event"] == "ready"]
        ids = [execs(events[: starts[1]], tiny), execs(events[starts[1] :], tiny)]
        assert len(starts) == 2
        assert len(known) == 2
        assert known[0] == known[1]
        assert len(ids[0]) > 10
        assert len(ids[1]) > 10
        assert len(set(ids[0] + ids[1])) == len(ids[0] + ids[1])


class TestState:
    """
    Over a restart.
    """

    def test_goes_on(self, tmp_path: Path, sink: str):
        """
        A process that was seen by the first agent ends under the second with its id, its dead parent and its age.
        """
        root()
        path = tmp_path / "events.jsonl"
        text = "ancestors = 5\n" + sink
        orphan = ["sh", "-c", "exec 3<&0; (read x <&3) & exit 0"]
        reader, writer = os.pipe()
        with agent(tmp_path, text, state=True) as running:
            subprocess.run(orphan, stdin=reader, check=True)
            running.stop()
        os.close(reader)
        first = lines(path)
        ids = {event["id"] for event in first if event["event"] == "exec" and event["argv"] == orphan}
        (shell,) = [event["id"] for event in first if event["event"] == "fork" and event["parent"]["id"] in ids]
        with agent(tmp_path, text, state=True) as running:
            os.close(writer)
            while not (ended := [one for one in lines(path) if one["event"] == "exit" and one["id"] == shell]):
                time.sleep(0.001)
            log = running.stop()

        dead = {event["id"] for event in first if event["event"] == "exit"}
        assert ended[0]["parent"]["id"] in dead
        assert ended[0]["duration_ns"] > 0
        assert "state taken up" in {line["event"] for line in log}


def capabilities(pid: int, sets: tuple[str, ...] = ("CapPrm", "CapEff", "CapInh", "CapAmb")) -> set[str]:
    """
    What any thread of a process has in any of its sets.
    """
    mask = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        for name in sets:
            mask |= int(re.findall(rf"{name}:\s+(\w+)", status)[0], 16)
    return {name for number, name in enumerate(privileges.CAPABILITIES) if mask >> number & 1}


class TestPrivileges:
    """
    What is given back.
    """

    @pytest.mark.parametrize("backend", ["ebpf", "netlink", "scan"])
    def test_dropped(self, tmp_path: Path, sink: str, tiny: Path, backend: str):
        """
        Once it is ready no thread has more than it needs, nor a way back; and it still sees all, and rotates files.
        """
        root()
        text = f'backend = "{backend}"\nwithout = ["fanotify"]\n{sink}rotate_bytes = "64KiB"\n'
        with agent(tmp_path, text) as running:
            has = capabilities(running.pid, ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd"))
            status = Path(f"/proc/{running.pid}/status").read_text()
            storm(tiny, 100).wait()
            running.stop()

        assert has == {"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}
        assert "NoNewPrivs:\t1" in status
        assert backend == "scan" or len(list(tmp_path.glob("events.jsonl*"))) > 1

    def test_fanotify_keeps_its_thread(self, tmp_path: Path, sink: str):
        """
        The thread that marks new filesystems keeps what it has; all that are started later do not.
        """
        root()
        with agent(tmp_path, f'backend = "netlink"\n{sink}') as running:
            main = Path(f"/proc/{running.pid}/task/{running.pid}/status").read_text()
            running.stop()

        assert "CapEff:\t0000000000080004" in main

    def test_kept(self, tmp_path: Path, sink: str):
        """
        Who asks for it keeps all.
        """
        with agent(tmp_path, f"keep_privileges = true\n{sink}") as running:
            assert capabilities(running.pid) == capabilities(os.getpid())
            running.stop()

    def test_another_user(self, tmp_path: Path, sink: str, tiny: Path):
        """
        With `user` it goes on as that user, and reads /proc of others still.
        """
        root()
        tmp_path.chmod(0o777)
        for parent in list(tmp_path.parents)[:-2]:
            parent.chmod(parent.stat().st_mode | 0o055)
        with living(["cat"]) as other, agent(tmp_path, f'user = "nobody"\ninitial = true\n{sink}') as running:
            status = Path(f"/proc/{running.pid}/status").read_text()
            subprocess.run([tiny], check=True)
            running.stop()
        events = lines(tmp_path / "events.jsonl")

        assert re.search(r"Uid:\t65534\t65534\t65534\t65534", status)
        assert len(execs(events, tiny)) == 1
        (running_,) = [event for event in events if event["event"] == "running" and event["pid"] == other.pid]
        assert running_["exe"] == os.path.realpath(shutil.which("cat") or "")

    def test_no_such_user(self, tmp_path: Path, sink: str):
        """
        A user that is not there is a mistake in the configuration.
        """
        path = tmp_path / "procwatch.toml"
        path.write_text(f'user = "nobody-at-all"\nlog_level = "error"\nstate = ""\n{sink}')
        command = [sys.executable, "-m", "procwatch", "agent", "--config", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)

        assert (ended.returncode, ended.stderr) == (
            2,
            "procwatch: no user 'nobody-at-all': add it, or leave `user` out\n",
        )


class TestOutlets:
    """
    All sinks of an agent.
    """

    @staticmethod
    def ready() -> Ready:
        return Ready(
            time="2026-01-01T00:00:00.000000000Z",
            host="h",
            boot_id="b",
            version="1",
            backend="scan",
            sources=[],
            skipped=[],
            kernel="6",
        )

    async def test_a_bug_in_one_sink(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """
        A sink that raises does not end the others, and is told once.
        """
        log = _Log()
        outlets = Outlets(Maker("h", Clock()), log)
        tables = [SinkTable(type="file", name=name, options={"path": str(tmp_path / name)}) for name in "ab"]
        await outlets.open(tuple(tables))
        monkeypatch.setattr(outlets._outlets[0].sink, "put", lambda batch: 1 / 0)
        outlets([self.ready()])
        outlets([self.ready()])
        await outlets.close(5)

        assert log.told == ["a sink failed; please report it"]
        assert len(lines(tmp_path / "b")) == 2

    async def test_one_cannot_begin(self, tmp_path: Path, no_leaks: None):
        """
        At the start that ends all, and nothing stays open.
        """
        tables = [
            SinkTable(type="file", name=name, options={"path": path})
            for name, path in (("a", str(tmp_path / "a")), ("b", "/nowhere/b"))
        ]
        with pytest.raises(ProcwatchError, match="cannot write to /nowhere/b"):
            await Outlets(Maker("h", Clock()), _Log()).open(tuple(tables))

    async def test_too_much_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """
        What does not fit while a sink is replaced is dropped, counted, and told where it was.
        """
        monkeypatch.setattr("procwatch.outlets.MAX_WAITING", 3)
        outlets = Outlets(Maker("h", Clock()), _Log())
        tables = [SinkTable(type="file", name="f", options={"path": str(tmp_path / name)}) for name in "ab"]
        await outlets.open((tables[0],))
        (outlet,) = outlets._outlets
        close = outlet.sink.close

        async def busy() -> None:
            outlets([self.ready()] * 5)
            await close()

        monkeypatch.setattr(outlet.sink, "close", busy)
        await outlets.change((tables[1],), all_anew=False)
        await outlets.close(5)

        assert [event["event"] for event in lines(tmp_path / "b")] == ["ready"] * 3 + ["lost"]
        assert lines(tmp_path / "b")[-1]["count"] == 2


class _Log:
    """
    Takes lines of diagnostics.
    """

    def __init__(self) -> None:
        self.told: list[str] = []

    def exception(self, event: str, **fields: Any) -> None:
        self.told.append(event)

    warning = error = exception


class TestNotifier:
    """
    sd_notify.
    """

    def test_nobody_listens(self):
        """
        Without a service manager, or with one that is gone, nothing happens.
        """
        Notifier({}).ready("x")
        Notifier({"NOTIFY_SOCKET": "/nowhere"}).stopping()

        assert Notifier({}).watchdog_s is None

    @pytest.mark.parametrize(
        ("environ", "seconds"),
        [
            ({"WATCHDOG_USEC": "30000000"}, 15),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "x"}, None),
        ],
    )
    def test_watchdog(self, environ: dict[str, str], seconds: float | None):
        """
        Half of what the manager waits for, if it waits for this process.
        """
        assert Notifier(environ).watchdog_s == seconds


def test_signals_end_at_once_the_second_time(tmp_path: Path):
    """
    A second SIGTERM does not wait for a sink that hangs.
    """
    fifo = tmp_path / "out"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with agent(tmp_path, 'drain_s = 60\n[[sinks]]\ntype = "stdout"\n') as running:
        storm(Path("/bin/true"), 200).wait()  # more than a pipe holds
        running.process.terminate()
        running.wait("STOPPING=1")
        running.process.terminate()

        assert running.process.wait(20) == -signal.SIGTERM
    os.close(reader)
