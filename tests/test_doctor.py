"""
doctor: what it says works, works; what does not has a reason and a remedy; as root and as anybody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from click.testing import CliRunner

from procwatch import surroundings
from procwatch.cli import cli
from procwatch.doctor import Examination, Report, examine
from procwatch.errors import SourceUnavailable
from procwatch.sources.select import LADDER, Options, open_sources
from tests.conftest import need
from tests.living import NOBODY, elsewhere

NAMES = {"netlink", "fanotify", "taskstats", "ebpf", "audit", "scan"}


def check(examination: Examination) -> Report:
    """
    What holds whoever asks.
    """
    report = examination.report
    assert {verdict.name for verdict in report.sources} == NAMES
    for verdict in report.sources:
        assert verdict.works == bool(verdict.fields)
        assert verdict.works or (verdict.reason and verdict.remedy), verdict
    return report


def test_choice_is_what_auto_takes():
    """
    Every source opened on its own agrees with the verdict, and `auto` opens what is said to be chosen.
    """
    report = check(examine())
    verdicts = {verdict.name: verdict for verdict in report.sources}
    for rung in LADDER.values():
        for name, make in rung:
            source = make(Options())
            assert (source.probe() is None) == verdicts[name].works
    selection = open_sources("auto", Options())
    for source in selection.sources:
        source.close()

    assert (report.choice, report.kernel) == (selection.backend, os.uname().release)


def test_fields_of_the_scan_are_there_for_everybody():
    """
    The last rung works for whoever has a /proc, with the fields that make an exec.
    """
    examination = examine()
    scan = next(verdict for verdict in check(examination).sources if verdict.name == "scan")

    assert {"id", "pid", "ppid", "exe", "argv", "cwd", "uid", "comm", "file", "session"} <= set(scan.fields)
    assert examination.cases["scan"]["ordinary"]
    assert examination.cases["scan"]["relative"]


def test_ebpf_names_every_child():
    """
    The best rung sees each child as it is, with memory and CPU time and the signal that killed one.
    """
    examination = examine()
    ebpf = next(verdict for verdict in examination.report.sources if verdict.name == "ebpf")
    need(ebpf.works, str(ebpf.reason))

    assert [case for case, seen in examination.cases["ebpf"].items() if not seen] == []
    assert {"exe", "argv", "cwd", "cgroup", "code", "signal", "max_rss_bytes", "cpu_user_ns"} <= set(ebpf.fields)


def test_as_nobody():
    """
    Without privileges the scan works still, eBPF and fanotify say what they need, and nothing is left behind.
    """
    need(os.geteuid() == 0, "only root can become another")
    examine()  # imports what it needs while it can be read
    report = check(elsewhere(examine, uid=NOBODY))

    works = {verdict.name: verdict.works for verdict in report.sources}
    assert (works["scan"], works["ebpf"], works["fanotify"]) == (True, False, False)
    assert report.user == "nobody"


def test_in_another_pid_namespace():
    """
    Where only part of the processes are to be seen, sources that tell of the whole host say that they do not fit.
    """
    need(os.geteuid() == 0, "only root makes namespaces")
    report = check(elsewhere(examine, pid_namespace=True))

    assert report.choice == "scan"
    reasons = {verdict.name: verdict.reason or "" for verdict in report.sources}
    assert "pid namespace" in reasons["netlink"]
    assert "pid namespace" in reasons["ebpf"] or "missing" in reasons["ebpf"]


def test_command_line():
    """
    JSON has the keys of the contract; the table has a line for each source; exit code 0 as something works.
    """
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert set(data) == {"kernel", "user", "choice", "sources"}
    assert all(set(source) == {"name", "works", "fields", "reason", "remedy"} for source in data["sources"])

    table = CliRunner().invoke(cli, ["doctor"])
    assert table.exit_code == 0
    assert {line.split()[0] for line in table.stdout.splitlines() if line.strip()} >= NAMES


def test_nothing_works(monkeypatch):
    """
    Exit code 1 when no source can be opened, and every one has said why.
    """

    def refuse(options: Options) -> None:
        raise SourceUnavailable("scan", "no /proc", "mount it")

    monkeypatch.setattr("procwatch.doctor.LADDER", {"scan": (("scan", refuse),)})
    result = CliRunner().invoke(cli, ["doctor", "--json"])

    assert result.exit_code == 1
    assert json.loads(result.stdout)["choice"] is None


def test_no_descriptor_is_left(no_leaks):
    """
    All that was opened is closed.
    """
    examine()


def test_another_agent_is_named():
    """
    A program that watches beside us is noted by its name.
    """
    code = "import sys; open('/proc/self/comm', 'w').write('falco'); print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        notes = surroundings.notes()
        other.communicate()

    assert any("falco" in note.text for note in notes)
