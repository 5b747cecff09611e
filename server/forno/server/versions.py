"""The order of versions: the newest is the one that a person would call the highest."""

from __future__ import annotations

import re


def natural(version: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which 10 comes after 9, 3 after v9, and 1.0 after 1.0-rc1 and before 1.0.1."""
    keys: list[tuple[int, int, str]] = []
    for part in re.findall(r"\d+|\D+", version):
        if part.isdecimal():
            keys.append((2, int(part), ""))
        else:
            keys.append((-1 if part.startswith("-") else 1, 0, part))
    return (*keys, (0, 0, ""))
