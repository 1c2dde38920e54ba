"""
`python -m fuzz TARGET [options of libFuzzer]`: coverage-guided, with atheris.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["procwatch"]):
    from fuzz.targets import TARGETS, seeds


def main() -> None:
    """
    Run one target until libFuzzer is told to stop; the last argument is the directory of its corpus.
    """
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m fuzz {{{','.join(TARGETS)}}} [-runs=N ...] CORPUS")
    name = sys.argv.pop(1)
    corpus = Path(sys.argv[-1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
