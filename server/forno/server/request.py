"""One caller's rows on their way through a model, and the batch they share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    RowShapes = tuple[tuple[int, ...], ...]


NEVER_US = 1 << 62
"""An expiry that never comes."""


def waits_until_us(deadline_us: int, timeout_us: int, now_us: int) -> int:
    """When a request has waited in the queue for long enough.

    Args:
        deadline_us: When its answer is of no use.
        timeout_us: Its queue timeout; 0 without one.
        now_us: Now.
    """
    return min(deadline_us, now_us + timeout_us) if timeout_us else deadline_us


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
    urgent_us: int = 0  # monotonic; set by the batcher: requests of one priority run in this order
    deadline_us: int = 0  # monotonic; when the answer is of no use, where that is not `expires_us`
    shape_key: RowShapes | None = None  # requests of equal keys can share a run; None = of equal row shapes
    is_part: bool = False  # of a caller's request, which is counted apart, once

    @property
    def answer_by_us(self) -> int:
        """When the answer is of no use. A queue timeout ends the wait alone, and says nothing of that."""
        return self.deadline_us or self.expires_us

    @property
    def row_shapes(self) -> RowShapes:
        """Shapes without the row axis."""
        return tuple([array.shape[1:] for array in self.inputs])


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that run together, in the order of their rows."""

    requests: list[Request]
    rows: int
    closed_us: int = 0  # monotonic; when it left the queue
    tuner: Any = None  # the batcher's own: what learns from the run
    limit: int = 0  # rows that it could have had; a single larger request goes alone

    def split(self, outputs: Sequence[Array]) -> Iterable[Sequence[Array]]:
        """The outputs of each request: views of its rows.

        Raises:
            ValueError: An output has not one row for each row of the inputs.
        """
        requests, rows = self.requests, self.rows
        if len(requests) == 1:
            return (outputs,)
        for output in outputs:
            if output.ndim == 0 or output.shape[0] != rows:
                raise ValueError(f"an output has shape {list(output.shape)} for {rows} rows")
        if rows == len(requests):
            return zip(*[output.reshape(rows, 1, *output.shape[1:]) for output in outputs], strict=True)
        ends = list(accumulate([request.rows for request in requests]))
        starts = [0, *ends[:-1]]
        return [[output[start:end] for output in outputs] for start, end in zip(starts, ends, strict=True)]


def callers(requests: list[Request]) -> int:
    """How many of them count in metrics: a request that runs in parts is counted by who joins them."""
    return sum([not request.is_part for request in requests])
