"""
What the agent does to its own process so that it misses less and costs less. Only the programs do this, never the
library: it does not change the process that it is a guest in.
"""

from __future__ import annotations

import gc
import os
import resource

# Below what daemons run at. Where /proc must be read, an agent that waits for its turn finds the process gone.
PROMPT = -10


def before_start() -> None:
    """
    Take as many descriptors as we may have: the scan holds one for each process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass


def after_start(backend: str) -> None:
    """
    Collect garbage seldom: events form no cycles, and what is loaded by now stays. Be prompt where it pays.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    if backend != "ebpf":
        try:
            os.setpriority(os.PRIO_PROCESS, 0, PROMPT)
        except OSError:  # not root, nor CAP_SYS_NICE
            pass
