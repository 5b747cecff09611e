"""The one clock of the server: of arrivals, deadlines and runs. Policy never reads it; it is told the time."""

from __future__ import annotations

import time


def clock_us() -> int:
    """Monotonic microseconds."""
    return time.monotonic_ns() // 1000
