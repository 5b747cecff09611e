"""Buffers in which the rows of a batch come together before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forno.server.slots.cuda import Ring

    Array = np.ndarray[Any, np.dtype[Any]]


class Slot(Protocol):
    """One set of preallocated buffers. Made by an Engine, owned by a Worker; used by one thread at a time.

    It is held from `load` until the answers of that batch are encoded, because outputs may be views into it.
    """

    inputs: Sequence[Array]  # what the engine reads, in the signature's order; valid from `load` to `release`
    elements: int  # that `load` prepared to run, where the signature has padding; otherwise 0
    padded_elements: int  # of those, the ones that no request has

    def load(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Brings the inputs of each request to their places: the one host copy. Row shapes are equal, or padded."""

    def release(self) -> None:
        """Lets go of everything that belongs to the requests."""


def rings_of(engine: object) -> tuple[Ring, ...]:
    """Those that carry an engine's slots: one for each GPU, none on the CPU."""
    rings = getattr(engine, "rings", None)
    if rings is None:
        ring = getattr(engine, "ring", None)
        rings = () if ring is None else (ring,)
    return tuple(rings)
