"""
The two processes of hold mode: the holder reads and allows execs, the watchdog watches the holder.

While a permission event of fanotify waits for its answer, an exec on this host waits. So whatever happens, an answer
must come:

    agent --socket--> holder <--pipe, shared page-- watchdog
                        both have the fanotify group

- The holder is a process of its own, for the agent may hang, be stopped, or be busy: and a Python thread in the agent
  could not answer the agent's own execs, because subprocess keeps the interpreter's lock until its child has executed.
- A decision that takes longer than the deadline, because the memory of the task does not answer, is given up: the main
  thread allows the exec, sends what is known, and lets a new reader go on. Memory is then left alone for ten times as
  long, so that nobody can slow down the host by a tenth.
- The watchdog looks twice a second. If execs wait and the holder has answered none since the last look, it kills the
  holder, and allows all that comes until the holder is dead. It is forked before the first thread is started.
- Either one's death closes its descriptors; a group without descriptors lets all waiting execs go. The holder leaves
  when the agent closes the socket or dies, or the watchdog dies; the watchdog when the holder dies.
- An event whose file cannot be opened for the reader is denied by the kernel. Network filesystems and FUSE may refuse
  root, so they are not held on, only listened to.
- Neither executes anything, and both are in a session of their own, where Ctrl-C and Ctrl-Z do not reach them.

What cannot be met: stopping both at once, as freezing their cgroup does.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from typing import Any, Final

from msgspec.structs import astuple

from procwatch.errors import DecodeError
from procwatch.facts import Details, Fact, Lost, Opened
from procwatch.sources import libc
from procwatch.sources.files import Files
from procwatch.sources.held import Held
from procwatch.sources.marks import Marks
from procwatch.wire import fanotify
from procwatch.wire import procfs as decode

GROUP_FLAGS: Final = libc.FAN_CLASS_CONTENT | libc.FAN_CLOEXEC | libc.FAN_NONBLOCK | libc.FAN_REPORT_TID
EVENT_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_LARGEFILE", 0)
EVENTS: Final = 16  # in one read; they wait for each other
LOOK_S: Final = 0.5
MARK: Final = libc.FAN_MARK_ADD | libc.FAN_MARK_FILESYSTEM
READY: Final = "ready"
FAILED: Final = "failed"
# Threads that hang in a dead task's memory; more of them, and memory is left alone.
HANGING: Final = 16
PRIORITY: Final = -10
# No descriptor of the holder has a higher number: each reader holds at most EVENTS files, and a few for reading.
DESCRIPTORS: Final = 2048


# Not msgspec: it has no strings that are not UTF-8. Not pickle: strangers choose these strings, and it runs programs.
_encode: Final = json.JSONEncoder(separators=(",", ":"), default=astuple).encode


def pack(what: object) -> bytes:
    """
    A message to the agent: a fact, or a pair.
    """
    return _encode((type(what).__name__, what) if isinstance(what, Fact) else what).encode()


def unpack(data: bytes) -> Fact | tuple[str, Any]:
    """
    The same again.

    >>> unpack(pack(Opened(1, 2, path="/bin/\\udcff", held=Details(argv=["a"])))).held.argv, unpack(pack(("ready", [])))
    (['a'], ('ready', []))
    """
    kind, content = json.loads(data)
    if kind == Lost.__name__:
        return Lost(*content)
    if kind != Opened.__name__:
        return kind, content
    opened = Opened(*content)
    held: Any = opened.held
    if held is not None:
        opened.held = Details(*held)
    return opened


class Progress:
    """
    What the holder shows the watchdog: a page of shared memory with a count of answers, and whether it has events.
    """

    def __init__(self) -> None:
        self._page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._page[0] = self._page[1] = 0

    def answered(self) -> None:
        self._page[0] = (self._page[0] + 1) & 0xFFFFFFFF

    def busy(self, busy: bool) -> None:
        self._page[1] = busy

    def look(self) -> tuple[int, bool]:
        return self._page[0], bool(self._page[1])


class Channel:
    """
    The socket to the agent. When the agent does not read, facts are dropped and counted, and nobody waits.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._dropped = 0
        self._since_ns = 0
        connection.setblocking(False)

    def send(self, what: object) -> None:
        if self._dropped:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            if not self._try(Lost(now, 0, "hold_socket", self._dropped, True, self._since_ns, now)):
                self._dropped += 1
                return
            self._dropped = 0
        if not self._try(what):
            self._dropped += 1
            self._since_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def _try(self, what: object) -> bool:
        try:
            self.connection.send(pack(what))
        except OSError:
            return False
        return True


