"""
Read processes from /proc, proc(5).

- One descriptor of the directory /proc/PID pins the process: a pid that is used again can never mix into the answer.
- What an exit destroys first is read first: exe, arguments and cwd go with the memory, stat stays until the parent
  waits. If exe is not the same at the end of the look, the process executed something meanwhile, and the look begins
  anew; so exe and argv are of one program. (Two execs of one file within a look of 30 µs would go unnoticed.)
- exe, cwd and auxv ask one question of the kernel, ptrace_may_access(PTRACE_MODE_READ): where exe is refused the
  others are not tried. /proc/PID/mem asks for more (PTRACE_MODE_ATTACH), and Yama may refuse that alone.
- `file`, `argv` and `comm` are memory that the process can write. Nothing is opened on their word but regular files,
  and these only to look for "#!".
- A pid that is hidden from us (mount option hidepid) says "permission", one that is not there "exited", where no
  descriptor or no memory is left "pressure"; a read that fails otherwise "not_reported".
"""

from __future__ import annotations

import errno
import os
import stat as mode
import time

from procwatch.errors import DecodeError, SourceUnavailable
from procwatch.facts import EXITED, KERNEL_THREAD, NOT_REPORTED, PERMISSION, PRESSURE, Alive, Details
from procwatch.wire import procfs as decode

MAX_CMDLINE = 128 << 10
_PAGE = 4096
_PATH_MAX = 4096
_MAX_TEXT = 4 << 20  # status lists up to 65,536 groups
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_PROGRAM = ("exe", "exe_deleted", "file", "argv", "cwd")
_FROM_STAT = ("ppid", "comm", "tty", "session")
_FROM_STATUS = ("uid", "gid", "euid", "egid")
# What may stand in `missing`. What is only known together with one of these (exe_inode with exe, start_ticks and
# threads with ppid, ns_pid with uid) has no entry of its own.
FIELDS = (*_PROGRAM, *_FROM_STAT, *_FROM_STATUS, "cgroup")
_ATTEMPTS = 3
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# A kernel built with CONFIG_AUDIT.
AUDITED = os.path.exists("/proc/self/loginuid")
UNSET = 0xFFFFFFFF


def read(pid: int, *, with_file: bool = True) -> Details:
    """
    What /proc says of a process; each field that could not be read has its reason in `missing`.

    Args:
        pid: A process; the number of a thread would give that thread's view of its process.
        with_file: Also read the name as given to execve, and find out whether it was a script (costs 8 µs more).
    """
    return look(pid, with_file=with_file)[0]


def look(pid: int, *, with_file: bool = True) -> tuple[Details, decode.Stat | None]:
    """
    `read()`, and the decoded stat for who wants to know more of its state; None when it could not be read.
    """
    try:
        directory = os.open(f"/proc/{pid}", _DIRECTORY)
    except OSError as error:
        return Details(missing=dict.fromkeys(FIELDS, _absent(pid, error))), None
    try:
        details, state = _details(directory, with_file)
    finally:
        os.close(directory)
    if state is None and details.exe is None and details.argv is None and _exists(pid):
        details = Details(missing=dict.fromkeys(FIELDS, PERMISSION))
    return details, state


def stat(pid: int) -> decode.Stat | None:
    """
    Only /proc/PID/stat, or None when it is gone or hidden; also of a thread.
    """
    data = _text(None, f"/proc/{pid}/stat")
    return _stat(data) if isinstance(data, bytes) else None


def audit_session(pid: int) -> int | None:
    """
    The number of the login that a process comes from, or None: sessionid in proc(5).
    """
    return _number(_text(None, f"/proc/{pid}/sessionid"))


def mount_namespace(pid: int) -> int:
    """
    The inode number of a process's mount namespace, or 0 where it cannot be read.
    """
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return 0


def exit_status(pid: int, start_ticks: int) -> int | None:
    """
    As wait(2) will give it to the parent of a zombie; None unless it is one, and one that we may trace.
    """
    state = stat(pid)
    if state is None or not state.ended or state.start_ticks != start_ticks:
        return None
    try:
        os.readlink(f"/proc/{pid}/exe")
    except FileNotFoundError:  # allowed to look, and there is none: then the exit code was not withheld either
        return state.exit_code
    except OSError:
        pass
    return None


