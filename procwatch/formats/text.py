"""
Make any text safe to show: a process must not be able to write to the reader's terminal or forge a line.
"""

from __future__ import annotations

import re

# C0 and C1 controls, DEL, lone surrogates (bytes that are not UTF-8), line separators, and the marks that reorder text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_PLAIN = re.compile(r"[\w@%+=:,./~^-]+", re.ASCII)
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\x1b": r"\e", "\x07": r"\a", "\x08": r"\b"}


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: the byte itself
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def safe(text: str) -> str:
    """
    `text` with every control character, and every byte that is not UTF-8, as an escape.

    >>> safe("a\\x1b[31mb")
    'a\\\\e[31mb'
    """
    return _UNSAFE.sub(_escape, text)


def quote(argument: str) -> str:
    """
    One argument as a shell would take it: plain, in single quotes, or as $'...' where something must be escaped.

    >>> quote("it's")
    '"it\\'s"'
    """
    if _PLAIN.fullmatch(argument):
        return argument
    if _UNSAFE.search(argument):
        return "$'" + safe(argument.replace("\\", "\\\\").replace("'", "\\'")) + "'"
    if "'" not in argument:
        return f"'{argument}'"
    if not any(mark in argument for mark in '"$`\\!'):
        return f'"{argument}"'
    return "'" + argument.replace("'", "'\\''") + "'"


def quote_all(arguments: list[str]) -> str:
    """
    A command line.
    """
    return " ".join(map(quote, arguments))
