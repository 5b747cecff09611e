"""The name someone probably meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, or None where none is close enough to be meant.

    Close enough is one wrong letter, and one more for every three letters of the word. Case and the
    difference between `-` and `_` cost nothing.
    """
    plain = _plain(word)
    best, least = None, 2 + len(word) // 3
    for name in known:
        distance = _distance(plain, _plain(name)) if abs(len(name) - len(word)) < least else least
        if distance < least:
            best, least = name, distance
    return best


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names as a sentence has them: "a, b and c"."""
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _distance(left: str, right: str) -> int:
    """Letters to add, drop, replace or swap with a neighbour to make one word of the other."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row, above = row, [i], before
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
