"""
contrib/systemd, and what else is shipped to deploy.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from procwatch import config, privileges
from procwatch.sinks.unix import DEFAULT_PATH
from tests.agents import agent, execs, lines
from tests.conftest import need

UNITS = Path("contrib/systemd")
SERVICE = UNITS / "procwatch.service"
EXPOSURE = 2.0
SINK = '[[sinks]]\ntype = "file"\npath = "{}"\n'


def analyze(*arguments: str | Path) -> str:
    """
    What systemd-analyze says.
    """
    need(shutil.which("systemd-analyze"), "needs the package systemd")
    ended = subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def settings(name: str) -> list[str]:
    """
    The words of a setting of the service, which may stand more than once.
    """
    found = re.findall(rf"(?m)^{name}=(.*)$", SERVICE.read_text())
    return " ".join(found).split()


def allowed() -> set[str]:
    """
    The system calls that the service may make.
    """
    calls: set[str] = set()
    for line in re.findall(r"(?m)^SystemCallFilter=(.*)$", SERVICE.read_text()):
        words = line.removeprefix("~").split()
        named = {call for word in words for call in (_set(word) if word.startswith("@") else {word})}
        calls = calls - named if line.startswith("~") else calls | named
    return calls | _set("@default")


def _set(name: str) -> set[str]:
    words = analyze("syscall-filter", name).split("\n")
    members = {word.strip() for word in words[1:] if word.strip() and not word.strip().startswith("#")}
    return {call for word in members for call in (_set(word) if word.startswith("@") else {word})}


def test_exposure():
    """
    systemd-analyze security rates the service at 2.0 or better.
    """
    found = re.search(
        r"Overall exposure level for procwatch.service: ([\d.]+)", analyze("security", "--offline=true", SERVICE)
    )

    assert found is not None
    assert float(found[1]) <= EXPOSURE


def test_units_are_right():
    """
    systemd finds nothing to say of the units.
    """
    assert analyze("verify", SERVICE, UNITS / "procwatch.socket") == ""


def test_calls(tmp_path: Path):
    """
    Every system call that the agent makes in its life is allowed by the unit.
    """
    need(shutil.which("strace"), "needs strace")
    need(os.geteuid() == 0, "needs root")
    trace = tmp_path / "trace"
    text = f'[metrics]\nport = 0\ntextfile = "{tmp_path}/prom"\n[[sinks]]\ntype = "unix"\npath = "{tmp_path}/sock"\n'
    strace = ["strace", "-f", "-qq", "-o", str(trace)]
    with agent(tmp_path, text + SINK.format(tmp_path / "events"), prefix=strace, state=True) as running:
        (child,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running.pid = int(child)  # strace takes no signals for it
        running.hang_up()
        os.kill(running.pid, signal.SIGTERM)
        assert running.process.wait(30) == 0
    made = set(re.findall(r"(?m)^\d+ +([a-z0-9_]+)\(", trace.read_text()))

    assert {"bpf", "capset"} <= made
    assert made - allowed() == set()


def test_as_the_service_runs(tmp_path: Path, tiny: Path):
    """
    An ordinary user with the unit's ambient capabilities sees every exec, and gives back what it needed to begin.
    """
    need(os.geteuid() == 0, "needs root")
    names = settings("AmbientCapabilities")
    need(set(names) <= privileges.permitted(), "needs the capabilities of the unit")
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    caps = "-all," + ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in names)
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    prefix += [f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}"]
    with agent(tmp_path, SINK.format(tmp_path / "events"), prefix=prefix, state=True) as running:
        status = Path(f"/proc/{running.pid}/status").read_text()
        for _ in range(20):
            subprocess.run([tiny], check=True)
        running.stop()
    events = lines(tmp_path / "events")

    assert names == settings("CapabilityBoundingSet")
    assert len(execs(events, tiny)) == 20
    assert "Uid:\t65534" in status
    for name in ("CapPrm", "CapEff"):
        assert f"{name}:\t0000000000080004" in status
    for name in ("CapInh", "CapAmb"):
        assert f"{name}:\t0000000000000000" in status


def test_places_agree():
    """
    What the units make is what the agent and the example use.
    """
    example = config.read("contrib/procwatch.toml", {})
    state, log = example.state, example.sinks[0].options["path"]
    tmpfiles = {
        line.split()[1]: line.split()[2:5] for line in (UNITS / "procwatch.tmpfiles").read_text().splitlines()[1:]
    }
    socket = ConfigParser(strict=False)
    socket.read(UNITS / "procwatch.socket")

    assert os.path.dirname(state) == f"/var/lib/{settings('StateDirectory')[0]}"
    assert os.path.dirname(log) == f"/var/log/{settings('LogsDirectory')[0]}"
    assert tmpfiles[os.path.dirname(log)] == ["0750", "procwatch", "procwatch"]
    assert socket["Socket"]["ListenStream"] == DEFAULT_PATH
    assert os.path.dirname(DEFAULT_PATH) in tmpfiles
    assert settings("User") == ["procwatch"]
    assert re.search(r"(?m)^u procwatch ", (UNITS / "procwatch.sysusers").read_text())


def test_readme():
    """
    The README names every capability of the unit, and says which are kept.
    """
    rows = re.findall(r"(?m)^\| (CAP_.*?) \|.*\| (yes|no.*?) \|$", (UNITS / "README.md").read_text())
    told = {name: kept for names, kept in rows for name in names.split(", ")}

    assert set(told) == set(settings("AmbientCapabilities"))
    assert {name for name, kept in told.items() if kept == "yes"} == privileges.KEPT


def test_container():
    """
    The configurations in the container and in Kubernetes are right ones.
    """
    config.read("contrib/container/procwatch.toml", {})
    manifest = Path("contrib/kubernetes/daemonset.yaml").read_text()
    block = re.search(r"(?m)^  procwatch\.toml: \|\n((?:    .*\n|\n)+)", manifest)

    assert block is not None
    config.parse(re.sub(r"(?m)^    ", "", block[1]).encode(), "daemonset.yaml", {"PROCWATCH_HOST_ROOT": "/host"})
    assert "privileged: true" not in manifest


@pytest.mark.parametrize("name", ["PROCWATCH_HOST", "PROCWATCH_HOST_ROOT"])
def test_variables_of_containers(name: str):
    """
    The variables that the examples set are options.
    """
    assert config.unknown_variables({name: "x"}) == []
