"""
The process connector, where it must not be believed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from procwatch import SourceUnavailable
from procwatch.sources.proc_connector import ProcConnector
from tests.conftest import need

pytestmark = pytest.mark.usefixtures("no_leaks")
# Others come and go while this one asks.
ASK = """
from procwatch.sources.proc_connector import ProcConnector
error = ProcConnector(buffer_bytes=1 << 20).probe()
print("works" if error is None else error.reason)
"""


def test_the_acknowledgement_of_another_listener_proves_nothing():
    """
    In a pid namespace that gets no events it is unavailable, though acknowledgements and events of others arrive.
    """
    need(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    try:
        listeners = [ProcConnector(buffer_bytes=1 << 20)]
        listeners[0].open()
    except SourceUnavailable as error:
        need(False, str(error))
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", ASK]
    root = Path(__file__).parent.parent.parent
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as asking:
            while asking.poll() is None:
                other = ProcConnector(buffer_bytes=1 << 20)
                other.open()
                other.close()
            assert asking.stdout is not None
            assert "only to the initial pid namespace" in asking.stdout.read()
    finally:
        listeners[0].close()
