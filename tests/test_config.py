"""
The configuration of the agent, and contrib/procwatch.toml.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from procwatch import config, sinks
from procwatch.cli.config import check
from procwatch.config import Config, Invalid, Metrics, SinkTable
from procwatch.config.check import sink_options
from procwatch.config.text import describe, find_lines
from procwatch.errors import ConfigError
from procwatch.watcher import Watcher

EXAMPLE = Path("contrib/procwatch.toml")


def parse(text: str, **environ: str) -> Config:
    return config.parse(text.encode(), "p.toml", environ)


def problems(text: str, **environ: str) -> list[str]:
    with pytest.raises(Invalid) as caught:
        parse(text, **environ)
    return list(map(str, caught.value.problems))


class TestExample:
    """
    contrib/procwatch.toml, the one example.
    """

    whole = re.sub(r"(?m)^#(?=[a-z\[])", "", EXAMPLE.read_text())

    def test_as_it_is(self):
        """
        It loads as it is shipped, and changes no default but the sinks.
        """
        shipped = config.read(str(EXAMPLE), {})

        assert structs.replace(shipped, sinks=Config().sinks) == Config()

    def test_every_option_with_its_default(self):
        """
        With every option taken in, the file says what the defaults are.
        """
        loaded, lines = parse(self.whole), find_lines(self.whole)

        free = {"buffer", "container_wait_ms", "labels", "filter", "metrics", "sinks"}  # the default is none
        for name in Config.__struct_fields__:
            assert (name,) in lines, name
            if name not in free:
                assert getattr(loaded, name) == getattr(Config(), name), name
        assert loaded.metrics == Metrics()
        assert {path[1] for path in lines if path[0] == "metrics" and len(path) == 2} == set(Metrics.__struct_fields__)

    def test_every_sink_with_its_defaults(self):
        """
        Each type of sink is there, each with all options of its own.
        """
        tables = {table.type: table for table in parse(self.whole).sinks}

        assert set(tables) == set(sinks.SINKS)
        for name, table in tables.items():
            kind = sinks.SINKS[name]
            assert set(table.options) == set(sink_options(kind)), name
            own = {key: value.default for key, value in inspect.signature(kind).parameters.items()}
            common = {field.name: field.default for field in structs.fields(kind.common)}
            free = (None, "", inspect.Parameter.empty)  # the default is none
            defaults = {
                key: value for key, value in (common | own).items() if key in table.options and value not in free
            }
            assert {key: table.options[key] for key in defaults} == defaults, name

    def test_every_option_is_documented(self):
        """
        docs/config.md has a row for each option of the top level.
        """
        rows = re.findall(r"(?m)^\| (`.*?) \|", Path("docs/config.md").read_text())
        documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}

        assert documented == set(Config.__struct_fields__)

    def test_reload_is_documented(self):
        """
        docs/config.md says of each option whether SIGHUP changes it.
        """
        rows = re.findall(r"(?m)^\| (`.*?) \|.*\| (changes|restart) \|$", Path("docs/config.md").read_text())
        changed = {name for row, how in rows if how == "changes" for name in re.findall(r"`(\w+)`", row)}

        assert changed - {"container_wait_ms"} == config.RELOADED


class TestValues:
    """
    What is taken.
    """

    def test_empty(self):
        """
        An empty file is the defaults.
        """
        assert parse("") == Config()

    def test_watcher_takes_all(self):
        """
        What the configuration gives to the watcher is what that takes.
        """
        loaded = parse('backend = "scan"\nbuffer = "1MiB"\nlatency_ms = 5\n[filter]\nuser = "root"')
        watcher = Watcher(**loaded.watcher())

        assert loaded.latency_ms == 5
        assert watcher is not None

    def test_filter_for_names_waits_for_them(self):
        """
        A filter for containers, of the top level or of a sink, makes events wait for names unless it is set.
        """
        assert parse("").names_wait_ms() == 0
        assert parse('[filter]\npod = "a/b"').names_wait_ms() == 1000
        assert parse('[[sinks]]\ntype = "stdout"\nfilter = { container = ["web"] }').names_wait_ms() == 1000
        assert parse('container_wait_ms = 5\n[filter]\npod = "a/b"').names_wait_ms() == 5

    def test_names_of_sinks(self):
        """
        Sinks without a name are called by their type, and numbered.
        """
        table = '[[sinks]]\ntype = "stdout"\n'

        assert [sink.name for sink in parse(table * 3).sinks] == ["stdout", "stdout2", "stdout3"]

    def test_sink(self):
        """
        A sink's own options, events and filter reach its constructor.
        """
        text = '[[sinks]]\ntype = "file"\npath = "/x"\nevents = "exec, exit"\ncount = 3\nfilter = { user = "root" }'
        (table,) = parse(text).sinks

        assert table == SinkTable(
            type="file",
            name="file",
            events=("exec", "exit"),
            filter={"user": ["root"]},
            options={"path": "/x", "count": 3},
        )

    @pytest.mark.parametrize(
        ("variable", "text", "name", "value"),
        [
            ("PROCWATCH_BACKEND", "scan", "backend", "scan"),
            ("PROCWATCH_LATENCY_MS", "7.5", "latency_ms", 7.5),
            ("PROCWATCH_INITIAL", "true", "initial", True),
            ("PROCWATCH_EVENTS", "exec, exit", "events", ("exec", "exit")),
            ("PROCWATCH_WITHOUT", "fanotify", "without", ("fanotify",)),
            ("PROCWATCH_BUFFER", "1MiB", "buffer", "1MiB"),
            ("PROCWATCH_HOST", "17", "host", "17"),
            ("PROCWATCH_METRICS_PORT", "9200", "metrics", Metrics(port=9200)),
        ],
    )
    def test_environment(self, variable: str, text: str, name: str, value: Any):
        """
        A variable overrides the file, in the type of the option.
        """
        assert getattr(parse('backend = "ebpf"\nhost = "x"', **{variable: text}), name) == value

    def test_foreign_variables(self):
        """
        Variables that begin like ours are told, and change nothing.
        """
        environ = {"PROCWATCH_PORT": "tcp://10.0.0.1:80", "PROCWATCH_CONFIG": "x", "PATH": "/"}

        assert parse("", **environ) == Config()
        assert config.unknown_variables(environ) == ["PROCWATCH_PORT"]


class TestProblems:
    """
    What is not, and how that is said.
    """

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("\nbacked = 1", "p.toml:2: no option 'backed'; did you mean 'backend'?"),
            ('backend = "ebfp"', "p.toml:1: backend = \"ebfp\" cannot be: give .*; did you mean 'ebpf'?"),
            ('latency_ms = "20"', 'p.toml:1: latency_ms = "20" cannot be: give a number, 0 to 86400000'),
            ("hold = 1", "p.toml:1: hold = 1 cannot be: give true or false"),
            ('events = ["exec", "exot"]', "p.toml:1: events = .* cannot be: no event kind 'exot': choose of exec, .*"),
            ("events = 3", "p.toml:1: events = 3 cannot be: give a list of texts"),
            ('buffer = "1TiB"', "p.toml:1: buffer = \"1TiB\" cannot be: '1TiB' is not a size: .*"),
            ('without = ["x"]', 'p.toml:1: without = \\["x"\\] cannot be: give a list of "fanotify" or "taskstats"'),
            ("labels = { a = 1 }", "p.toml:1: labels = .* cannot be: give a table of texts"),
            ("metrics = 1", "p.toml:1: metrics = 1 cannot be: give a table"),
            ("[metrics]\n\nport = 70000", "p.toml:3: port = 70000 cannot be: give a whole number, 0 to 65535"),
            ("[metrics]\nports = 1", "p.toml:2: no option 'ports'; did you mean 'port'?"),
            ("[filter]\nusr = []", "p.toml:2: no option 'usr'; did you mean 'user'?"),
            ("[filter]\nuser = [1]", "p.toml:2: user = \\[1\\] cannot be: give a list of texts"),
            ("sinks = []", "p.toml:1: no sinks: .*"),
            ("[sinks]\ntype = 'stdout'", "p.toml:1: .*give each sink a table \\[\\[sinks\\]\\]"),
            ("[[sinks]]", "p.toml:1: a sink without type: choose of stdout, file, .*"),
            ('[[sinks]]\ntype = "stdotu"', "p.toml:2: type = \"stdotu\" cannot be: .*; did you mean 'stdout'?"),
            ('[[sinks]]\ntype = "file"', "p.toml:1: the sink 'file' needs path"),
            (
                '[[sinks]]\ntype = "file"\npath = "x"\ncounts = 1',
                "p.toml:4: no option 'counts' of the sink 'file'; did you mean 'count'?",
            ),
            ('[[sinks]]\ntype = "file"\npath = "x"\ncount = -1', "p.toml:4: count=-1 cannot be: 0 or more"),
            (
                '[[sinks]]\ntype = "file"\npath = "x"\ncompress = "bz2"',
                'p.toml:4: compress = "bz2" cannot be: give "gzip", "zstd" or "none"',
            ),
            (
                '[[sinks]]\ntype = "stdout"\n[[sinks]]\ntype = "stdout"\nname = "stdout"',
                'p.toml:5: name = "stdout" cannot be: each sink needs a name of its own',
            ),
            (
                'events = ["exec"]\n[[sinks]]\ntype = "stdout"\nevents = ["exit"]',
                "p.toml:4: events = .*'exit' is not among the `events` of the top level: exec",
            ),
            ("a = ", "p.toml:1: not TOML: .*"),
            ("[a", "p.toml:1: not TOML: .*"),
        ],
    )
    def test_says_where_and_what(self, text: str, problem: str):
        """
        File, line, key, value, what is allowed, and the nearest right name.
        """
        (found,) = problems(text)
        assert re.fullmatch(problem.replace("?", "\\?").replace("|", "\\|"), found), found

    def test_all_at_once(self):
        """
        Every problem is told, in the order of the lines; one line for who wants one only.
        """
        found = problems("x = 1\nancestors = 1000\n[metrics]\nport = -1\n")

        assert [problem.split(":")[1] for problem in found] == ["1", "2", "4"]
        with pytest.raises(ConfigError, match=r"^p\.toml:1: .* \(and 2 more: procwatch config check\)$"):
            parse("x = 1\nancestors = 1000\n[metrics]\nport = -1\n")

    def test_environment_is_named(self):
        """
        A problem of a variable is told of the variable.
        """
        (found,) = problems("", PROCWATCH_METRICS_PORT="many")

        assert found == 'PROCWATCH_METRICS_PORT: port = "many" cannot be: give a whole number, 0 to 65535'

    def test_secrets_are_not_shown(self):
        """
        The value of an option that is a secret does not come into a log.
        """
        assert '"..."' in config.check.Checker("x", {})._said("password", "hunter2")

    def test_not_utf8(self):
        """
        Bytes that are not UTF-8 are told with their line.
        """
        with pytest.raises(Invalid, match=r"^p\.toml:2: not UTF-8"):
            config.parse(b'a = "b"\nc = "\xff"', "p.toml", {})

    @given(st.text() | st.from_regex(r"(\[?\[?[a-z.]{1,9}\]?\]?( = .{1,5})?\n){1,5}"))
    def test_any_text(self, text: str):
        """
        Any text is a configuration or Invalid, never another error.
        """
        with suppress(Invalid):
            config.parse(text.encode("utf-8", "surrogatepass"), "p.toml", {})


class TestCheck:
    """
    `procwatch config check`.
    """

    def test_ok(self):
        """
        A good file: ok, and 0.
        """
        result = CliRunner().invoke(check, [str(EXAMPLE)])

        assert (result.exit_code, result.output) == (0, "ok\n")

    def test_problems(self, tmp_path: Path):
        """
        A bad one: a line for each problem, and 2.
        """
        path = tmp_path / "p.toml"
        path.write_text("x = 1\ny = 2\n")
        result = CliRunner().invoke(check, [str(path)])

        assert result.exit_code == 2
        assert [line.split(": ")[0] for line in result.output.splitlines()] == [f"{path}:1", f"{path}:2"]

    def test_no_file(self):
        """
        A file that is not there is a ConfigError, which the command line makes 2 of.
        """
        result = CliRunner().invoke(check, ["/nowhere"])

        assert str(result.exception) == "cannot read /nowhere: No such file or directory"


def test_lines():
    """
    Keys are found in tables, arrays of tables and tables in these.
    """
    lines = find_lines('a = 1\n[b]\n "c" = 2\n[[sinks]]\nx.y = 1\n[[sinks]]\n[sinks.filter]\nuser = []\n')

    assert {(1, ("a",)), (3, ("b", "c")), (5, ("sinks", 0, "x", "y")), (8, ("sinks", 1, "filter", "user"))} <= {
        (line, path) for path, line in lines.items()
    }


def test_describe():
    """
    Types in words.
    """
    assert describe(dict[str, str] | None) == "a table of texts"
    assert describe(int | str) == "a whole number or a text"
