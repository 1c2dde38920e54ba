"""
Every error that procwatch raises on purpose.

    ProcwatchError                 one line, says what to do
    ├── ConfigError                you asked for something impossible: an option, a size, a file name
    ├── SourceUnavailable          a kernel mechanism cannot be used here: `reason` and `remedy`
    ├── SinkUnavailable            a sink cannot begin: a directory that cannot be written, a socket that is in use
    ├── SourceLost                 a source that worked has died and could not be reopened
    ├── DecodeError                bytes from the kernel that are not what its headers promise
    └── InternalError              our bug: please report it
"""

from __future__ import annotations


class ProcwatchError(Exception):
    """
    Base of all errors here; `str()` is one line for a user.
    """


class ConfigError(ProcwatchError):
    """
    An option or a setting that cannot be: the message shows the value and what is allowed.
    """


class SourceUnavailable(ProcwatchError):
    """
    A source cannot work here.

    Args:
        name: The source: "netlink", "fanotify", "taskstats", "ebpf", "scan" ...
        reason: Why not, in a few words, without a full stop.
        remedy: What would make it work, or "" where nothing would.
    """

    def __init__(self, name: str, reason: str, remedy: str = "") -> None:
        self.name = name
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{name}: {reason}" + (f": {remedy}" if remedy else ""))


class SinkUnavailable(ProcwatchError):
    """
    A sink cannot begin here; one whose other end is only away for now begins, and waits for it.

    Args:
        name: The sink: "file", "journald", "nats" ...
        reason: Why not, in a few words, without a full stop.
        remedy: What would make it work, or "" where nothing would.
    """

    def __init__(self, name: str, reason: str, remedy: str = "") -> None:
        self.name = name
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{name}: {reason}" + (f": {remedy}" if remedy else ""))


class SourceLost(ProcwatchError):
    """
    A source that was open has failed for good.
    """


class DecodeError(ProcwatchError):
    """
    Bytes that do not have the layout which the kernel's headers give.
    """


class InternalError(ProcwatchError):
    """
    Something that cannot happen did: please file a bug.
    """
