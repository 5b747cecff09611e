"""One caller's rows on their way through a model, and the batch they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Sequence

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

NEVER_US = 1 << 62
"""An expiry that never comes."""


@dataclass(slots=True)
class Answer:
    """What a run gave one request.

    `outputs` are in the signature's order and may be views into a slot: they are valid only while `Request.finish`
    runs, which therefore copies (encodes) what it keeps.
    """

    outputs: Sequence[Array]
    queue_us: int
    compute_us: int
    batch_rows: int


@dataclass(slots=True, eq=False)
class Request:
    """Rows that wait for a run. Made by a servicer, owned by the batcher once submitted; event loop only.

    The reply channel travels inside: the worker calls `finish` with the answer while the slot is still held and puts
    what it returns into `future`.
    """

    inputs: tuple[Array, ...]  # in the signature's order; [rows, *spec.shape[1:]] where batched
    rows: int
    finish: Callable[[Answer], Any]
    future: Future[Any]
    arrived_us: int = 0  # monotonic
    expires_us: int = NEVER_US  # monotonic; the deadline or the queue timeout, whichever is sooner
    priority: int = 0  # higher first

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes without the row axis; requests of equal row shapes can share a batch."""
        return tuple([array.shape[1:] for array in self.inputs])


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that run together, in the order of their rows."""

    requests: list[Request]
    rows: int
    closed_us: int = field(default=0)  # monotonic; when it left the queue
