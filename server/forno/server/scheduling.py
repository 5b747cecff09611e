"""The order in which waiting requests run: by priority, then by urgency, and nobody starves.

A request is urgent at its deadline, or when it has waited for the promotion time, whichever is sooner; that makes one
without a deadline urgent at a known time too. Within a priority the sooner goes first. Past the promotion time a
request goes before every priority.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from forno.server.request import NEVER_US, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forno.server.tuning import Tuner

_urgency = attrgetter("urgent_us")


def due_us(request: Request, delay_us: int) -> int:
    """When a request has waited long enough for company: after the delay, or half of the time that it has."""
    return min(request.arrived_us + delay_us, (request.arrived_us + request.expires_us) // 2)


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """A glance at the queue."""

    pending_requests: int
    pending_rows: int
    shapes: int
    rows_cap: int  # rows of a batch now
    delay_us: int  # longest wait for company now
    one_row_us: float  # what a run of one row is expected to take; 0 while unknown, as the next
    cap_us: float  # what a run of `rows_cap` rows is expected to take


class Lane:
    """Requests of one priority and equal row shapes. Owned by a Group.

    Those without a deadline are urgent in the order of their arrival, so a plain queue will do; nearly always the
    others come in order, too, and are put at the end.
    """

    __slots__ = ("fifo", "promote_us", "rows", "timed")

    def __init__(self, promote_us: int) -> None:
        self.fifo: deque[Request] = deque()  # without a deadline
        self.timed: list[Request] = []  # with one, by urgency
        self.rows = 0
        self.promote_us = promote_us

    def add_timed(self, request: Request) -> None:
        """Takes a request with a deadline to its place."""
        request.urgent_us = min(request.expires_us, request.arrived_us + self.promote_us)
        timed = self.timed
        if not timed or timed[-1].urgent_us <= request.urgent_us:
            timed.append(request)
        else:
            insort(timed, request, key=_urgency)

    def urgent_us(self) -> int:
        """When the first request is urgent. The lane must not be empty."""
        first_us = self.fifo[0].arrived_us + self.promote_us if self.fifo else NEVER_US
        return min(first_us, self.timed[0].urgent_us) if self.timed else first_us

    def rows_before(self, urgent_us: int) -> int:
        """Rows that go before a request that comes now and is urgent then."""
        timed, fifo = self.timed, self.fifo
        if (not timed or timed[-1].urgent_us <= urgent_us) and (
            not fifo or fifo[-1].arrived_us + self.promote_us <= urgent_us
        ):
            return self.rows
        rows = sum([each.rows for each in timed[: bisect_right(timed, urgent_us, key=_urgency)]])
        for each in fifo:
            if each.arrived_us + self.promote_us > urgent_us:
                break
            rows += each.rows
        return rows

    def __iter__(self) -> Iterator[Request]:
        yield from self.timed
        yield from self.fifo

    def has_time(self, ends_us: float, limit: int) -> bool:
        """Whether all have a deadline, and none is urgent before a full run would end."""
        return not self.fifo and self.timed[0].urgent_us > ends_us and self.timed[0].rows <= limit

    def drop_first(self, count: int) -> None:
        """Forgets so many, where only those with a deadline wait, or only those without. Leaves `rows` as it is."""
        if self.timed:
            del self.timed[:count]
        elif count == len(self.fifo):
            self.fifo.clear()
        else:
            for _ in range(count):
                self.fifo.popleft()

    def keep(self, kept: list[Request]) -> None:
        """Forgets the requests that are not among these, which come as they were iterated."""
        self.timed = [each for each in kept if each.expires_us < NEVER_US]
        self.fifo = deque([each for each in kept if each.expires_us == NEVER_US])
        self.rows = sum([each.rows for each in kept])


class Group:
    """Waiting requests of equal row shapes. Owned by a Batcher, which removes it when it is empty.

    Args:
        tuner: Sizes its batches.
    """

    __slots__ = ("due_us", "lanes", "rows", "tuner")

    def __init__(self, tuner: Tuner) -> None:
        self.lanes: dict[int, Lane] = {}  # by priority, highest first; no lane is empty
        self.rows = 0
        self.due_us = NEVER_US  # when it should close even if it is not full
        self.tuner = tuner

    def add(self, request: Request, promote_us: int) -> None:
        """Takes a request to its place."""
        lane = self.lanes.get(request.priority)
        if lane is None:
            lane = self.lanes[request.priority] = Lane(promote_us)
            if len(self.lanes) > 1:
                self.lanes = dict(sorted(self.lanes.items(), reverse=True))
        rows = request.rows
        lane.rows += rows
        self.rows += rows
        if request.expires_us == NEVER_US:
            lane.fifo.append(request)
        else:
            lane.add_timed(request)

    def set_due(self, *, patient: bool) -> None:
        """Finds anew when it should close, after some have left."""
        if not patient or self.rows >= self.tuner.cap:
            self.due_us = 0
        else:
            self.due_us = min([due_us(request, self.tuner.delay_us) for request in self])

    def turns(self, now_us: int) -> list[tuple[int, Lane]]:
        """The lanes in the order in which a batch is filled from them, with their priorities."""
        lanes = list(self.lanes.items())
        if len(lanes) > 1:
            starved = [item for item in lanes if item[1].urgent_us() <= now_us]
            if starved:
                starved.sort(key=lambda item: item[1].urgent_us())
                lanes = starved + [item for item in lanes if item not in starved]
        return lanes

    def rank(self, now_us: int) -> tuple[float, int]:
        """Sorts groups: those with a starved request first, then the higher priority, then the more urgent."""
        urgent_us, most_urgent_us = 0, NEVER_US
        for lane in reversed(self.lanes.values()):
            urgent_us = lane.urgent_us()
            most_urgent_us = min(most_urgent_us, urgent_us)
        if most_urgent_us <= now_us:
            return float("-inf"), most_urgent_us
        return -next(iter(self.lanes)), urgent_us

    def rows_before(self, priority: int, urgent_us: int) -> int:
        """Rows that go before a request that comes now. What a promotion will change is left out."""
        return sum(
            [
                lane.rows if of > priority else lane.rows_before(urgent_us)
                for of, lane in self.lanes.items()
                if of >= priority
            ]
        )

    def __iter__(self) -> Iterator[Request]:
        for lane in self.lanes.values():
            yield from lane
