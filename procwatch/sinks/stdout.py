"""
Lines to standard output, for an agent whose output somebody else keeps.
"""

from __future__ import annotations

import os
import sys

from procwatch.errors import SinkUnavailable
from procwatch.sinks.base import QueueSink, Record


class StdoutSink(QueueSink):
    """
    Writes lines to standard output. A slow reader fills the queue; then the newest events are dropped.
    """

    name = "stdout"

    def _open(self) -> None:
        try:
            self._fd = os.dup(sys.stdout.fileno())
        except (OSError, ValueError, AttributeError) as error:
            raise SinkUnavailable(self.name, "standard output is closed", "choose another sink") from error

    def _write(self, records: list[Record]) -> int:
        data = memoryview(b"".join(record.data for record in records))
        while data:
            data = data[os.write(self._fd, data) :]
        return len(records)

    def _end(self) -> None:
        os.close(self._fd)
