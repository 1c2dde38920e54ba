"""
What is fuzzed: each takes bytes and may raise nothing.

A decoder's promise is facts or DecodeError, so that error is caught here and all others are findings. Where something
more can be said of the result, it is asserted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from msgspec import structs

from procwatch import config, events, storms
from procwatch.clock import Clock
from procwatch.enrich import containers
from procwatch.errors import ConfigError, DecodeError
from procwatch.facts import Details, Fact
from procwatch.formats import console, ecs, logfmt, native, otel
from procwatch.policy.filter import Filter
from procwatch.table.draft import Draft, Maker, Who
from procwatch.wire import bpf_event, cn_proc, elf, execve, fanotify, mountinfo, procfs, taskstats
from tests.test_express import ORDINARY, Way

Target = Callable[[bytes], None]
_MACHINES = ("x86_64", "aarch64", "vax")
_MAKER = Maker("host", Clock(0))
_PROC = Path("/proc/self")


def ring(data: bytes) -> None:
    """
    Records of the BPF programs, as they lie in the ring.
    """
    facts: list[Fact] = []
    for peaks in (False, True):
        decoder = bpf_event.Decoder(peaks=peaks)
        with suppress(DecodeError):
            stop = decoder.decode(data, 0, len(data), facts)
            assert 0 <= stop <= len(data)


def short_way(data: bytes) -> None:
    """
    The same records, written as lines without facts; what is drained in one go, and once more when all is known.
    """
    kinds = ("exec", "fork", "exit")
    for line in Way(kinds, express=True).write([data, data]).splitlines():
        assert json.loads(line)["event"] in kinds


def connector(data: bytes) -> None:
    """
    Datagrams of the process connector.
    """
    with suppress(DecodeError):
        cn_proc.decode(data)
    cn_proc.decode_slots(memoryview(data[: cn_proc.SLOT].ljust(cn_proc.SLOT, b"\0")), [len(data)])


def opens(data: bytes) -> None:
    """
    Events of fanotify.
    """
    with suppress(DecodeError):
        fanotify.decode(data)


def accounts(data: bytes) -> None:
    """
    Messages of taskstats.
    """
    with suppress(DecodeError):
        taskstats.decode(data)
    with suppress(DecodeError):
        taskstats.errors(data)


def executables(data: bytes) -> None:
    """
    The first bytes of a file that is executed, and what they point to.
    """
    elf.script_line(data)
    with suppress(DecodeError):
        head = elf.head(data)
        begin, size = elf.headers_range(head)
        assert begin >= 0
        assert size >= 0
        at, length = elf.interpreter_range(head, data[begin : begin + size])
        elf.name(data[at : at + length])


def calls(data: bytes) -> None:
    """
    /proc/PID/syscall of a process in execve(2).
    """
    for machine in _MACHINES:
        with suppress(DecodeError):
            execve.decode(data, machine)


def mounts(data: bytes) -> None:
    """
    /proc/PID/mountinfo.
    """
    with suppress(DecodeError):
        mountinfo.reachable(mountinfo.decode(data))


def proc(data: bytes) -> None:
    """
    The other texts of /proc.
    """
    for decode in (procfs.stat, procfs.status, procfs.argv, procfs.last_pid, procfs.born, procfs.auxv, procfs.text):
        with suppress(DecodeError):
            decode(data)


def cgroups(data: bytes) -> None:
    """
    /proc/PID/cgroup, and which container a path belongs to.
    """
    with suppress(DecodeError):
        path = procfs.cgroup_path(data)
        assert path.startswith("/")
        containers.parse(path)
    containers.parse(data.decode("utf-8", "surrogateescape"))


def settings(data: bytes) -> None:
    """
    The configuration file.
    """
    with suppress(ConfigError):
        config.parse(data, "procwatch.toml", {})


def lines(data: bytes) -> None:
    """
    What a process calls itself, in every format: one line, valid, without control characters.
    """
    text = data.decode("utf-8", "surrogateescape")
    event = _event(text)
    assert isinstance(event, events.Exec)
    for form in (native, ecs, otel):
        buffer = bytearray()
        form.encode_into(event, buffer)
        assert json.loads(_only_line(buffer))
    for write in (logfmt.encode_into, console.Console(colour=False).encode_into):
        buffer = bytearray()
        write(event, buffer)
        line = _only_line(buffer)
        assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in line), line


def filters(data: bytes) -> None:
    """
    Patterns and values that do not fit each other.
    """
    pattern, _, text = data.decode("utf-8", "surrogateescape").partition("\0")
    inside = events.Container(text, None, text, None, events.Pod(None, text, text))
    event = structs.replace(_event(text), container=inside, user=text, unit=text)
    assert isinstance(event, events.ProcessEvent)
    for criterion in ("container", "pod", "user", "unit", "exe"):
        with suppress(ConfigError):
            assert Filter(**{criterion: [pattern]})(event) in (True, False)


def _event(text: str) -> events.Event:
    """
    An exec of a process that has one text everywhere.
    """
    details = Details(exe=text, file=text, script=text, comm=text, cwd=text, tty=text, cgroup=text, uid=0)
    who = Who("00000000-1-1", 1, 0, [text, *text.split("\n")], False, None)
    draft = Draft(kind=events.Exec, time_ns=1, who=who, details=details, missing={}, inferred=[], tail=None)
    return _MAKER.event(draft)


def _only_line(buffer: bytearray) -> str:
    assert buffer.endswith(b"\n")
    assert buffer.count(b"\n") == 1
    return buffer[:-1].decode()


def _texts(*names: str) -> list[bytes]:
    return [(_PROC / name).read_bytes()[:4096] for name in names]


def _call(number: int) -> bytes:
    return f"{number} 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffc 0x7f00\n".encode()


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(ring, short_way, connector, opens, accounts, executables, calls),
        *(mounts, proc, cgroups, settings, lines, filters),
    )
}


def seeds(name: str) -> list[bytes]:
    """
    Inputs that are right, to begin from.
    """
    captures = Path(__file__).parent.parent / "tests/captures"
    found = {
        "ring": lambda: [(captures / "bpf_ring-6.18.bin").read_bytes()[:4096]],
        "short_way": lambda: [b"".join(ORDINARY), (captures / "bpf_ring-6.18.bin").read_bytes()[:4096]],
        "connector": lambda: [
            bytes.fromhex(line) for line in (captures / "cn_proc.txt").read_text().split() if len(line) > 80
        ],
        "executables": lambda: [storms.program() or b"", b"#! /bin/sh -e\n", Path("/bin/true").read_bytes()[:4096]],
        "calls": lambda: [_call(59), _call(322), _call(221), b"running\n"],
        "mounts": lambda: _texts("mountinfo"),
        "proc": lambda: _texts("stat", "status", "cmdline", "auxv"),
        "cgroups": lambda: [
            *_texts("cgroup"),
            b"0::/kubepods.slice/kubepods-pod0a_1.slice/cri-containerd-" + b"a" * 64,
        ],
        "settings": lambda: [b'backend = "scan"\n[[sinks]]\ntype = "file"\n'],
        "filters": lambda: [b"*/b[a-z]n\0/usr/bin", b"a\0b"],
        "lines": lambda: [b"a\x1b[31m\n\xff", b'{"event":"stop"}\n', b"x (deleted)"],
    }
    return found[name]() if name in found else [bytes(64)]