class Reader(threading.Thread):
    """
    Takes events, reads each task, tells the agent, and allows the exec.

    Whoever pops `current` owns the answer: this thread when it is done, or the main thread when the deadline is over.
    """

    def __init__(self, holder: Holder, queue: deque[fanotify.Event]) -> None:
        super().__init__(daemon=True)
        self.holder = holder
        self.queue = queue
        self.current: list[tuple[fanotify.Event, list[Opened]]] = []
        self.since = 0.0
        self.given_up = False

    def run(self) -> None:
        holder = self.holder
        poll = select.poll()
        poll.register(holder.group, select.POLLIN)
        while not self.given_up:
            if not self.queue:
                holder.progress.busy(False)
                poll.poll()
                holder.progress.busy(True)
                self.queue.extend(holder.take())
            while self.queue and not self.given_up:
                self._decide(self.queue.popleft())

    def hangs(self) -> bool:
        """
        Whether it waits in the kernel ("D"), and not just for a processor, of which busy hosts have too few.
        """
        try:
            with open(f"/proc/self/task/{self.native_id}/stat", "rb") as file:
                return decode.stat(file.read()).state == "D"
        except (OSError, DecodeError):
            return False

    def _decide(self, event: fanotify.Event) -> None:
        facts: list[Opened] = []
        self.since = time.monotonic()
        self.current.append((event, facts))
        try:
            self.holder.describe(event, facts)
        except Exception:  # an exec must never wait for our mistake
            self.holder.failed += 1
        try:
            self.current.pop()
        except IndexError:  # given up, and answered, meanwhile: the rest of the queue is another's
            self.given_up = True
            os.close(event.fd)
            return
        self.holder.answer(event, facts)
        os.close(event.fd)


