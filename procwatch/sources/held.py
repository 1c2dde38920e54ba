"""
Read a task while the kernel holds its exec: what it is about to execute, with what, where, and for whom.

The task waits inside execve, so its arguments stand in its memory, and /proc/TID/syscall says where. On kernels before
5.7 these files wait for a lock that the exec itself holds (cred_guard_mutex); hold mode does not run there.

Memory is read last. It may be backed by a file system that never answers, or by userfaultfd: then the reader hangs, and
what was read before is all there is.
"""

from __future__ import annotations

import os
import stat as mode
import struct
import time
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from procwatch.errors import DecodeError
from procwatch.facts import EXITED, NOT_REPORTED, PERMISSION, Details, Opened
from procwatch.sources import libc
from procwatch.wire import elf, execve
from procwatch.wire import procfs as decode

MAX_ARGUMENTS = 4096
MAX_ARGV_BYTES = 128 << 10  # as the reader of /proc has it
TASKS = 1024
_PAGE = 4096
_PIECE = 256  # most arguments are shorter
_VECTORS = 1024  # IOV_MAX
_MACHINE = os.uname().machine
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ATTEMPTS = 20
_WANTED = ("file", "argv", "cwd", "cgroup", "ppid", "uid", "gid", "tty", "session")


class State(Struct):
    """
    One exec of a task, while its files are opened one after the other: scripts, the binary, the binary's loader.
    """

    call: bytes  # text of /proc/TID/syscall, the same for all opens of one exec
    pid: int
    details: Details
    interpreter: str | None = None  # that the last script names
    loader: str | None = None  # the binary's, which is opened next


class Held:
    """
    Reads held execs. Remembers the last one of each task, for each exec opens several files.
    """

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._cut: set[int] = set()  # tasks in the middle of an exec whose beginning was not read

    def read(self, opened: Opened, fd: int, tid: int, *, memory: bool = True) -> None:
        """
        Fill `pid` and `held` of an open; `held` stays None for the loader, which adds nothing.

        Args:
            opened: What is known of the file.
            fd: The file.
            tid: The thread that executes.
            memory: Read the arguments too.
        """
        state = self._states.get(tid)
        if state is not None and _is_loader(state, opened, by_name=True):
            opened.pid, state.loader, state.call = state.pid, None, b""
            return
        try:
            directory = os.open(f"/proc/{tid}", _DIRECTORY)
        except OSError:  # killed while it waited
            opened.held = Details(missing=dict.fromkeys(_WANTED, EXITED))
            return
        try:
            text = _call(directory)
            if state is not None and state.call == text and _is_loader(state, opened):
                opened.pid, state.loader, state.call = state.pid, None, b""
                return
            if state is None or state.call != text or not _follows(state, opened):
                state = State(text, tid, Details(missing=dict.fromkeys(_WANTED, NOT_REPORTED)))
                opened.held = state.details
                _read_about(directory, tid, state)
                opened.pid = state.pid
                if memory and tid not in self._cut:
                    _read_arguments(tid, text, state.details)
                self._remember(tid, state)
            opened.pid = state.pid
            if opened.kind == "script":
                _enter_script(state, opened.path, fd)
            state.loader = opened.interpreter if opened.kind == "elf" else None
            if opened.kind != "script":
                self._cut.discard(tid)
            opened.held = _told(state.details, fd)
        finally:
            os.close(directory)

    def successor(self, tid: int) -> Held:
        """
        For another thread to go on with, while this one is left alone with an open by `tid`, perhaps of a script: then
        what the task gave to execve is not what the interpreter gets.
        """
        other = Held()
        other._states = dict(self._states)
        other._states.pop(tid, None)
        other._cut = {*self._cut, tid}
        return other

    def _remember(self, tid: int, state: State) -> None:
        self._states.pop(tid, None)
        if len(self._states) >= TASKS:
            del self._states[next(iter(self._states))]
        self._states[tid] = state


def _call(directory: int) -> bytes:
    """
    The call that the task waits in. It queued the event just before it began to wait, so it may still run.
    """
    text = b""
    for attempt in range(_ATTEMPTS):
        text = _read(directory, b"syscall")
        if text != b"running\n":
            break
        if attempt > _ATTEMPTS // 2:  # it was put aside; sleeping takes 70 µs, reading 5
            time.sleep(0.001)
    return text


def _is_loader(state: State, opened: Opened, *, by_name: bool = False) -> bool:
    """
    Whether it is the loader of the binary before. A name may be a link; then it takes the same registers to be sure.
    """
    if state.loader is None or opened.interpreter is not None or opened.kind != "elf":
        return False
    return not by_name or os.path.basename(state.loader) == os.path.basename(opened.path)


def _follows(state: State, opened: Opened) -> bool:
    """
    Whether an open with the same registers is of the same exec: what the last script named.
    """
    if state.interpreter is None:
        return False
    return opened.kind != "script" or os.path.basename(state.interpreter) == os.path.basename(opened.path)