def pids() -> list[int]:
    """
    The processes that /proc lists, ascending.
    """
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def snapshot(exclude: tuple[int, ...] = ()) -> list[Alive]:
    """
    All processes that live now, without those that have ended and wait for their parent.

    Args:
        exclude: Pids to leave out.

    Raises:
        SourceUnavailable: There is no descriptor left to look with; so nobody is taken for dead.
    """
    found = []
    try:
        listed = pids()
    except OSError as error:
        raise _blind(error.strerror) from error
    for pid in listed:
        if pid in exclude:
            continue
        time_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        details, state = look(pid)
        if state is not None and not state.ended:
            found.append(Alive(time_ns, pid, details))
        elif details.missing.get("ppid") == PRESSURE:
            raise _blind(os.strerror(errno.EMFILE))
    return found


def _blind(reason: str | None) -> SourceUnavailable:
    return SourceUnavailable("/proc", f"cannot be read ({reason})", "raise the limit of open files (ulimit -n)")


def hidden() -> bool:
    """
    Whether /proc keeps processes of other users from us (mount option hidepid).
    """
    if isinstance(_text(None, "/proc/1/stat"), str):
        return True
    # Pid 1 of a container may be our own, and says nothing of the others then.
    mounts = _text(None, "/proc/self/mountinfo")
    if isinstance(mounts, str) or os.geteuid() == 0 or os.stat("/proc/1").st_uid != os.geteuid():
        return False
    options = [line.rpartition(b" ")[2] for line in mounts.split(b"\n") if b" /proc " in line]
    return any(b"hidepid=" in option and b"hidepid=off" not in option for option in options)


