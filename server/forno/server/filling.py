"""One batch in the making: which requests fit, and which are too late to be worth a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.request import NEVER_US

if TYPE_CHECKING:
    from forno.server.cost import Cost
    from forno.server.request import Request
    from forno.server.scheduling import Lane

_WORTH_RATE = 0.97
"""While more waits than one batch takes, a batch that is kept small by a near deadline must reach this share of a full
one's rate. If it did not, all behind it would come nearer to their deadlines, their batches would grow smaller still,
and soon the engine would run single rows and answer few in time."""


def take_in_order(lane: Lane, limit: int) -> tuple[list[Request], list[Request], int, int]:
    """Takes requests out of a lane in which all have time enough: what most batches are made by.

    Args:
        lane: Only those with a deadline wait in it, or only those without.
        limit: Most rows, though a single larger request goes alone.

    Returns:
        The requests, those that were cancelled and are dropped, and the rows of either.
    """
    requests: list[Request] = []
    dropped: list[Request] = []
    rows = dropped_rows = 0
    for request in lane.timed or lane.fifo:
        if request.future.done():
            dropped.append(request)
            dropped_rows += request.rows
        elif rows + request.rows <= limit or not requests:
            rows += request.rows
            requests.append(request)
        else:
            break
    lane.drop_first(len(requests) + len(dropped))
    lane.rows -= rows + dropped_rows
    return requests, dropped, rows, dropped_rows


class Filling:
    """Takes requests out of lanes, in order, until one does not fit. Lives for one `Batcher.try_close`.

    Args:
        cost: What runs cost.
        limit: Most rows, though a single larger request goes alone.
        waiting_rows: Rows that could be taken in all.
        now_us: Now.
        starts_us: When the run is expected to start, and what its answer needs beyond the run.
        trusting: Whether requests that look hopeless are dropped.
    """

    def __init__(
        self, cost: Cost, limit: int, waiting_rows: int, now_us: int, starts_us: int, *, trusting: bool
    ) -> None:
        self.requests: list[Request] = []
        self.rows = 0
        self.dropped: list[Request] = []  # cancelled and expired
        self.hopeless: list[Request] = []  # would be late even if they ran now
        self.left_rows = 0  # of all three
        self.full = False  # whether a request did not fit
        self._cap = limit
        self._cost = cost
        self._crowded = trusting and cost.known and waiting_rows > limit
        self._now_us = now_us
        self._starts_us = starts_us
        self._trusting = trusting
        self._latest_us = NEVER_US  # the soonest deadline of those taken
        self._least_us = 0  # deadlines before this are hopeless

    def take(self, lane: Lane) -> None:
        """Takes what fits out of a lane, and what is dropped."""
        fifo, timed, promote_us = lane.fifo, lane.timed, lane.promote_us
        at = 0  # of the first in `timed` that has not left
        while fifo or at < len(timed):
            is_timed = at < len(timed) and not (fifo and fifo[0].arrived_us + promote_us < timed[at].urgent_us)
            request = timed[at] if is_timed else fifo[0]
            if request.future.done() or request.expires_us <= self._now_us:
                self.dropped.append(request)
            elif self._is_hopeless(request):
                self.hopeless.append(request)
            elif self._fits(request):
                self.rows += request.rows
                self.requests.append(request)
                self._latest_us = min(self._latest_us, request.answer_by_us)
            elif self._crowded and self.rows + request.rows <= self._cap and self._is_slow():
                self._give_up_the_tight()
                continue
            else:
                self.full = True
                break
            lane.rows -= request.rows
            self.left_rows += request.rows
            if is_timed:
                at += 1
            else:
                fifo.popleft()
        del timed[:at]

    def _is_hopeless(self, request: Request) -> bool:
        if not self._trusting or request.expires_us == NEVER_US:
            return False
        alone_us = self._starts_us + self._cost.typical_us(request.rows)
        return request.answer_by_us < max(alone_us, self._least_us)

    def _fits(self, request: Request) -> bool:
        """Whether it finds room and makes nobody late."""
        if not self.requests:
            return True
        rows = self.rows + request.rows
        latest_us = min(self._latest_us, request.answer_by_us)
        return rows <= self._cap and (latest_us == NEVER_US or self._starts_us + self._cost.safe_us(rows) <= latest_us)

    def _is_slow(self) -> bool:
        """Whether what is taken so far makes poor use of the engine."""
        full_us, own_us = self._cost.typical_us(self._cap), self._cost.typical_us(self.rows)
        return self.rows * full_us < _WORTH_RATE * self._cap * own_us

    def _give_up_the_tight(self) -> None:
        """Gives up those that leave no time for a full batch, in favour of the many behind them."""
        self._crowded = False  # once is enough: from now on nobody tight is taken
        self._least_us = self._starts_us + int(self._cost.safe_us(self._cap))
        kept = [each for each in self.requests if each.answer_by_us >= self._least_us]
        self.hopeless += [each for each in self.requests if each.answer_by_us < self._least_us]
        self.requests = kept
        self.rows = sum([each.rows for each in kept])
        self._latest_us = min([each.answer_by_us for each in kept], default=NEVER_US)