def _read_about(directory: int, tid: int, state: State) -> None:
    """
    All that /proc says without looking into memory.
    """
    details, missing = state.details, state.details.missing
    try:
        status = decode.status(_read(directory, b"status"))
        state.pid = status.tgid
        details.uid, details.euid, details.gid, details.egid = status.uid, status.euid, status.gid, status.egid
        if len(status.ns_pids) > 1:
            details.ns_pid = status.ns_pids[-1]
        del missing["uid"], missing["gid"]
        stat = decode.stat(_read(directory, b"stat"))
        details.ppid, details.session, details.threads = stat.ppid, stat.session, stat.threads
        details.tty = decode.tty_name(stat.tty_nr)
        if state.pid == tid:
            details.start_ticks = stat.start_ticks  # of a thread it is the thread's own
        del missing["ppid"], missing["session"], missing["tty"]
        details.cgroup = decode.cgroup_path(_read(directory, b"cgroup"))
        del missing["cgroup"]
        cwd = os.readlink(b"cwd", dir_fd=directory)
        details.cwd = decode.text(cwd.removesuffix(decode.DELETED))
        del missing["cwd"]
    except (OSError, DecodeError):
        pass


def _read_arguments(tid: int, text: bytes, details: Details) -> None:
    """
    The path and the arguments as they were given to execve.
    """
    try:
        call = execve.decode(text, _MACHINE)
        if call is None:
            return
        name, *argv = _strings(tid, [call.name, *_pointers(tid, call.argv, call.pointer)])
        if name is not None:
            details.file = _file(decode.text(name), call.directory)
            del details.missing["file"]
    except PermissionError:
        details.missing["argv"] = PERMISSION
    except (OSError, DecodeError):
        pass
    else:
        details.argv_truncated = len(argv) >= MAX_ARGUMENTS or None in argv
        details.argv = [decode.text(argument) for argument in argv if argument is not None]
        del details.missing["argv"]


def _file(name: str, directory: int | None) -> str:
    """
    The name as the kernel makes it up for execveat (bprm->filename, alloc_bprm() in fs/exec.c).
    """
    if directory is None or directory == libc.AT_FDCWD or name.startswith("/"):
        return name
    return f"/dev/fd/{directory}/{name}" if name else f"/dev/fd/{directory}"


def _pointers(tid: int, address: int, size: int) -> list[int]:
    """
    The addresses in an array that ends with a null pointer, page by page.
    """
    found: list[int] = []
    while address and len(found) < MAX_ARGUMENTS:
        length = max((_PAGE - address % _PAGE) // size * size, size)
        data = libc.process_vm_read(tid, [(address, length)])[0]
        data = data[: len(data) // size * size]
        for (pointer,) in struct.iter_unpack("=Q" if size == 8 else "=I", data):
            if not pointer:
                return found
            found.append(pointer)
        if len(data) < length:
            break
        address += length
    return found[:MAX_ARGUMENTS]


def _strings(tid: int, addresses: Sequence[int]) -> list[bytes | None]:
    """
    The strings at these addresses; None for those that would not fit or cannot be read.
    """
    parts = [b""] * len(addresses)
    done: list[bytes | None] = [None] * len(addresses)
    todo, left, piece = list(range(len(addresses))), MAX_ARGV_BYTES, _PIECE
    while todo and left > 0:
        todo, later = todo[:_VECTORS], todo[_VECTORS:]
        ranges = []
        for at in todo:
            address = addresses[at] + len(parts[at])
            ranges.append((address, min(piece, _PAGE - address % _PAGE)))
        again = []
        for at, data in zip(todo, libc.process_vm_read(tid, ranges), strict=True):
            text, end, _ = data.partition(b"\0")
            parts[at] += text
            left -= len(text) + 1
            if end:
                done[at] = parts[at]
            elif data:
                again.append(at)
        if not later:
            piece = _PAGE
        todo = again + later
    return done


def _enter_script(state: State, path: str, fd: int) -> None:
    """
    Do with the arguments what the kernel does on `#!` (load_script() in fs/binfmt_script.c): the interpreter, its one
    argument and the script's name take the place of the first.
    """
    details = state.details
    name = state.interpreter or details.file
    interpreter, argument = elf.script_line(os.pread(fd, elf.SCRIPT_LINE, 0))
    details.script = details.script or path
    state.interpreter = interpreter or ""
    if details.argv is not None and interpreter is not None and name is not None:
        details.argv = [interpreter, *([argument] if argument else []), name, *details.argv[1:]]


def _told(details: Details, fd: int) -> Details:
    """
    A copy for the fact; without the ids that a set-user-id or set-group-id file is about to change.
    """
    copy = replace(details, missing=dict(details.missing))
    bits = os.fstat(fd).st_mode
    if bits & mode.S_ISUID:
        copy.euid = None
    if bits & mode.S_ISGID:
        copy.egid = None
    return copy


def _read(directory: int, name: bytes) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)
