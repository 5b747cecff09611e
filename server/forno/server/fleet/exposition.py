"""Metrics of several replicas as one Prometheus text: each replica's own, and sums that never fall.

A series `forno_x{model="m"}` of replica 2 becomes `forno_x{model="m",replica="2"}`. What may be added up stands a
second time as `forno_fleet_x{model="m"}`: counters and histograms over all replicas there have been, so that one that
ends takes nothing away (Prometheus would take that for a restart of everything), and gauges of what is counted, such
as waiting requests. Gauges that are levels, such as limits and states, have no sum.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ADDED_GAUGES = frozenset((
    "forno_pending_requests",
    "forno_pending_rows",
    "forno_running_rows",
    "forno_cache_bytes",
    "forno_cache_entries",
))  # fmt: skip
"""Gauges that make sense added up."""

_SAMPLE = re.compile(r"([^{ ]+)(?:\{(.*)\})? (\S+)")
_PREFIX = "forno_"
_SUMS = "forno_fleet_"


@dataclass
class Family:
    """What one exposition says of one name."""

    help: str = ""
    kind: str = "untyped"
    samples: dict[tuple[str, str], str] = field(default_factory=dict)  # (name, labels) -> value

    def adds_up(self, name: str) -> bool:
        """Whether sums over replicas make sense."""
        return name.startswith(_PREFIX) and (self.kind in {"counter", "histogram"} or name in ADDED_GAUGES)


def parse(text: str) -> dict[str, Family]:
    """Families by name, in their order, of a text that `Metrics.prometheus` has written."""
    families: dict[str, Family] = {}
    current = Family()
    for line in text.splitlines():
        if line.startswith("# "):
            _, what, name, rest = [*line.split(" ", 3), ""][:4]
            current = families.setdefault(name, Family())
            if what == "HELP":
                current.help = rest
            elif what == "TYPE":
                current.kind = rest
        elif match := _SAMPLE.fullmatch(line):
            current.samples[match[1], match[2] or ""] = match[3]
    return families


class Sums:
    """What all replicas there have been count together. Owned by the servicer; event loop only."""

    def __init__(self) -> None:
        self._ended: dict[tuple[str, str], float] = {}  # counters of replicas that have ended
        self._seen: dict[str, dict[str, Family]] = {}  # by the name of a process

    def remember(self, process: str, families: dict[str, Family]) -> None:
        """Is told what a process says now."""
        self._seen[process] = families

    def total(self, alive: Iterable[str]) -> dict[tuple[str, str], float]:
        """The sums of what processes have said last.

        Args:
            alive: The processes that have not ended: only their gauges count.

        Returns:
            Values by name and labels of the series.
        """
        for process in self._seen.keys() - set(alive):
            for name, family in self._seen.pop(process).items():
                if family.kind != "gauge" and family.adds_up(name):
                    _add(self._ended, family)
        sums = dict(self._ended)
        for families in self._seen.values():
            for name, family in families.items():
                if family.adds_up(name):
                    _add(sums, family)
        return sums


def render(families: Mapping[int, dict[str, Family]], sums: Mapping[tuple[str, str], float]) -> str:
    """One exposition.

    Args:
        families: What `parse` has found, by the index of the replica.
        sums: Of `Sums.total`.
    """
    merged: dict[str, Family] = {}
    for index, own in families.items():
        for name, family in own.items():
            into = merged.setdefault(name, Family(family.help, family.kind))
            for (series, labels), value in family.samples.items():
                into.samples[series, f'{labels},replica="{index}"' if labels else f'replica="{index}"'] = value
    out: list[str] = []
    for name, family in merged.items():
        out += _lines(name, family)
        if family.adds_up(name):
            keys = {key: None for own in families.values() if name in own for key in own[name].samples}
            total = Family(f"The sum over all replicas. {family.help}", family.kind)
            for key in keys:
                total.samples[_SUMS + key[0].removeprefix(_PREFIX), key[1]] = _number(sums.get(key, 0.0))
            out += _lines(_SUMS + name.removeprefix(_PREFIX), total)
    return "\n".join([*out, ""])


def _add(sums: dict[tuple[str, str], float], family: Family) -> None:
    for key, value in family.samples.items():
        sums[key] = sums.get(key, 0.0) + float(value)


def _lines(name: str, family: Family) -> list[str]:
    lines = [f"# HELP {name} {family.help}"] if family.help else []
    lines.append(f"# TYPE {name} {family.kind}")
    lines += [
        f"{series}{{{labels}}} {value}" if labels else f"{series} {value}"
        for (series, labels), value in family.samples.items()
    ]
    return lines


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
