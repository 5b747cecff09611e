"""Decides which waiting requests run together, and when. Pure policy: no clock, no await, no thread.

Requests wait in one group per row shape, since only equal shapes fit into one run; a group has one first-in-first-out
lane per priority. The worker asks `try_close` whenever an engine could take work; the batcher never acts by itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forno.server.errors import DeadlineExceeded, InvalidArgument, Overloaded
from forno.server.request import NEVER_US, Batch, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forno.server.config import BatchingSettings

_SWEEP_SHARE = 16
"""A full queue is searched for cancelled requests once in this share of its length of refusals and departures: each
of those then pays for looking at no more than this many requests."""


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """A glance at the queue."""

    pending_requests: int
    pending_rows: int
    shapes: int


class _Group:
    """Waiting requests of equal row shapes. Owned by one Batcher, which removes it when it is empty."""

    __slots__ = ("due_us", "lanes", "rows")

    def __init__(self) -> None:
        self.lanes: dict[int, deque[Request]] = {}  # by priority, highest first; no lane is empty
        self.rows = 0
        self.due_us = NEVER_US  # when it should close even if it is not full

    def add(self, request: Request) -> None:
        lane = self.lanes.get(request.priority)
        if lane is None:
            self.lanes[request.priority] = deque((request,))
            if len(self.lanes) > 1:
                self.lanes = dict(sorted(self.lanes.items(), reverse=True))
        else:
            lane.append(request)
        self.rows += request.rows

    def rank(self) -> tuple[int, int]:
        """Sorts groups: the higher priority first, then the earlier arrival."""
        priority = next(iter(self.lanes))
        return -priority, self.lanes[priority][0].arrived_us

    def __iter__(self) -> Iterator[Request]:
        for lane in self.lanes.values():
            yield from lane


class Batcher:
    """Groups requests into batches. Owned by one Worker; event loop only; ends when nothing refers to it.

    Invariant: `pending_rows` <= max_pending_rows, unless a single larger request entered an empty queue.

    Args:
        settings: The limits.
        max_rows: Most rows of a batch; 1 where the model is not batched, which makes each request its own batch.
        by_shape: Whether requests of one model can differ in their row shapes.
        refused: Told how many requests were dropped and why: "overloaded", "expired" or "cancelled".
    """

    def __init__(
        self, settings: BatchingSettings, max_rows: int, *, by_shape: bool, refused: Callable[[str, int], None]
    ) -> None:
        self._max_rows = max_rows
        self._max_delay_us = settings.max_delay_us if max_rows > 1 else 0
        self._max_pending_rows = settings.max_pending_rows
        self._by_shape = by_shape
        self._refused = refused
        self._groups: dict[tuple[tuple[int, ...], ...], _Group] = {}
        self._soonest_us = NEVER_US  # no waiting request expires before this
        self._moves = settings.max_pending_rows  # refusals and departures since the last search for cancelled requests
        self.pending_requests = 0
        self.pending_rows = 0

    def submit(self, request: Request) -> None:
        """Takes the request into the queue and owns it until it leaves in a batch; on an error it owns nothing.

        Raises:
            DeadlineExceeded: The request arrived with no time left.
            InvalidArgument: It has more rows than a batch.
            Overloaded: Its rows and those that wait are more than may wait.
        """
        rows = request.rows
        expires_us = request.expires_us
        if rows > self._max_rows:
            raise InvalidArgument(
                f"the request has {rows} rows, but one run of this model takes at most {self._max_rows}; "
                "send fewer rows a request, or raise batching.max_rows",
                "inputs",
            )
        if expires_us <= request.arrived_us:
            self._refused("expired", 1)
            raise DeadlineExceeded("the deadline had passed when the request arrived; it did not run")
        if self.pending_rows + rows > self._max_pending_rows and self.pending_rows:
            self._make_room(request)
        key = request.row_shapes if self._by_shape else ()
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        group.add(request)
        if self._max_delay_us == 0 or group.rows >= self._max_rows:
            group.due_us = 0
        else:
            group.due_us = min(group.due_us, self._due_us(request))
        self.pending_requests += 1
        self.pending_rows += rows
        if expires_us < self._soonest_us:  # noqa: PLR1730  (a call costs more, and every request comes here)
            self._soonest_us = expires_us

    def try_close(self, now_us: int) -> Batch | None:
        """The batch that should run now, or None. Cancelled and expired requests are dropped on the way."""
        while self._groups:
            if self._max_delay_us == 0 and len(self._groups) == 1:
                ((key, group),) = self._groups.items()
            else:
                due = [item for item in self._groups.items() if item[1].due_us <= now_us]
                if not due:
                    return None
                key, group = min(due, key=lambda item: item[1].rank())
            batch = self._take(group, now_us)
            if not group.lanes:
                del self._groups[key]
            else:
                self._set_due(group)
            if batch.requests:
                return batch
        return None

    def next_close_us(self) -> int | None:
        """When `try_close` should be asked again; None while nothing waits, 0 where a batch is ready."""
        if self._max_delay_us == 0:
            return 0 if self._groups else None
        return min((group.due_us for group in self._groups.values()), default=None)

    def next_expiry_us(self) -> int | None:
        """A time before which no waiting request expires; None while none will."""
        return self._soonest_us if self.pending_requests and self._soonest_us < NEVER_US else None

    def expire(self, now_us: int) -> None:
        """Answers waiting requests whose time ran out. One comparison while there can be none."""
        if now_us >= self._soonest_us:
            self._sweep(now_us)

    def hurry(self) -> None:
        """Nothing waits for company any more: the model is about to stop."""
        self._max_delay_us = 0
        for group in self._groups.values():
            group.due_us = 0

    def take_all(self) -> list[Request]:
        """Empties the queue, without dropping anything: what is left at shutdown."""
        requests = [request for group in self._groups.values() for request in group]
        self._groups.clear()
        self.pending_requests = self.pending_rows = 0
        self._soonest_us = NEVER_US
        return requests

    def statistics(self) -> BatcherStatistics:
        """What waits now; cancelled requests that have not been met yet count."""
        return BatcherStatistics(self.pending_requests, self.pending_rows, len(self._groups))

    def _due_us(self, request: Request) -> int:
        """When the request has waited long enough for company: after the delay, or half of the time that it has."""
        return min(request.arrived_us + self._max_delay_us, (request.arrived_us + request.expires_us) // 2)

    def _set_due(self, group: _Group) -> None:
        if self._max_delay_us == 0 or group.rows >= self._max_rows:
            group.due_us = 0
        else:
            group.due_us = min(self._due_us(request) for request in group)

    def _take(self, group: _Group, now_us: int) -> Batch:
        """Moves requests from the group into a batch, in order, until one does not fit. May return no request."""
        room = self._max_rows
        requests: list[Request] = []
        dropped: list[Request] = []
        left = 0
        for priority, lane in list(group.lanes.items()):
            while lane:
                request = lane[0]
                if request.expires_us <= now_us or request.future.done():
                    dropped.append(request)
                elif request.rows <= room:
                    room -= request.rows
                    requests.append(request)
                else:
                    break
                lane.popleft()
                left += request.rows
            if lane:
                break
            del group.lanes[priority]
        group.rows -= left
        self.pending_rows -= left
        self.pending_requests -= len(requests) + len(dropped)
        self._moves += len(requests)
        if dropped:
            self._drop(dropped, now_us)
        return Batch(requests, self._max_rows - room, now_us)

    def _make_room(self, request: Request) -> None:
        """Lets the places of cancelled and expired requests go to a new one, or refuses it."""
        self._moves += 1
        if self._moves * _SWEEP_SHARE >= self.pending_requests:
            self._sweep(request.arrived_us)
        if self.pending_rows + request.rows > self._max_pending_rows and self.pending_rows:
            self._refused("overloaded", 1)
            raise Overloaded(
                f"{self.pending_rows} rows wait already, and {request.rows} more would be over "
                f"batching.max_pending_rows = {self._max_pending_rows}; send again later"
            )

    def _sweep(self, now_us: int) -> None:
        """Drops every cancelled or expired request that waits, and finds anew when the next one expires."""
        dropped: list[Request] = []
        self._soonest_us = NEVER_US
        self._moves = 0
        for key, group in list(self._groups.items()):
            count = len(dropped)
            for priority, lane in list(group.lanes.items()):
                kept: deque[Request] = deque()
                for request in lane:
                    if request.expires_us <= now_us or request.future.done():
                        dropped.append(request)
                    else:
                        kept.append(request)
                        self._soonest_us = min(self._soonest_us, request.expires_us)
                if kept:
                    group.lanes[priority] = kept
                else:
                    del group.lanes[priority]
            gone = dropped[count:]
            group.rows -= sum(request.rows for request in gone)
            if not group.lanes:
                del self._groups[key]
            elif gone:
                self._set_due(group)
        self.pending_requests -= len(dropped)
        self.pending_rows -= sum(request.rows for request in dropped)
        if dropped:
            self._drop(dropped, now_us)

    def _drop(self, requests: list[Request], now_us: int) -> None:
        """Answers those that expired, and counts; the cancelled want no answer."""
        expired = [request for request in requests if not request.future.done()]
        for request in expired:
            waited_us = now_us - request.arrived_us
            request.future.set_exception(
                DeadlineExceeded(f"the deadline passed after {waited_us} us in the queue; the request did not run")
            )
        if expired:
            self._refused("expired", len(expired))
        if len(expired) < len(requests):
            self._refused("cancelled", len(requests) - len(expired))
