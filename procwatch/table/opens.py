"""
Which of the files that a process opened to execute is the one that each of its execs ran.

fanotify tells opens without a time and without saying what they were for. To execute one program the kernel opens

    exec := prefix* binary [loader]

where a prefix is a `#!` script, or a file that only binfmt_misc can run, and the loader is the binary's ELF interpreter
(PT_INTERP). So the opens of a process fall into groups, and its execs are matched with the groups in order:

    opens                       execs  result
    tiny                        1      tiny                           a static binary
    true ld.so                  1      true                           the loader is not what runs
    run.sh dash ld.so           1      dash, script run.sh
    a.sh b.sh dash ld.so        1      dash, script a.sh              a script's interpreter may be a script
    a.jar java ld.so            1      java                           binfmt_misc
    ld.so                       1      ld.so                          executed directly: `ld.so /bin/ls`
    /lower/x  /merged/x (over)  1      /merged/x                      overlayfs opens the layer's file first
    sh ld.so tiny               2      sh, then tiny                  sh -c "exec tiny"
    sh ld.so ls                 2      sh, then ls                    ls's ld.so was swallowed by the queue
    sh ld.so                    2      sh, sh (deduced)               so was the whole second sh
    text sh ld.so               1      sh                             ENOEXEC, then the shell: nothing of it stays
    lost.sh tiny                1      tiny                           nor of a script without its interpreter (stray)
    run.sh (nothing else)       0      -                              pending: its exec is not told yet

Three things make the count of groups and of execs differ. A failed exec leaves a group that has no exec (E2BIG,
ETXTBSY; one without a binary is known for what it is). An open may be read before its exec is told: its group is still
to come. And the queue swallows the second open of a file by a process, while the first one lies in it. Then the device
and inode that the process was known to run in the end (from taskstats or /proc) decide; where they are not known, what
is only likely is marked `certain=False`, and what is anybody's guess stays None.

Known to be wrong: after a script whose interpreter does not exist, the next exec of that process counts it as its
script, if the process was gone before we could look for the interpreter from its root directory.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from procwatch.facts import Opened

# Opens of one process that wait for their exec. An exec has 2, a chain of four scripts 6; more is somebody playing.
PENDING = 32

Identity = tuple[int, int]
"""Device and inode."""


class Ran(Struct):
    """
    What one exec ran: the file, the `#!` script that led to it, and whether that is proven or only likely.
    """

    exe: Opened | None = None
    script: Opened | None = None
    certain: bool = True


class Group(Struct):
    """
    The opens of one exec, as far as they are told. `certain` is False where `exe` is deduced.
    """

    opens: list[Opened]
    exe: Opened | None = None
    script: Opened | None = None
    loader: Opened | None = None
    certain: bool = True


def match(
    opens: Sequence[Opened], execs: int, *, final: Identity | None = None, ended: bool = False
) -> tuple[list[Ran], list[Opened]]:
    """
    Match the opens of one process with its execs.

    Args:
        opens: All since the last exec that was matched, in the order they were told.
        execs: How many execs were told since.
        final: Device and inode of what the last of these execs runs, if known.
        ended: The process is dead, so no exec is still to be told.

    Returns:
        One result for each exec, in order; and the opens that wait for the next call.
    """
    if execs == 1 and final is not None and is_usual(opens, final):
        return [Ran(opens[0])], []
    groups = split(opens)
    if not execs:
        return [], [] if ended else _pending(groups)
    known = _find(opens, final) if final is not None else None
    whole = [at for at, group in enumerate(groups) if group.exe is not None]
    if len(whole) < execs:
        whole = _with_swallowed(groups, whole, execs)
    if len(whole) > execs:
        whole = _choose([groups[at].exe is known and known is not None for at in whole], whole, execs, ended)
        for at in whole:
            groups[at].certain = False
    ran = _in_order([groups[at] for at in whole], execs)
    if final is not None:
        _settle(ran[-1], known)
    rest = groups[whole[-1] + 1 :] if whole else groups
    return ran, [] if ended else _pending(rest)


def is_usual(opens: Sequence[Opened], final: Identity) -> bool:
    """
    Whether these are a binary that is known to have run, and at most its loader: nearly all are.
    """
    if not 0 < len(opens) < 3:
        return False
    binary = opens[0]
    return (
        (binary.dev, binary.inode) == final
        and binary.kind == "elf"
        and (len(opens) == 1 or (not opens[1].over and loads(opens[1], binary)))
    )


def split(opens: Sequence[Opened]) -> list[Group]:
    """
    Cut the opens into the groups of one exec each, by what may follow what.
    """
    groups: list[Group] = []
    group = Group([])
    for at, opened in enumerate(opens):
        if at + 1 < len(opens) and opens[at + 1].over:
            continue  # of the layer beneath the overlay
        if not _continues(group, opened):
            groups.append(group)
            group = Group([])
        if opened.stray:
            group = Group([])
            continue
        group.opens.append(opened)
        if opened.kind == "script":
            group.script = group.script or opened
        elif opened.kind == "elf" and group.exe is None:
            group.exe = opened
            group.certain = not _is_loader(opened)  # or a binary on a filesystem that fanotify does not hear of
        elif opened.kind == "elf":
            group.loader = opened
    if group.opens:
        groups.append(group)
    return groups


def _continues(group: Group, opened: Opened) -> bool:
    """
    Whether a file can be opened for the same exec as those before it.
    """
    if not group.opens:
        return True
    if group.exe is not None:
        return group.loader is None and loads(opened, group.exe)
    before = group.opens[-1]
    # The name of a binary says nothing: /bin/sh may be a link to dash. A script is seldom executed through a link.
    named = before.interpreter is None or _base(before.interpreter) == _base(opened.path)
    return opened.kind == "elf" or before.kind != "script" or named


def loads(opened: Opened, binary: Opened) -> bool:
    """
    Whether a file can be the loader that a binary names.

    The name may be a symbolic link in a root directory that is not ours, so it is known by its base name, or by the
    names that the real files have. Any other binary without a loader of its own is one that was executed.
    """
    if binary.interpreter is None or opened.interpreter is not None:
        return False
    return opened.kind == "elf" and (_base(opened.path) == _base(binary.interpreter) or _is_loader(opened))


def _is_loader(opened: Opened) -> bool:
    """
    Whether it has the name of a loader: ld-linux.so.2, ld-2.31.so, ld64.so.2, ld.so; musl's is libc.so.
    """
    return opened.interpreter is None and _base(opened.path).startswith(("ld-", "ld.", "ld64", "libc.", "libc-"))


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _with_swallowed(groups: list[Group], whole: list[int], execs: int) -> list[int]:
    """
    Count scripts without a binary too: its open was swallowed, so it is one of those before.

    Returns:
        The positions of the groups that count.
    """
    if sum(group.exe is not None or group.script is not None for group in groups) > execs:
        return whole
    found: list[int] = []
    before: list[Opened] = []
    for at, group in enumerate(groups):
        if group.exe is None and group.script is not None:
            name = _base(group.opens[-1].interpreter or "")
            named = [exe for exe in before if _base(exe.path) == name] or before
            group.exe = named[-1] if len({(exe.dev, exe.inode) for exe in named}) == 1 else None
            group.certain = False
        if group.exe is not None or group.script is not None:
            found.append(at)
        if group.exe is not None:
            before.append(group.exe)
    return found


def _find(opens: Sequence[Opened], final: Identity) -> Opened | None:
    """
    The last open of a file. Overlays and btrfs show another device in stat(2) than the kernel's, so the inode may do.
    """
    alike = [opened for opened in opens if opened.inode == final[1]]
    return next((opened for opened in reversed(alike) if opened.dev == final[0]), alike[-1] if alike else None)


def _choose(is_final: list[bool], whole: list[int], execs: int, ended: bool) -> list[int]:
    """
    More groups than execs: some failed, or are still to be told.

    Without knowing the final one: of a dead process all execs are told, and it rather ran what it opened last; of a
    living one the last opens are rather still to be told.
    """
    end = len(whole) if ended else execs
    for at, final in enumerate(is_final, 1):
        if final and at >= execs:
            end = at
    return whole[end - execs : end]


def _in_order(groups: list[Group], execs: int) -> list[Ran]:
    """
    One exec to each group. With fewer groups than execs, opens were swallowed by earlier ones of the same file, or were
    not heard at all: the first may be the first exec's; all the others too, if there is only one file to choose from.
    """
    if len(groups) == execs:
        return [Ran(group.exe, group.script, group.certain and group.exe is not None) for group in groups]
    ran = [Ran(certain=False) for _ in range(execs)]
    if groups:
        ran[0] = Ran(groups[0].exe, groups[0].script, False)
    if len({(group.exe.dev, group.exe.inode) for group in groups if group.exe is not None}) == 1:
        for other in ran:
            other.exe = groups[0].exe
    return ran


def _settle(ran: Ran, known: Opened | None) -> None:
    """
    The last exec's file is known: it was opened, or else fanotify does not hear of it, as of a memfd.
    """
    if ran.exe is not known:
        ran.script = None if ran.certain or known is None else ran.script
        ran.exe = known
    ran.certain = known is not None


def _pending(groups: list[Group]) -> list[Opened]:
    return [opened for group in groups for opened in group.opens][-PENDING:]
