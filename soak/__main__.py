"""
`python -m soak`: a million short processes beside an agent, in steps; each step's cost is compared with the first's.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from procwatch import storms
from procwatch.bench import cpu_ns

# Beyond these the agent is not what it was: growth over the first step, and CPU of the last step by that of the first.
MEMORY_GROWTH = 1.25
COST_GROWTH = 1.5  # what else the machine does is in it
SETTLE_S = 1.0


class Step(NamedTuple):
    """
    What the agent was after so many processes.
    """

    processes: int
    rss_mib: float
    descriptors: int
    cpu_ms_per_1k: float  # in this step
    seconds: float


def main() -> None:
    """
    Exit code 1 when anything grows.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="processes in all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    command = [sys.executable, "-m", "procwatch", "watch", "--backend", options.backend, "--format", "json"]
    with storms.installed() as tiny, subprocess.Popen([*command, "--output", os.devnull]) as agent:
        try:
            steps = run(agent.pid, tiny, options.count, options.steps)
        finally:
            agent.send_signal(signal.SIGTERM)
    sys.exit(verdict(steps))


def run(agent: int, tiny: str, count: int, number: int) -> list[Step]:
    """
    All steps; the first is made of twice as many processes, half of which only warm the caches.
    """
    part = max(count // number, 1)
    print(f"{'processes':>10} {'RSS MiB':>8} {'fds':>5} {'CPU ms/1k':>10} {'seconds':>8}", flush=True)
    parallel(tiny, part)
    steps = []
    for step in range(1, number + 1):
        before, begin = cpu_ns(agent), time.monotonic()
        parallel(tiny, part)
        time.sleep(SETTLE_S)
        cost = (cpu_ns(agent) - before) / part / 1000
        steps.append(Step((step + 1) * part, rss(agent), descriptors(agent), cost, time.monotonic() - begin))
        print("{:>10} {:>8.1f} {:>5} {:>10.2f} {:>8.1f}".format(*steps[-1]), flush=True)
    return steps


def parallel(tiny: str, count: int) -> None:
    """
    A storm on every CPU but one.
    """
    number = max((os.cpu_count() or 1) - 1, 1)
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "procwatch.storms", tiny, "soak"]
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(number)]
    for at, process in enumerate(running):
        assert process.stdin is not None
        process.stdin.write(f"{count // number + (at < count % number)}\n")
        process.stdin.close()
    for process in running:
        with process:
            assert process.stdout is not None
            process.stdout.read()


def rss(pid: int) -> float:
    """
    Resident memory, MiB.
    """
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def descriptors(pid: int) -> int:
    """
    Open files.
    """
    return len(os.listdir(f"/proc/{pid}/fd"))


def verdict(steps: list[Step]) -> int:
    """
    0 when the last step is as the first.
    """
    first, last = steps[0], steps[-1]
    faults = []
    if last.rss_mib > first.rss_mib * MEMORY_GROWTH:
        faults.append("memory grows")
    if last.descriptors > first.descriptors:
        faults.append("descriptors are left open")
    if last.cpu_ms_per_1k > first.cpu_ms_per_1k * COST_GROWTH:
        faults.append("each process costs more than before")
    print("; ".join(faults) or "flat")
    return 1 if faults else 0


if __name__ == "__main__":
    main()
