"""
Text that is safe to show, and command lines that a shell would take.
"""

from __future__ import annotations

import shlex
import subprocess
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procwatch.formats.text import quote, quote_all, safe
from tests.formats.any import text

anything = text | st.text(st.characters(codec="utf-8"), max_size=10)


def harmless(shown: str) -> bool:
    """
    Nothing in it moves the cursor, reorders or hides text, breaks the line, or cannot be encoded.
    """
    return not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in BIDI for c in shown
    )


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(anything)
def test_no_control_character_is_ever_shown(value: str):
    """
    Whatever a process wrote.
    """
    assert harmless(safe(value))
    assert harmless(quote(value))


@pytest.mark.parametrize(
    "mark",
    ["\x1b", "\r", "\x9b", "\x7f", "\u202e", "\u2066", "\u061c", "\u200f", "\u200b", "\ufeff", "\u2028", "\U000e0041"],
)
def test_marks_that_deceive_are_escaped(mark: str):
    """
    Escape sequences, reordering, separators, and what cannot be seen.
    """
    assert mark not in safe(f"a{mark}b")
    assert mark not in quote(f"a{mark}b")


def test_text_of_the_world_stays_as_it_is():
    """
    Letters are no danger.
    """
    assert safe("größe 日本 🦀 שלום") == "größe 日本 🦀 שלום"


@given(st.lists(anything, max_size=4))
def test_what_needs_no_escape_is_a_posix_command_line(arguments: list[str]):
    """
    shlex reads back what was written, where no `$'...'` is needed.
    """
    line = quote_all(arguments)
    if "$'" not in line:
        assert shlex.split(line) == arguments


@given(st.lists(text.filter(bool), min_size=30, max_size=60))
@settings(max_examples=10, deadline=None)
def test_bash_reads_back_every_argument(arguments: list[str]):
    """
    Copied into a shell, a command line gives the very same bytes.
    """
    arguments = [
        *arguments,
        "~",
        "~root/x",
        "{a,b}",
        "*",
        "a b",
        "$HOME",
        "it's",
        '"',
        "!",
        "\\",
        "\\x41",
        "",
        "-n",
        "#c",
    ]
    script = "printf '%s\\0' " + quote_all(arguments)
    shell = subprocess.run(
        ["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8", "HOME": "/elsewhere"}
    )
    assert shell.stdout.split(b"\0")[:-1] == [argument.encode("utf-8", "surrogateescape") for argument in arguments]


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("plain-1.0/x_y=z", "plain-1.0/x_y=z"),
        ("", "''"),
        ("a b", "'a b'"),
        ("it's", '"it\'s"'),
        ("it's $5", "'it'\\''s $5'"),
        ("a\nb", "$'a\\nb'"),
        ("\udcff", "$'\\xff'"),
        ("\\\n", "$'\\\\\\n'"),
    ],
)
def test_quoting_by_example(argument: str, shown: str):
    """
    As plain as it can be.
    """
    assert quote(argument) == shown
