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
    gather_s = min(options.latency_s, 0.01)
    return ProcConnector(buffer_bytes=options.buffer_bytes or 64 << 20, gather_s=gather_s)


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
    for rung in (HOLDING,) if options.hold else LADDER if backend == "auto" else (backend,):
        try:
            sources = _open_rung(rung, options, failures)
        except SourceUnavailable as error:
            failures.append(error)
        else:
            skipped = [Skipped(error.name, error.reason, error.remedy) for error in failures]
            return Selection(rung, sources, skipped, failures)
    raise failures[-1]


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
