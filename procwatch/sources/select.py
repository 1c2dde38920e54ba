"""
The ladder: which sources run here, best first.

One ordered list serves `--backend auto`, the backends by name, doctor, and the tests that run one case on every source.
The first source of a rung leads: without it the rung cannot be used. The others add to it, each only if it can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from msgspec import Struct

from procwatch.errors import ConfigError, SourceUnavailable
from procwatch.events import Skipped
from procwatch.sources.base import Source
from procwatch.sources.proc_connector import ProcConnector


class Options(Struct, frozen=True):
    """
    What users may set for all sources.
    """

    buffer_bytes: int | None = None  # None: each source's own default
    latency_s: float = 0.02
    without: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()
    hold: bool = False  # make each exec wait until it has been read


class Selection(Struct):
    """
    What was opened: the lead first.
    """

    backend: str
    sources: list[Source]
    skipped: list[Skipped]
    failures: list[SourceUnavailable] = []  # the same, as errors: `__cause__` may know more


Make = Callable[[Options], Source]


def _netlink(options: Options) -> Source:
    return ProcConnector(buffer_bytes=options.buffer_bytes or 64 << 20, gather_s=options.latency_s)


def _fanotify(options: Options) -> Source:
    if options.hold:
        from procwatch.sources.hold import Hold

        return Hold()
    from procwatch.sources.fanotify import Fanotify

    return Fanotify()


def _taskstats(options: Options) -> Source:
    from procwatch.sources.taskstats import Taskstats

    return Taskstats(buffer_bytes=options.buffer_bytes or 32 << 20)


def _ebpf(options: Options) -> Source:
    from procwatch.sources.ebpf import Ebpf

    return Ebpf(
        buffer_bytes=options.buffer_bytes or 16 << 20,
        gather_s=options.latency_s,
        exec_failed="exec_failed" in options.kinds,
        every_fork=not options.kinds or not options.kinds.isdisjoint(("fork", "exec_failed")),
    )


def _scan(options: Options) -> Source:
    from procwatch.sources.scan import Scan

    return Scan()


LADDER: dict[str, Sequence[tuple[str, Make]]] = {
    "ebpf": (("ebpf", _ebpf),),
    "netlink": (("netlink", _netlink), ("fanotify", _fanotify), ("taskstats", _taskstats)),
    "scan": (("scan", _scan),),
}
HOLDING = "netlink"
# Kinds that only some rungs can tell; all others are told by each.
TELLS: dict[str, frozenset[str]] = {
    "ebpf": frozenset({"exec_failed"}),
    "netlink": frozenset({"comm", "uid", "gid", "sid", "ptrace", "coredump"}),
    "scan": frozenset(),
}
SPECIAL = frozenset().union(*TELLS.values())
BACKENDS = ("auto", *LADDER)
OPTIONAL = tuple(name for rung in LADDER.values() for name, _ in rung[1:])


def open_sources(backend: str, options: Options) -> Selection:
    """
    Open the best rung that works, or the one that is named.

    Raises:
        ConfigError: No such backend.
        SourceUnavailable: The named one, or for `auto` every one, cannot work here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"no backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if unknown := set(options.without) - set(OPTIONAL):
        raise ConfigError(f"cannot do without {', '.join(sorted(unknown))}: only {', '.join(OPTIONAL)} can be left out")
    if options.hold and backend not in ("auto", HOLDING):
        raise ConfigError(f"hold needs the backend {HOLDING}, not {backend}")
    failures: list[SourceUnavailable] = []
    rungs = (HOLDING,) if options.hold else _by_kinds(options.kinds) if backend == "auto" else (backend,)
    if not _tellable(options.kinds, rungs):
        raise ConfigError(f"{backend} tells none of {', '.join(sorted(options.kinds))}: {_who_tells(options.kinds)}")
    for rung in rungs:
        try:
            sources = _open_rung(rung, options, failures)
        except SourceUnavailable as error:
            failures.append(error)
        else:
            skipped = [Skipped(error.name, error.reason, error.remedy) for error in failures]
            untold = sorted(options.kinds & SPECIAL - TELLS[rung])
            if backend == "auto" and not options.hold:
                better = list(LADDER)[: list(LADDER).index(rung)]
                asked = ", ".join(sorted(options.kinds & SPECIAL))
                tried = {error.name for error in failures}
                skipped += [
                    Skipped(name, f"does not tell {asked}", "ask for other events")
                    for name in better
                    if name not in tried
                ]
            skipped += [Skipped(kind, f"{rung} does not tell it", _who_tells({kind})) for kind in untold]
            return Selection(rung, sources, skipped, failures)
    raise failures[-1]


def _by_kinds(kinds: frozenset[str]) -> list[str]:
    """
    The ladder, with the rungs that tell all that is asked for before the others.
    """
    return sorted(LADDER, key=lambda rung: not (kinds & SPECIAL <= TELLS[rung]))


def _tellable(kinds: frozenset[str], rungs: Collection[str]) -> bool:
    """
    Whether any of the rungs tells any of the kinds.
    """
    return not kinds or any(kinds - SPECIAL or kinds & TELLS[rung] for rung in rungs)


def _who_tells(kinds: Collection[str]) -> str:
    """
    What to do to be told.
    """
    rungs = [rung for rung, tells in TELLS.items() if tells & set(kinds)]
    return " or ".join(f"--backend {rung}" for rung in rungs)


def _open_rung(rung: str, options: Options, failures: list[SourceUnavailable]) -> list[Source]:
    (_, make_lead), *others = LADDER[rung]
    lead = make_lead(options)
    lead.open()
    opened = [lead]
    for name, make in others:
        if name in options.without:
            failures.append(SourceUnavailable(name, "left out as asked", f"run without `--without {name}`"))
            continue
        source = make(options)
        try:
            source.open()
        except SourceUnavailable as error:
            if options.hold and error.name == "hold":  # asked for by name
                for other in opened:
                    other.close()
                raise
            failures.append(error)
        else:
            opened.append(source)
    return opened


def limits(sources: Collection[Source]) -> list[Skipped]:
    """
    What sources that do run say that they cannot see here.
    """
    return [Skipped(source.name, limit, "") for source in sources for limit in getattr(source, "limits", ())]
