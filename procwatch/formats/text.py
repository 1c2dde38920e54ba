"""
Make any text safe to show: a process must not be able to write to the reader's terminal or forge a line.
"""

from __future__ import annotations

import re

# C0 and C1 controls, DEL, lone surrogates (bytes that are not UTF-8), line separators, the marks that reorder text, and
# those that cannot be seen.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_PLAIN = re.compile(r"[\w@%+=:,./^-]+", re.ASCII)
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\x1b": r"\e", "\x07": r"\a", "\x08": r"\b"}


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: the byte itself
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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