def boot_id() -> str:
    """
    A random UUID of this boot, random(4).
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def last_pid(loadavg: int) -> int:
    """
    The pid that was given out last.

    Args:
        loadavg: Descriptor of /proc/loadavg, kept open.
    """
    return decode.last_pid(os.pread(loadavg, 256, 0))


def born() -> int:
    """
    How many tasks were born on this machine since boot, threads among them.
    """
    data = _text(None, "/proc/stat")
    if isinstance(data, str):
        raise DecodeError(f"/proc/stat: {data}")
    return decode.born(data)


def _details(directory: int, with_file: bool) -> tuple[Details, decode.Stat | None]:
    details, state = _one_look(directory, with_file)
    for _ in range(_ATTEMPTS - 1):
        if (details.exe is None or _same_exe(details, directory)) and details.argv != []:
            break
        details, state = _one_look(directory, with_file)
    if details.argv == [] and "file" in details.missing:
        # In the middle of an exec: the memory is the new program's, and its arguments are not written yet.
        details.argv = None
        details.missing["argv"] = details.missing["file"]
    if state is not None and state.state == "Z" and state.threads > 1:
        details = _of_other_thread(directory, with_file, details)
    return details, state


def _one_look(directory: int, with_file: bool) -> tuple[Details, decode.Stat | None]:
    details = Details()
    exe = _link(directory, b"exe")
    cmdline = _text(directory, b"cmdline", MAX_CMDLINE + 1)
    cwd = _link(directory, b"cwd") if exe != PERMISSION else PERMISSION
    cgroup = _text(directory, b"cgroup")
    text = _text(directory, b"stat")
    state = _stat(text) if isinstance(text, bytes) else None
    gone = state is None or state.ending
    _take_stat(details, state, text)
    _take_status(details, _text(directory, b"status"))
    _take_cgroup(details, cgroup, gone)
    if state is not None and state.kernel_thread:
        details.missing.update(dict.fromkeys(_PROGRAM, KERNEL_THREAD))
        return details, state
    _take_exe(details, exe, directory)
    _take_argv(details, cmdline, gone)
    _take_cwd(details, cwd, directory)
    if with_file:
        _take_file(details, directory)
        if AUDITED:
            _take_login(details, directory)
    return details, state


def _same_exe(details: Details, directory: int) -> bool:
    """
    Whether exe is still what it was when the look began; a process that has ended meanwhile cannot have changed it.
    """
    link = _link(directory, b"exe")
    if isinstance(link, str):
        return True
    path = decode.text(link.removeprefix(b"(unreachable)"))
    return path in (details.exe, f"{details.exe} (deleted)")


def _of_other_thread(directory: int, with_file: bool, leader: Details) -> Details:
    """
    The details of a process whose leader has left: that one has no memory any more, the other threads still do.
    """
    try:
        tasks = os.open(b"task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return leader
    try:
        thread = os.open(max(os.listdir(tasks), key=int), _DIRECTORY, dir_fd=tasks)
    except (OSError, ValueError):
        return leader
    finally:
        os.close(tasks)
    try:
        details = _one_look(thread, with_file)[0]
    finally:
        os.close(thread)
    details.start_ticks, details.comm = leader.start_ticks, leader.comm
    return details


def _take_stat(details: Details, state: decode.Stat | None, text: bytes | str) -> None:
    if state is None:
        details.missing.update(dict.fromkeys(_FROM_STAT, _reason(text)))
        return
    details.ppid = state.ppid
    details.comm = state.comm
    details.start_ticks = state.start_ticks
    details.session = state.session
    details.threads = state.threads
    details.tty = decode.tty_name(state.tty_nr)


def _take_status(details: Details, text: bytes | str) -> None:
    try:
        status = decode.status(text) if isinstance(text, bytes) else None
    except DecodeError:
        status = None
    if status is None:
        details.missing.update(dict.fromkeys(_FROM_STATUS, _reason(text)))
        return
    details.uid, details.euid = status.uid, status.euid
    details.gid, details.egid = status.gid, status.egid
    if len(status.ns_pids) > 1:
        details.ns_pid = status.ns_pids[-1]


def _take_login(details: Details, directory: int) -> None:
    """
    Who logged in, whatever user it is by now: loginuid and sessionid in proc(5). Unset is -1.
    """
    details.auid = _number(_text(directory, b"loginuid"))
    if details.auid is not None:
        details.audit_session = _number(_text(directory, b"sessionid"))


def _number(text: bytes | str) -> int | None:
    return int(text) if isinstance(text, bytes) and text.isdigit() and int(text) != UNSET else None


def _take_cgroup(details: Details, text: bytes | str, gone: bool) -> None:
    try:
        path = decode.cgroup_path(text) if isinstance(text, bytes) else None
    except DecodeError:
        path = None
    if path is None:
        details.missing["cgroup"] = _reason(text)
    elif path == "/" and gone:  # an exit moves the task to the root of each v1 hierarchy
        details.missing["cgroup"] = EXITED
    else:
        details.cgroup = path


def _take_exe(details: Details, link: bytes | str, directory: int) -> None:
    path = _path(details, "exe", link)
    if path is None:
        details.missing["exe_deleted"] = details.missing["exe"]
        return
    try:
        info = os.stat(b"exe", dir_fd=directory)
    except OSError:  # gone since, or a file system that refuses even root (FUSE): the link is all there is
        info = None
    name, deleted = _split_deleted(path, info, directory)
    details.exe = decode.text(name)
    details.exe_deleted = deleted
    # An anonymous file never has a link, so that the kernel always calls it deleted.
    details.exe_memfd = deleted and name.startswith(b"/memfd:")
    if info is not None:
        details.exe_dev, details.exe_inode, details.exe_size = info.st_dev, info.st_ino, info.st_size
    elif deleted:
        details.inferred = (*details.inferred, "exe_deleted")


def _take_argv(details: Details, cmdline: bytes | str, gone: bool) -> None:
    if isinstance(cmdline, str) or (not cmdline and (gone or details.missing.get("exe") == EXITED)):
        details.missing["argv"] = _reason(cmdline) if isinstance(cmdline, str) else EXITED
        return
    if len(cmdline) > MAX_CMDLINE:
        cmdline = cmdline[:MAX_CMDLINE]
        details.argv_truncated = True
    details.argv = decode.argv(cmdline)


def _take_cwd(details: Details, link: bytes | str, directory: int) -> None:
    path = _path(details, "cwd", link)
    if path is not None:
        if path.endswith(decode.DELETED):
            try:
                info = os.stat(b"cwd", dir_fd=directory)
            except OSError:
                info = None
            path = _split_deleted(path, info, directory)[0]
        details.cwd = decode.text(path)


def _take_file(details: Details, directory: int) -> None:
    """
    The name as given to execve, from the stack of the process; and the script, if it names one.
    """
    why = details.missing.get("exe")
    name = why if why is not None else _execfn(directory)
    if isinstance(name, str):
        details.missing["file"] = name
        return
    details.file = decode.text(name)
    # binfmt_script leaves the name in comm and puts it behind the interpreter (and its one argument) into argv; two
    # more places for an interpreter that is a script itself.
    base = decode.text(name.rpartition(b"/")[2][:15])
    if details.comm == base and details.argv is not None and details.file in details.argv[1:4]:
        details.script = _script(directory, name, details.cwd)


def _execfn(directory: int) -> bytes | str:
    """
    The string that AT_EXECFN points to, or why not.
    """
    data = _text(directory, b"auxv")
    if isinstance(data, str):
        return data
    try:
        address = decode.auxv(data).get(decode.AT_EXECFN)
    except DecodeError:
        return NOT_REPORTED
    if address is None:
        return NOT_REPORTED if data else EXITED
    try:
        memory = os.open(b"mem", _READ, dir_fd=directory)
    except OSError as error:
        return _why(error)
    try:
        name, end, _ = os.pread(memory, _PATH_MAX, address).partition(b"\0")
        return name if end else NOT_REPORTED
    except OverflowError:  # no address of user space: somebody wrote over the vector
        return NOT_REPORTED
    except OSError as error:
        return _why(error)
    finally:
        os.close(memory)


def _script(directory: int, name: bytes, cwd: str | None) -> str | None:
    """
    The absolute path of the `#!` file `name`, as exe would say it, or None if it is none.
    """
    if not name.startswith(b"/"):
        if cwd is None:
            return None
        name = cwd.encode("utf-8", "surrogateescape") + b"/" + name
    try:
        # O_PATH first: the name is the process's word, and opening a device or a FIFO would do things to it.
        place = os.open(b"root" + name, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
    except (OSError, ValueError):
        return None
    try:
        if not mode.S_ISREG(os.fstat(place).st_mode):
            return None
        file = os.open(f"/proc/self/fd/{place}", _READ)
        try:
            if os.pread(file, 2, 0) != b"#!":
                return None
        finally:
            os.close(file)
        path = os.readlink(b"/proc/self/fd/%d" % place)
        return decode.text(path) if path.startswith(b"/") else None
    except OSError:
        return None
    finally:
        os.close(place)


def _path(details: Details, field: str, link: bytes | str) -> bytes | None:
    """
    An absolute path from a link of /proc, or None with a reason.

    A file outside the root directory of the reader may come with "(unreachable)" before its path within its mount.
    """
    if isinstance(link, bytes):
        if link.startswith(b"/"):
            return link
        if link.startswith(b"(unreachable)/"):
            details.inferred = (*details.inferred, field)
            return link.removeprefix(b"(unreachable)")
        link = NOT_REPORTED
    details.missing[field] = link
    return None


def _split_deleted(path: bytes, info: os.stat_result | None, directory: int) -> tuple[bytes, bool]:
    """
    Path without " (deleted)", and whether it is.

    The kernel appends that to the path of a file that was removed; a file may also be called so.
    """
    if not path.endswith(decode.DELETED):
        return path, info is not None and info.st_nlink == 0
    if info is not None and info.st_nlink > 0:  # called so, or removed while another hard link is left
        try:
            named = os.stat(b"root" + path, dir_fd=directory)
            if (named.st_dev, named.st_ino) == (info.st_dev, info.st_ino):
                return path, False
        except OSError:
            pass
    return path.removesuffix(decode.DELETED), True


def _stat(data: bytes) -> decode.Stat | None:
    try:
        return decode.stat(data)
    except DecodeError:
        return None


def _link(directory: int, name: bytes) -> bytes | str:
    """
    Where a link of /proc points to, or why that is not known.
    """
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        return _why(error)


def _text(directory: int | None, name: bytes | str, limit: int = _MAX_TEXT) -> bytes | str:
    """
    A file of /proc, at most `limit` bytes of it, or why it cannot be read.
    """
    try:
        file = os.open(name, _READ, dir_fd=directory)
    except OSError as error:
        return _why(error)
    try:
        data = os.read(file, _PAGE)
        if len(data) == _PAGE:
            while len(data) < limit and (more := os.read(file, min(limit - len(data), 1 << 17))):
                data += more
        return data
    except OSError as error:
        return _why(error)
    finally:
        os.close(file)


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return EXITED
    if error.errno in (errno.EACCES, errno.EPERM):
        return PERMISSION
    return PRESSURE if error.errno in _NO_ROOM else NOT_REPORTED


def _reason(text: bytes | str) -> str:
    """
    Why a text gave nothing: it was not there, or it was not understood.
    """
    return text if isinstance(text, str) else NOT_REPORTED


def _absent(pid: int, error: OSError) -> str:
    """
    Why there is no /proc/PID.
    """
    return PERMISSION if error.errno == errno.ENOENT and _exists(pid) else _why(error)


def _exists(pid: int) -> bool:
    """
    Whether there is such a process: with hidepid one of another user looks in /proc like one that is gone.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
