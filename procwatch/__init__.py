"""
procwatch: every process that runs on a Linux host.
"""

from __future__ import annotations

__version__ = "0.1.0"
