"""
Appending to a file so that it never ends in the middle of a record.
"""

from __future__ import annotations

import os


def append(fd: int, size: int, pieces: list[bytes]) -> tuple[int, OSError | None]:
    """
    Append pieces, each wholly or not at all.

    Args:
        fd: Opened with O_APPEND.
        size: Of the file, now.
        pieces: What to append.

    Returns:
        How many were appended, and why not all of them.
    """
    data = b"".join(pieces)
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, memoryview(data)[written:] if written else data)
    except OSError as error:
        done = whole = 0
        for piece in pieces:
            if whole + len(piece) > written:
                break
            whole += len(piece)
            done += 1
        os.ftruncate(fd, size + whole)
        return done, error
    return len(pieces), None