class Holder:
    """
    The main thread: keeps the deadline, watches the agent and the watchdog.
    """

    def __init__(self, group: int, channel: Channel, progress: Progress, watchdog: int, deadline_s: float) -> None:
        self.group = group
        self.channel = channel
        self.progress = progress
        self.failed = 0
        self._hanging: list[Reader] = []
        self._watchdog = watchdog
        self._deadline_s = deadline_s
        self._careful_until = 0.0
        self._files = Files()
        self._held = Held()
        self._reader = Reader(self, deque())
        self._count = 0

    def run(self, only: str) -> None:
        """
        Hold execs until the agent or the watchdog is gone.

        Args:
            only: Of the filesystem of this path; "": of all.
        """
        self._reader.start()  # before the first mark
        marks = None
        if only:
            libc.fanotify_mark(self.group, MARK, fanotify.FAN_OPEN_EXEC_PERM, only)
        else:
            marks = Marks(self.group, fanotify.FAN_OPEN_EXEC_PERM, None, slow_mask=fanotify.FAN_OPEN_EXEC)
            marks.open()
        self.channel.send((READY, marks.limits if marks is not None else []))
        poll = select.poll()
        poll.register(self.channel.connection, select.POLLIN)
        poll.register(self._watchdog, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._deadline_s * 500)}
            if self._watchdog in ready:
                return
            if ready:
                try:
                    message = self.channel.connection.recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not message:
                    return
                if marks is not None:
                    marks.seen(*json.loads(message))
            self._keep_deadline()

    def take(self) -> list[fanotify.Event]:
        """
        Read events. One whose file cannot be opened for us is denied by the kernel, which is why it is not ours to say.
        """
        try:
            events = fanotify.decode(os.read(self.group, EVENTS * fanotify.EVENT_BYTES))
        except (OSError, DecodeError):
            return []
        return [event for event in events if event.fd >= 0]

    def describe(self, event: fanotify.Event, facts: list[Opened]) -> None:
        """
        Add the fact for an event to `facts`, as soon as there is one, and go on filling it. May hang.
        """
        self._count += 1
        if self._count % 64 == 0:
            self._files.next_batch()
        opened = self._files.describe(event.fd, event.pid, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        facts.append(opened)
        if event.mask & fanotify.FAN_OPEN_EXEC_PERM:
            memory = len(self._hanging) < HANGING and time.monotonic() >= self._careful_until
            self._held.read(opened, event.fd, event.pid, memory=memory)
        else:
            opened.pid = process_of(event.pid)

    def answer(self, event: fanotify.Event, facts: list[Opened]) -> None:
        """
        Tell the agent first, so that it knows when netlink tells of the exec; then allow.
        """
        for fact in facts:
            self.channel.send(fact)
        if event.mask & fanotify.FAN_OPEN_EXEC_PERM:
            allow(self.group, event.fd)
        self.progress.answered()

    def _keep_deadline(self) -> None:
        """
        Give up a reader that hangs: answer for it, and let another go on with the rest.
        """
        reader = self._reader
        spent = time.monotonic() - reader.since
        if not reader.current or spent < self._deadline_s:
            return
        try:
            event, facts = reader.current.pop()
        except IndexError:  # done at the last moment
            return
        reader.given_up = True
        if reader.hangs():
            self._careful_until = time.monotonic() + 10 * spent
        self.answer(event, facts)
        self._hanging = [*(other for other in self._hanging if other.is_alive()), reader]
        # The old reader takes no more: its queue belongs to the new one.
        rest = reader.queue
        reader.queue = deque()
        self._held = self._held.successor(event.pid)  # the old reader may be in the middle of this one
        self._files = Files()
        self._reader = Reader(self, rest)
        self._reader.start()


def process_of(tid: int) -> int:
    """
    The process of a thread; of one that is gone it was most likely the only one.
    """
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            return decode.status(file.read()).tgid
    except (OSError, DecodeError):
        return tid


def allow(group: int, fd: int) -> bool:
    """
    Answer one event. False: no event of that descriptor waits.
    """
    try:
        os.write(group, fanotify.allow(fd))
    except OSError:
        return False
    return True


def watch(group: int, holder: int, progress: Progress) -> None:
    """
    The watchdog: until the holder is dead, see that execs are answered.

    Args:
        group: The fanotify group.
        holder: A pidfd.
        progress: What the holder shows.
    """
    dead, waiting = select.poll(), select.poll()
    dead.register(holder, select.POLLIN)
    waiting.register(group, select.POLLIN)
    before, stuck = -1, False
    while not dead.poll(LOOK_S * 1000):
        count, busy = progress.look()
        now = count == before and (busy or bool(waiting.poll(0)))
        if now and stuck:
            break
        before, stuck = count, now
    else:
        return
    signal.pidfd_send_signal(holder, signal.SIGKILL)
    while not dead.poll(0):  # killed, but perhaps stuck in the kernel, with its descriptors open
        for fd in range(DESCRIPTORS):  # what the holder had taken; of its descriptors only the numbers matter
            while allow(group, fd):
                pass
        if waiting.poll(10):
            _allow_all(group)


def _allow_all(group: int) -> None:
    try:
        events = fanotify.decode(os.read(group, 64 * fanotify.EVENT_BYTES))
    except (OSError, DecodeError):
        return
    for event in events:
        if event.fd >= 0:
            allow(group, event.fd)
            os.close(event.fd)


def main(arguments: list[str]) -> None:
    """
    Begin with the socket's descriptor, the deadline in seconds, and the path to hold on, "" for everywhere.
    """
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)  # all who execute wait for it
    except PermissionError:
        pass
    try:
        group = libc.fanotify_init(GROUP_FLAGS | libc.FAN_UNLIMITED_QUEUE | libc.FAN_UNLIMITED_MARKS, EVENT_FLAGS)
        progress = Progress()
        watchdog = start_watchdog(group, channel, progress)
        Holder(group, channel, progress, watchdog, float(arguments[1])).run(arguments[2])
    except OSError as error:
        channel.send((FAILED, error.errno))
    finally:
        os._exit(0)  # not waiting for threads that hang


def start_watchdog(group: int, channel: Channel, progress: Progress) -> int:
    """
    Fork it, while there is one thread only.

    Returns:
        Its pidfd.
    """
    me = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        channel.connection.close()
        try:
            watch(group, me, progress)
        finally:
            os._exit(0)
    os.close(me)
    return os.pidfd_open(child)


if __name__ == "__main__":
    main(sys.argv[1:])
