"""
Checks a configuration: each problem with its file and line, the value, what is allowed, and what may have been meant.
"""

from __future__ import annotations

import inspect
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_origin

import msgspec
from msgspec import Struct

from procwatch import formats, options, sinks
from procwatch.clock import Clock
from procwatch.config.model import Config, Metrics, SinkTable
from procwatch.config.text import Place, choices, describe, nearest, shown
from procwatch.errors import ConfigError
from procwatch.events import DEFAULT_KINDS
from procwatch.policy.filter import Filter
from procwatch.table.draft import Maker

PREFIX = "PROCWATCH_"
# Of what sinks have in common, what the agent fills in.
_GIVEN = ("maker", "encode", "events", "keep")
# These have a check of their own.
_OWN = ("events", "buffer", "filter", "sinks", "metrics")
_SECRET = re.compile("password|token|secret|headers")
_BAD = object()
T = TypeVar("T")


class Problem(Struct, frozen=True):
    """
    One thing that cannot be.
    """

    where: str  # "procwatch.toml:12", or the name of an environment variable
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Invalid(ConfigError):
    """
    A configuration with at least one problem.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more: procwatch config check)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}")


class Checker:
    """
    Checks all of a configuration and gathers what is wrong.
    """

    def __init__(self, name: str, lines: Mapping[Place, int]) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._lines = lines
        self._overridden: dict[Place, str] = {}

    def override(self, tables: dict[str, Any], environ: Mapping[str, str]) -> None:
        """
        Put what the environment says in the place of what the file says.
        """
        for variable, (path, kind) in variables().items():
            if variable not in environ:
                continue
            place = tables
            for key in path[:-1]:
                place = place.setdefault(key, {})
            if not isinstance(place, dict):
                continue  # `metrics = 1`: told below
            place[path[-1]] = _from_environment(environ[variable], kind)
            self._overridden[path] = variable

    def config(self, tables: dict[str, Any]) -> Config:
        """
        All of it; what is wrong is left out, and stands in `problems`.
        """
        values = self._table(tables, _fields(Config), ())
        for key in _OWN:
            values.pop(key, None)
        if "events" in tables:
            values["events"] = self._try(("events",), tables["events"], lambda: _events(tables["events"]))
        if "buffer" in tables:
            self._try(("buffer",), tables["buffer"], lambda: options.buffer_bytes(tables["buffer"]))
            values["buffer"] = tables["buffer"]
        if "filter" in tables:
            values["filter"] = self._filter(tables["filter"], ("filter",))
        if "metrics" in tables and self._is_table(tables["metrics"], ("metrics",)):
            values["metrics"] = Metrics(**self._table(tables["metrics"], _fields(Metrics), ("metrics",)))
        if "sinks" in tables:
            values["sinks"] = tuple(self._sinks(tables["sinks"], values.get("events", DEFAULT_KINDS)))
        if self.problems:
            return Config()
        config = Config(**values)
        self._try_watcher(config)
        return config

    def _try_watcher(self, config: Config) -> None:
        from procwatch.watcher import Watcher

        try:
            Watcher(**config.watcher())
        except ConfigError as error:
            named = [key for key in Config.__struct_fields__ if re.search(rf"\b{key}\b", str(error))]
            self._tell(tuple(named[:1]), str(error))

    def _sinks(self, tables: Any, kinds: Sequence[str]) -> Iterator[SinkTable]:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._tell(("sinks",), "sinks cannot be this: give each sink a table [[sinks]]")
            return
        if not tables:
            self._tell(("sinks",), "no sinks: leave the key out for stdout, or give a table [[sinks]]")
        names: list[str] = []
        for at, table in enumerate(tables):
            sink = self._sink(table, at, kinds, names)
            if sink is not None:
                names.append(sink.name)
                yield sink

    def _sink(self, table: dict[str, Any], at: int, kinds: Sequence[str], names: Sequence[str]) -> SinkTable | None:
        place: Place = ("sinks", at)
        kind, allowed = table.get("type"), list(sinks.SINKS)
        if kind not in allowed:
            if "type" not in table:
                self._tell(place, f"a sink without type: choose of {', '.join(allowed)}")
            else:
                self._refuse((*place, "type"), kind, f"choose of {', '.join(allowed)}{nearest(kind, allowed)}")
            return None
        before = len(self.problems)
        try:
            own = sink_options(sinks.SINKS[kind])
        except ImportError as error:
            self._refuse((*place, "type"), kind, f"{error.name} is not installed: pip install 'procwatch[{kind}]'")
            return None
        values = self._table(table, {**_fields(SinkTable), **own}, place)
        common = {key: values.pop(key) for key in SinkTable.__struct_fields__ if key in values}
        common.setdefault("name", _free(kind, names))
        if common["name"] in names:
            self._refuse((*place, "name"), common["name"], "each sink needs a name of its own")
        if "events" in table:
            common["events"] = self._try(
                (*place, "events"), table["events"], lambda: _among(_events(table["events"]), kinds)
            )
        if "filter" in table:
            common["filter"] = self._filter(table["filter"], (*place, "filter"))
        needed = [name for name in _needed(sinks.SINKS[kind]) if name not in table]
        if needed:
            self._tell(place, f"the sink {kind!r} needs {' and '.join(needed)}")
        if len(self.problems) > before:
            return None
        sink = SinkTable(**common, options=values)
        self._try_sink(sink, place)
        return sink

    def _try_sink(self, sink: SinkTable, place: Place) -> None:
        try:
            sink.make(Maker("", Clock()))
        except ConfigError as error:
            named = [key for key in sink.options if re.search(rf"\b{key}\b", str(error))]
            self._tell((*place, *named[:1]), str(error))

    def _filter(self, table: Any, place: Place) -> dict[str, list[str]]:
        if not self._is_table(table, place):
            return {}
        criteria = list(inspect.signature(Filter).parameters)
        lists = {key: [value] if isinstance(value, str) else value for key, value in table.items()}
        values = self._table(lists, dict.fromkeys(criteria, list[str]), place)
        self._try(place, table, lambda: Filter(**values))
        return values

    # One table, one value

    def _table(self, table: Mapping[str, Any], kinds: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """
        The values that fit; for the others a problem each.
        """
        good = {}
        for key, value in table.items():
            if key not in kinds:
                of = f" of the sink {table.get('type')!r}" if place[:1] == ("sinks",) and len(place) == 2 else ""
                self._tell((*place, key), f"no option {key!r}{of}{nearest(key, kinds)}")
                continue
            found = self._value(value, kinds[key], (*place, key))
            if found is not _BAD:
                good[key] = found
        return good

    def _value(self, value: Any, kind: Any, place: Place) -> Any:
        if kind is object:
            return value
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            self._refuse(place, value, f"give {describe(kind)}{nearest(value, choices(kind))}")
            return _BAD

    def _is_table(self, value: Any, place: Place) -> bool:
        if not isinstance(value, dict):
            self._refuse(place, value, "give a table")
        return isinstance(value, dict)

    def _try(self, place: Place, value: Any, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigError as error:
            self._refuse(place, value, str(error))
            return None

    def _refuse(self, place: Place, value: Any, why: str) -> None:
        self._tell(place, f"{self._said(str(place[-1]), value)} cannot be: {why}")

    @staticmethod
    def _said(key: str, value: Any) -> str:
        return f"{key} = " + ('"..."' if _SECRET.search(key) else shown(value))

    def _tell(self, place: Place, what: str) -> None:
        for end in range(len(place), 0, -1):
            if place[:end] in self._overridden:
                self.problems.append(Problem(self._overridden[place[:end]], what))
                return
            if place[:end] in self._lines:
                self.problems.append(Problem(f"{self._name}:{self._lines[place[:end]]}", what))
                return
        self.problems.append(Problem(self._name, what))


def sink_options(sink: type[sinks.QueueSink]) -> dict[str, Any]:
    """
    The options of a type of sink, each with its type.
    """
    common, own = (typing.get_type_hints(one, include_extras=True) for one in (sink.common, sink.__init__))
    names = [name for name in sink.common.__struct_fields__ if name not in _GIVEN]
    return {name: common[name] for name in names} | {name: own[name] for name in _parameters(sink)}


def _needed(sink: type) -> list[str]:
    return [name for name, value in _parameters(sink).items() if value.default is value.empty]


def _parameters(sink: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(sink).parameters.items()
    return {name: value for name, value in parameters if value.kind is value.KEYWORD_ONLY}


def _fields(table: type[Struct]) -> dict[str, Any]:
    """
    The keys of a table with their types; `object` where a check of its own follows.
    """
    hints = typing.get_type_hints(table, include_extras=True)
    kinds = {name: object if name in _OWN else hints[name] for name in table.__struct_fields__}
    if table is Config:
        kinds["labels"] = dict[str, str]
    elif table is SinkTable:
        kinds["format"] = Literal[tuple(formats.FORMATS)]
        del kinds["options"]
    return kinds


def variables() -> dict[str, tuple[tuple[str, ...], Any]]:
    """
    The environment variables that override an option, with its place and type.
    """
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    hints = typing.get_type_hints(Config, include_extras=True)
    for name in Config.__struct_fields__:
        if name not in ("filter", "labels", "metrics", "sinks"):
            found[PREFIX + name.upper()] = ((name,), hints[name])
    for name, kind in typing.get_type_hints(Metrics, include_extras=True).items():
        found[f"{PREFIX}METRICS_{name.upper()}"] = (("metrics", name), kind)
    return found


def _from_environment(text: str, kind: Any) -> Any:
    """
    A text as what TOML would have: numbers and booleans as such, lists by their commas.
    """
    if kind is str:
        return text
    if get_origin(kind) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if re.fullmatch(r"true|false|[+-]?\d{1,15}(\.\d{1,15})?", text):
        return tomllib.loads(f"value = {text}")["value"]
    return text


def _events(value: Any) -> tuple[str, ...]:
    """
    Kinds of events in the order given.
    """
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise ConfigError("give a list of texts")
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    options.event_kinds(names)
    return tuple(names)


def _among(wanted: tuple[str, ...], made: Sequence[str]) -> tuple[str, ...]:
    for kind in wanted:
        if kind not in made:
            raise ConfigError(f"{kind!r} is not among the `events` of the top level: {', '.join(made)}")
    return wanted


def _free(kind: str, names: Sequence[str]) -> str:
    """
    A name for a sink that was given none: its type, with a number if that is taken.
    """
    return next(name for name in (kind, *(f"{kind}{n}" for n in range(2, 1000))) if name not in names)
