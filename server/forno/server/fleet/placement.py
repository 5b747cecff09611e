"""Which cores and which GPU a replica gets. Pure policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.config import FleetSettings

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one replica runs."""

    cpus: tuple[int, ...]  # cores that it may run on
    threads: int  # that its libraries should use
    gpus: str | None  # CUDA_VISIBLE_DEVICES, or None = as it is

    def environment(self) -> dict[str, str]:
        """What a replica gets besides the environment of the supervisor."""
        variables = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        return variables if self.gpus is None else {**variables, "CUDA_VISIBLE_DEVICES": self.gpus}


def place(index: int, count: int, cpus: Sequence[int], settings: FleetSettings) -> Placement:
    """The place of one replica of several.

    With at least as many cores as replicas, each gets cores of its own, neighbours by number, which mostly share
    caches; those left over go to the first. With fewer, each may use all, with one thread: the kernel spreads them
    better than a fixed plan that gives one core to two of three.

    Args:
        index: Its number, from 0.
        count: How many replicas there are; at least index + 1.
        cpus: The cores there are, ascending.
        settings: Of the fleet.
    """
    gpus = settings.gpus[index % len(settings.gpus)] if settings.gpus else None
    if not settings.pin_cpus or len(cpus) < count:
        return Placement(tuple(cpus), max(1, len(cpus) // count), gpus)
    share, left_over = divmod(len(cpus), count)
    first = index * share + min(index, left_over)
    own = tuple(cpus[first : first + share + (index < left_over)])
    return Placement(own, len(own), gpus)
