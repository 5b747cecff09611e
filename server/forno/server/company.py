"""Whether callers who were just answered ask again at once, and are worth a short wait.

A fixed number of callers that each wait for their answer fall out of step with a batcher that never waits: one of
eight is alone when the engine is free, so it runs alone, then the other seven together, and so on for ever; where a run
costs nearly the same with one row and with eight, that is half of what could be had. So the rows that follow a run
within a moment are counted. Where most of those that were answered come back so soon, a free engine gives them that
moment. Calls that arrive at random do not look like that, and one caller alone has nobody to wait for.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forno.server.cost import Cost
    from forno.server.request import Batch

_SHARE_OF_RUN = 1 / 4
"""The moment, as a share of a run of one row. Of calls that arrive at random while the engine keeps up, less than this
share of those that were answered is replaced within it."""
_LEAST_US = 100
"""Shorter moments are not worth a timer."""
_RETURN = 1 / 2
"""Share of the answered rows that must be followed by others."""
_WORTH = 2
"""Running together must save so many moments."""
_AMPLE = 2
"""Nobody waits whose deadline is not so many runs away."""
_RUNS = 8
"""The share of those that return is a mean over so many runs."""


class _After:
    """The moment after a run."""

    __slots__ = ("began_us", "followed", "released", "until_us")

    def __init__(self, began_us: int, until_us: int, released: int) -> None:
        self.began_us, self.until_us = began_us, until_us
        self.released = released  # rows that were answered
        self.followed = 0  # rows that arrived


class Company:
    """Decides how long a free engine waits for more rows. Owned by a Tuner; no clock, no thread."""

    def __init__(self) -> None:
        self.rows = 0  # below which it is worth to wait
        self.until_us = 0  # and until when
        self.leeway_us = 0  # and only while no deadline is sooner than this
        self.delay_us = 0  # how long the wait is after the last run
        self._returning = 0.0  # share of the answered rows that others follow
        self._moments: deque[_After] = deque()

    def ran(self, batch: Batch, ended_us: int, waiting_rows: int, cost: Cost) -> None:
        """Takes in a run, and decides whether the next one should wait.

        Args:
            batch: What ran.
            ended_us: When it ended.
            waiting_rows: Rows that wait by now.
            cost: What runs take.
        """
        moment_us = int(cost.one_row_us() * _SHARE_OF_RUN)
        self.rows = self.delay_us = 0
        if moment_us < _LEAST_US:
            return
        for moment in self._moments:
            began_us, until_us = moment.began_us, moment.until_us
            moment.followed += sum([each.rows for each in batch.requests if began_us <= each.arrived_us < until_us])
        if len(self._moments) == 2:  # those who follow a run are in one of the next two
            moment = self._moments.popleft()
            self._returning += (min(moment.followed / moment.released, 1.0) - self._returning) / _RUNS
        self._moments.append(_After(ended_us, ended_us + moment_us, batch.rows))
        rows = min(waiting_rows + int(self._returning * batch.rows + 0.5), cost.rows[-1])
        first = max(waiting_rows, 1)  # who would run without the others
        if self._returning >= _RETURN and rows > first:
            saved_us = cost.typical_us(first) + cost.typical_us(rows - first) - cost.typical_us(rows)
            if saved_us > _WORTH * moment_us:
                self.rows, self.until_us, self.delay_us = rows, ended_us + moment_us, moment_us
                self.leeway_us = self.until_us + int(_AMPLE * cost.safe_us(rows))
