"""A request of more rows than one run takes, as several that run one after another and are answered as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import DeadlineExceeded, Overloaded
from forno.server.request import Answer, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Array = np.ndarray[Any, np.dtype[Any]]
    Count = Callable[[str, int], None]

_OUTCOMES: dict[type[BaseException], str] = {DeadlineExceeded: "expired", Overloaded: "overloaded"}


@dataclass(slots=True, eq=False)
class _Times:
    """Of the parts so far."""

    queue_us: int = 0
    compute_us: int = 0
    batch_rows: int = 0


class Whole:
    """Joins the answers of the parts of a request. Made by `parts_of`, kept by the parts; event loop only.

    It is the future of each part as far as batcher and worker need one. So a part is done as soon as the request is:
    a cancelled caller, or the error of one part, ends those that wait still.
    """

    def __init__(self, request: Request, count: Count) -> None:
        self._request = request
        self._count: Count | None = count  # None once it has been told
        self._left = request.rows
        self._outputs: list[Array] = []
        self._times = _Times()
        self._given_up = False

    def done(self) -> bool:
        """Whether nobody waits any more."""
        if not self._given_up and self._request.future.done():
            self._end("cancelled")
        return self._given_up or self._request.future.done()

    def give_up(self) -> None:
        """Ends the parts without an answer: the request was refused, and counted where that was done."""
        self._given_up, self._count = True, None

    def set_result(self, result: object) -> None:
        """Does nothing: the answer went with `take`."""

    def set_exception(self, error: BaseException) -> None:
        """Fails the request, if another part has not."""
        if not self.done():
            self._end(_OUTCOMES.get(type(error), "failed"))
            self._request.future.set_exception(error)

    def take(self, start: int, rows: int, answer: Answer) -> None:
        """Keeps the outputs of the part that begins with row `start`; the last one to come ends the request.

        Raises:
            ValueError: The outputs do not have the rows of the part, or another shape than those of other parts.
        """
        request, times = self._request, self._times
        if not self._outputs:
            self._outputs = [_room(output, request.rows) for output in answer.outputs]
        for whole, output in zip(self._outputs, answer.outputs, strict=True):
            if output.shape != (rows, *whole.shape[1:]):
                raise ValueError(
                    f"an output has shape {list(output.shape)} for {rows} of {request.rows} rows, expected "
                    f"{[rows, *whole.shape[1:]]}"
                )
            whole[start : start + rows] = output
        if start == 0:
            times.queue_us = answer.queue_us
        times.compute_us += answer.compute_us
        times.batch_rows = max(times.batch_rows, answer.batch_rows)
        self._left -= rows
        if self._left == 0:
            joined = Answer(self._outputs, times.queue_us, times.compute_us, times.batch_rows)
            result = request.finish(joined)
            if not self.done():
                self._end("ok")
                request.future.set_result(result)

    def _end(self, outcome: str) -> None:
        count, self._count = self._count, None
        if count is not None:
            count(outcome, self._times.queue_us)


def parts_of(request: Request, max_rows: int, count: Count) -> tuple[Whole, Sequence[Request]]:
    """What joins the parts, and the parts: of at most `max_rows` rows each, their answers together the request's.

    Args:
        request: The request.
        max_rows: Most rows of a part.
        count: Told once how it ended, as metrics call it, and how long its first part waited.
    """
    whole = Whole(request, count)
    parts = []
    for start in range(0, request.rows, max_rows):
        rows = min(max_rows, request.rows - start)
        parts.append(
            Request(
                tuple([array[start : start + rows] for array in request.inputs]),
                rows,
                partial(whole.take, start, rows),
                whole,  # type: ignore[arg-type]
                request.arrived_us,
                request.expires_us,
                request.priority,
                deadline_us=request.deadline_us,
                shape_key=request.shape_key,
                is_part=True,
            )
        )
    return whole, parts


def _room(output: Array, rows: int) -> Array:
    if output.ndim == 0:
        raise ValueError(f"an output has no dimension that counts rows, expected {rows}")
    return np.empty((rows, *output.shape[1:]), output.dtype)
