"""
Matching opens with execs: each row of the rule, and what must hold for any opens.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.facts import Opened
from procwatch.table.opens import PENDING, Ran, match

LOADER = "/lib64/ld-linux-x86-64.so.2"
PROGRAMS = {
    "tiny": ("/opt/tiny", "elf", None),
    "true": ("/usr/bin/true", "elf", LOADER),
    "ls": ("/usr/bin/ls", "elf", LOADER),
    "sh": ("/usr/bin/dash", "elf", LOADER),
    "java": ("/usr/bin/java", "elf", LOADER),
    "musl": ("/usr/bin/musl", "elf", "/lib/ld-musl-x86_64.so.1"),
    "ld.so": ("/usr/lib/ld-linux-x86-64.so.2", "elf", None),
    "ld-2.31": ("/usr/lib/ld-2.31.so", "elf", None),
    "libc": ("/usr/lib/libc.so", "elf", None),
    "run.sh": ("/srv/run.sh", "script", "/bin/sh"),
    "a.sh": ("/srv/a.sh", "script", "/srv/b.sh"),
    "b.sh": ("/srv/b.sh", "script", "/bin/sh"),
    "lost.sh": ("/srv/lost.sh", "script", "/nowhere"),
    "c.sh": ("/srv/c.sh", "script", "/srv/lost.sh"),
    "text": ("/srv/text", "other", None),
    "a.jar": ("/srv/a.jar", "other", None),
    "lower": ("/tiny", "elf", None),
    "merged": ("/merged/tiny", "elf", None),
}
NAMES = list(PROGRAMS)
LOADERS = {"ld.so", "ld-2.31", "libc"}


def opened(name: str) -> Opened:
    path, kind, interpreter = PROGRAMS[name]
    stray, over = interpreter == "/nowhere", name == "merged"
    return Opened(1, 7, path, False, False, 8, NAMES.index(name) + 100, 9, kind, interpreter, None, stray, over)


def identity(name: str) -> tuple[int, int]:
    return 8, NAMES.index(name) + 100


def name_of(fact: Opened | None) -> str | None:
    return None if fact is None else next(name for name in NAMES if PROGRAMS[name][0] == fact.path)


def shown(ran: Ran) -> str:
    """
    "tiny", "sh<run.sh" for a script, "?" for unknown, "sh~" for not certain.
    """
    script = f"<{name_of(ran.script)}" if ran.script else ""
    return f"{name_of(ran.exe) or '?'}{script}{'' if ran.certain else '~'}"


def run(text: str, execs: int, final: str | None = None, ended: bool = False) -> tuple[str, str]:
    found = identity(final) if final is not None and final != "memfd" else (1, 5) if final else None
    ran, pending = match([opened(name) for name in text.split()], execs, final=found, ended=ended)
    return " ".join(map(shown, ran)), " ".join(name_of(one) or "" for one in pending)


RULE = [
    # opens, execs, results, pending
    ("tiny", 1, "tiny", ""),
    ("true ld.so", 1, "true", ""),
    ("true ld-2.31", 1, "true", ""),
    ("musl libc", 1, "musl", ""),
    ("run.sh sh ld.so", 1, "sh<run.sh", ""),
    ("a.sh b.sh sh ld.so", 1, "sh<a.sh", ""),
    ("a.jar java ld.so", 1, "java", ""),
    ("ld.so", 1, "ld.so~", ""),
    ("lower merged", 1, "merged", ""),
    ("sh ld.so tiny", 2, "sh tiny", ""),
    ("sh ld.so ls", 2, "sh ls", ""),
    ("sh ld.so ls ld.so", 2, "sh ls", ""),
    ("sh ld.so", 2, "sh~ sh~", ""),
    ("sh ld.so tiny", 3, "sh~ ?~ ?~", ""),
    ("sh ld.so run.sh", 2, "sh sh<run.sh~", ""),
    ("text sh ld.so", 1, "sh", ""),
    ("lost.sh run.sh sh ld.so", 1, "sh<run.sh", ""),
    ("lost.sh tiny", 1, "tiny", ""),
    ("c.sh lost.sh true ld.so", 1, "true", ""),
    ("sh ld.so lost.sh tiny", 2, "sh tiny", ""),
    ("lost.sh", 0, "", ""),
    ("run.sh", 0, "", "run.sh"),
    ("tiny", 0, "", "tiny"),
    ("run.sh", 1, "?<run.sh~", ""),
    ("", 1, "?~", ""),
    ("tiny true ld.so", 1, "tiny~", "true ld.so"),
    ("tiny run.sh", 1, "tiny", "run.sh"),
    ("tiny true ld.so ls", 2, "tiny~ true~", "ls"),
]


class TestRule:
    @pytest.mark.parametrize(("opens", "execs", "results", "pending"), RULE, ids=[f"{row[0]}-{row[1]}" for row in RULE])
    def test_row(self, opens: str, execs: int, results: str, pending: str) -> None:
        """
        Each row of the rule gives what the row says.
        """
        assert run(opens, execs) == (results, pending)


class TestFinal:
    def test_failed_exec_before_is_dropped(self) -> None:
        """
        Of a binary refused (E2BIG) and one that ran, the one that the process is known to run is it.
        """
        assert run("tiny true ld.so", 1, "true") == ("true", "")

    def test_failed_exec_after_is_kept_until_the_process_ends(self) -> None:
        """
        What was opened after the final program may be an exec still to be told, unless the process is dead.
        """
        assert run("sh ld.so tiny", 1, "sh") == ("sh", "tiny")
        assert run("sh ld.so tiny", 1, "sh", ended=True) == ("sh", "")

    def test_swallowed_open_is_found(self) -> None:
        """
        A program executed for the second time has no open of its own and is known by its inode.
        """
        assert run("sh ld.so tiny", 3, "sh") == ("sh~ ?~ sh", "")
        assert run("sh ld.so", 2, "sh") == ("sh~ sh", "")

    def test_loader_executed_directly_is_found(self) -> None:
        """
        `sh -c "exec ld.so …"` opens ld.so only once, as the shell's loader.
        """
        assert run("sh ld.so", 2, "ld.so") == ("sh~ ld.so", "")

    def test_unheard_file_is_unknown(self) -> None:
        """
        A dynamic program in a memfd opens only its loader, and that is not reported as what ran.
        """
        assert run("ld.so", 1, "memfd") == ("?~", "")

    def test_script_with_swallowed_interpreter(self) -> None:
        """
        The script stays known when its interpreter's open was swallowed.
        """
        assert run("sh ld.so ls run.sh", 3, "sh") == ("sh ls sh<run.sh", "")

    def test_overlay_inode_is_enough(self) -> None:
        """
        The kernel's device of an overlay is not stat's, so the inode decides.
        """
        ran, _ = match([opened("tiny")], 1, final=(99, identity("tiny")[1]))

        assert shown(ran[0]) == "tiny"

    def test_dead_process_ran_what_it_opened_last(self) -> None:
        """
        Of a dead process without taskstats nothing is still to be told.
        """
        assert run("tiny true ld.so", 1, ended=True) == ("true~", "")


opens_lists = st.lists(st.sampled_from(NAMES), max_size=50)


class TestProperties:
    @given(opens_lists, st.integers(0, 6), st.none() | st.sampled_from([*NAMES, "memfd"]), st.booleans())
    def test_any_opens(self, names: list[str], execs: int, final: str | None, ended: bool) -> None:
        """
        Whatever comes, there is one result for each exec, of files that were opened, and the rest is bounded.
        """
        facts = [opened(name) for name in names]
        found = identity(final) if final is not None and final != "memfd" else (1, 5) if final else None

        ran, pending = match(facts, execs, final=found, ended=ended)

        assert execs == len(ran)
        assert all(one.exe is None or any(one.exe is fact for fact in facts) for one in ran)
        assert all(one.exe is None or one.exe.kind == "elf" or found is not None for one in ran)
        assert len(pending) <= PENDING
        assert not (ended and pending)

    @given(st.lists(st.sampled_from(["tiny", "true ld.so", "run.sh sh ld.so", "a.sh b.sh sh ld.so", "lower merged"])))
    def test_nothing_swallowed_is_exact(self, programs: list[str]) -> None:
        """
        Where each exec has all its opens, every one is right and certain, and nothing stays.
        """
        expected = {
            "tiny": "tiny", "true ld.so": "true", "run.sh sh ld.so": "sh<run.sh", "a.sh b.sh sh ld.so": "sh<a.sh",
            "lower merged": "merged",
        }  # fmt: skip

        assert run(" ".join(programs), len(programs)) == (" ".join(expected[program] for program in programs), "")
