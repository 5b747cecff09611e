"""Decides which waiting requests run together, and when. Pure policy: no clock, no await, no thread.

Requests wait in one group per row shape, since only equal shapes fit into one run; scheduling.py orders them. The
worker asks `try_close` whenever an engine could take work, and tells `ran` what each run took; the batcher never acts
by itself.

A deadline is kept three times, each time against the measured cost: a request that cannot make it behind what waits
and runs is refused at once; a batch takes no row that would make one of its members late; and what has become
hopeless while it waited is refused before it runs. Without deadlines none of this costs anything.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from forno.server import dropping
from forno.server.admission import expected_us, makes_late_us, surely_in_time
from forno.server.errors import DeadlineExceeded, InvalidArgument, Overloaded
from forno.server.filling import Filling, take_in_order
from forno.server.request import NEVER_US, Batch, Request
from forno.server.scheduling import BatcherStatistics, Group, due_us
from forno.server.tuning import Tuner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forno.server.config import BatchingSettings
    from forno.server.request import RowShapes
    from forno.server.scheduling import Lane

_SWEEP_SHARE = 16
"""A full queue is searched for cancelled requests once in this share of its length of refusals and departures: each
of those then pays for looking at no more than this many requests."""
_MOST_SHAPES = 256
"""Row shapes whose cost is remembered; the one that was first seen longest ago goes."""
_STALE_US = 1_000_000
"""An idle engine that has run nothing for so long is given a request even where its deadline looks impossible: else a
wrong estimate that refuses everything would never be put right."""
_RETRY_S = 0.1  # what callers are told while nothing is known
_LEAST_RETRY_S = 0.001


class Batcher:
    """Groups requests into batches. Owned by one Worker; event loop only; ends when nothing refers to it.

    Invariant: `pending_rows` <= max_pending_rows, but for a larger request in an empty queue and those taken back.

    Args:
        settings: The limits.
        max_rows: Most rows of a batch; 1 where the model is not batched, which makes each request its own batch.
        by_shape: Whether requests of one model can differ in their row shapes.
        instances: Runs that can go on at once.
        refused: Told how many requests were dropped and why: "overloaded", "expired" or "cancelled".
        samples: Rows and microseconds of the first runs, made before there was a request.
    """

    def __init__(
        self,
        settings: BatchingSettings,
        max_rows: int,
        *,
        by_shape: bool,
        instances: int = 1,
        refused: Callable[[str, int], None],
        samples: Iterable[tuple[int, float]] = (),
    ) -> None:
        self._settings = settings
        self._max_rows = max_rows
        self._max_pending_rows = settings.max_pending_rows
        self._promote_us = settings.promote_after_ms * 1000
        self._by_shape = by_shape
        self._instances = instances
        self._refused = refused
        self._groups: dict[RowShapes, Group] = {}
        self._alone: tuple[Request, RowShapes, Tuner] | None = None
        """All that waits, where it is in no group: most requests that come when little is asked for."""
        self._singles: deque[tuple[Request, Tuner]] = deque()  # each for a run of its own, before all others
        self._tuners: dict[RowShapes, Tuner] = {}
        self._tuner = Tuner(settings, max_rows)  # of the last run
        if not by_shape:
            self._tuners[()] = self._tuner
            self._tuner.begin(samples)
        self._patient = max_rows > 1 and bool(settings.max_delay_us)
        given = "max_delay_us" in settings.model_fields_set or settings.tune == "off" or instances > 1
        self._waits = max_rows > 1 and not given  # for those who were just answered
        self._soonest_us = NEVER_US  # no waiting request expires before this
        self._moves = settings.max_pending_rows  # refusals and departures since the last search for cancelled requests
        self._ran_us = 0  # when a run last ended
        self.free_us = 0  # when the engine is expected to be free; told by the worker, as the next
        self.lag_us = 0  # what an answer needs beyond its run
        self.pending_requests = 0
        self.pending_rows = 0

    def submit(self, request: Request) -> None:
        """Takes the request into the queue and owns it until it leaves in a batch; on an error it owns nothing.

        Raises:
            DeadlineExceeded: The request arrived with no time left.
            InvalidArgument: It has more rows than a batch.
            Overloaded: Its rows and those that wait are more than may wait, or it would be late behind them.
        """
        rows = request.rows
        expires_us = request.expires_us
        if rows > self._max_rows:
            raise InvalidArgument(
                f"the request has {rows} rows, but one run of this model takes at most {self._max_rows}; "
                "send fewer rows a request, or raise batching.max_rows",
                "inputs",
            )
        key = (request.shape_key or request.row_shapes) if self._by_shape else ()
        if not self.pending_requests and not self._patient:
            tuner = self._tuner_of(key)
            if expires_us < NEVER_US and not self._has_ample_time(request, tuner, request.arrived_us):
                self._admit(request, None, tuner)
            self._soonest_us = expires_us
            self._alone = request, key, tuner
            self.pending_requests, self.pending_rows = 1, rows
            return
        self._group_the_lone()
        if self.pending_rows + rows > self._max_pending_rows and self.pending_rows:
            self._make_room(request)
        group = self._groups.get(key)
        if expires_us < NEVER_US:
            self._admit(request, group, group.tuner if group else self._tuner_of(key))
            self._soonest_us = min(self._soonest_us, expires_us)
        if group is None:
            group = self._groups[key] = Group(self._tuner_of(key))
        group.add(request, self._promote_us)
        if not self._patient or group.rows >= group.tuner.cap:
            group.due_us = 0
        else:
            group.due_us = min(group.due_us, due_us(request, group.tuner.delay_us))
        self.pending_requests += 1
        self.pending_rows += rows

    def try_close(self, now_us: int, *, only_full: bool = False) -> Batch | None:
        """The batch that should run now, or None. Cancelled and expired requests are dropped on the way.

        Args:
            now_us: Now.
            only_full: Whether a batch that could find more company is left for later.
        """
        if self._alone is not None:
            request, _, tuner = self._alone
            batch = self._close_alone(request, tuner, now_us, only_full=only_full)
            if batch is not None:
                return batch
            self._group_the_lone()
        while self._singles and not only_full:
            request, tuner = self._singles.popleft()
            self.pending_requests -= 1
            self.pending_rows -= request.rows
            if request.expires_us > now_us and not request.future.done():
                return Batch([request], request.rows, now_us, tuner)
            dropping.drop([request], now_us, self._refused)
        while self._groups:
            if not self._patient and len(self._groups) == 1:
                ((key, group),) = self._groups.items()
                if (only_full and group.rows < group.tuner.cap) or now_us < self._awaited_us(group):
                    return None
            else:
                due = [item for item in self._groups.items() if item[1].due_us <= now_us]
                if only_full:
                    due = [item for item in due if item[1].rows >= item[1].tuner.cap]
                if not due:
                    return None
                key, group = min(due, key=lambda item: item[1].rank(now_us))
            batch = self._take(group, now_us)
            if not group.lanes:
                del self._groups[key]
            else:
                group.set_due(patient=self._patient)
            if batch.requests:
                group.tuner.company.rows = 0
                return batch
        return None

    def take_back(self, batch: Batch) -> None:
        """Has each request of a run that failed run alone: one of them may be why it failed."""
        self._group_the_lone()
        self._singles += [(request, batch.tuner) for request in batch.requests]
        self.pending_requests += len(batch.requests)
        self.pending_rows += batch.rows

    def expect(self, running: Iterable[tuple[Batch, int]], now_us: int) -> None:
        """Told which batches an engine apart from the loop holds now, in order, with when each started or 0."""
        ends_us: list[int] = []
        for batch, started_us in running:
            starts_us = heappop(ends_us) if len(ends_us) == self._instances else started_us or now_us
            heappush(ends_us, starts_us + int(batch.tuner.cost.typical_us(batch.rows)))
        self.free_us = ends_us[0] if len(ends_us) == self._instances else now_us

    def ran(self, batch: Batch, run_us: int, now_us: int) -> None:
        """Told what a run took, failed ones left out."""
        waited = batch.requests[0].arrived_us < self._ran_us  # for the run before
        gap_us = max(now_us - run_us - self._ran_us, 0) if waited else None
        self._ran_us, tuner = now_us, batch.tuner
        self._tuner = tuner
        tuner.ran(batch, run_us, gap_us)
        if self._waits:
            tuner.company.ran(batch, now_us, self.pending_rows, tuner.cost)

    def next_close_us(self) -> int | None:
        """When `try_close` should be asked again; None while nothing waits, 0 where a batch is ready."""
        self._group_the_lone()
        if self._singles:
            return 0
        if not self._patient:
            return min(map(self._awaited_us, self._groups.values()), default=None)
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
        self._group_the_lone()
        self._patient = self._waits = False
        for group in self._groups.values():
            group.due_us = 0

    def take_all(self) -> list[Request]:
        """Empties the queue, without dropping anything: what is left at shutdown."""
        self._group_the_lone()
        requests = [request for request, _ in self._singles]
        requests += [request for group in self._groups.values() for request in group]
        self._singles.clear()
        self._groups.clear()
        self.pending_requests = self.pending_rows = 0
        self._soonest_us = NEVER_US
        return requests

    def statistics(self) -> BatcherStatistics:
        """What waits now, cancelled requests that have not been met yet included, and how batches are sized."""
        tuner = self._tuner
        return BatcherStatistics(
            self.pending_requests,
            self.pending_rows,
            len(self._groups) + (self._alone is not None),
            tuner.cap,
            tuner.delay_us or tuner.company.delay_us,
            tuner.cost.one_row_us(),
            tuner.cost.typical_us(tuner.cap),
        )

    def _tuner_of(self, key: RowShapes) -> Tuner:
        tuner = self._tuners.get(key)
        if tuner is None:
            if len(self._tuners) >= _MOST_SHAPES:
                del self._tuners[next(iter(self._tuners))]
            tuner = self._tuners[key] = Tuner(self._settings, self._max_rows, self._tuner.cap)
        return tuner

    def _admit(self, request: Request, group: Group | None, tuner: Tuner) -> None:
        """Refuses a request that would be late, or would make others late that were promised to be in time."""
        now_us, expires_us = request.arrived_us, request.expires_us
        if expires_us <= now_us:
            self._refused("expired", 1)
            raise DeadlineExceeded("the deadline had passed when the request arrived; it did not run")
        starts_us = max(now_us, self.free_us) + self.lag_us
        if len(self._groups) <= 1 and surely_in_time(group, request, tuner, starts_us):
            return
        urgent_us = min(expires_us, now_us + self._promote_us)
        answered_us = expected_us(self._groups.values(), request, tuner, urgent_us, starts_us, self._instances)
        late_us, others_late_us = answered_us - request.answer_by_us, 0.0
        if late_us <= 0 and group is not None:
            others_late_us = makes_late_us(group, request, urgent_us, starts_us, self._instances)
        if max(late_us, others_late_us) <= 0:
            return
        is_idle = not self.pending_rows and self.free_us <= now_us
        alone_us = starts_us + tuner.cost.typical_us(request.rows)
        if is_idle and (alone_us <= request.answer_by_us or self._is_stale(now_us)):
            return  # it makes nobody late, and what is not tried is not learned
        if others_late_us > 0:
            why = "would make requests late that were taken before it"
        else:
            behind = "" if is_idle else ", behind the requests ahead"
            why = f"would be answered after {int(answered_us) - now_us} us{behind}"
        self._refused("overloaded", 1)
        raise Overloaded(
            f"the request's deadline is {request.answer_by_us - now_us} us away, and it {why}; it did not run. "
            "Send again later, or allow more time",
            max(late_us / 1e6, others_late_us / 1e6, _LEAST_RETRY_S),
        )

    def _close_alone(self, request: Request, tuner: Tuner, now_us: int, *, only_full: bool) -> Batch | None:
        """The batch of the only request that waits; None where a glance does not tell that it should run."""
        rows = request.rows
        if rows < tuner.company.rows or (only_full and rows < tuner.cap) or request.future.done():
            return None
        if request.expires_us < NEVER_US and not self._has_ample_time(request, tuner, now_us):
            return None
        self._alone = None
        self.pending_requests = self.pending_rows = 0
        self._moves += 1
        tuner.company.rows = 0
        return Batch([request], rows, now_us, tuner, tuner.limit(rows))

    def _has_ample_time(self, request: Request, tuner: Tuner, now_us: int) -> bool:
        """Whether the only request that waits is in time beyond doubt."""
        starts_us = max(now_us, self.free_us) + self.lag_us
        return request.expires_us > starts_us + tuner.cost.ample_us(max(tuner.cap, request.rows))

    def _group_the_lone(self) -> None:
        """Has a request that was alone wait like all others."""
        if self._alone is not None:
            request, key, tuner = self._alone
            group = self._groups[key] = Group(tuner)
            group.add(request, self._promote_us)
            group.due_us = 0
            self._alone = None

    def _awaited_us(self, group: Group) -> int:
        """Until when a free engine waits for more rows of these; 0 where it does not."""
        company = group.tuner.company
        if group.rows >= min(company.rows, group.tuner.cap) or not self._waits or len(self._groups) > 1:
            return 0
        return company.until_us if self._soonest_us > company.leeway_us else 0

    def _take(self, group: Group, now_us: int) -> Batch:
        """Moves requests from the group into a batch, in order, until one does not fit. May return no request."""
        lanes, tuner = group.lanes, group.tuner
        limit = tuner.limit(group.rows)
        starts_us = max(now_us, self.free_us) + self.lag_us
        if len(lanes) == 1:
            ((priority, lane),) = lanes.items()
            if not lane.timed or lane.has_time(starts_us + tuner.cost.safe_us(limit), limit):
                return self._take_in_order(group, priority, lane, now_us, limit)
        filling = Filling(tuner.cost, limit, group.rows, now_us, starts_us, trusting=not self._is_stale(now_us))
        for priority, lane in group.turns(now_us):
            filling.take(lane)
            if filling.full:
                break
            del lanes[priority]
        requests, dropped, hopeless = filling.requests, filling.dropped, filling.hopeless
        self._left(group, len(requests) + len(dropped) + len(hopeless), filling.left_rows)
        self._moves += len(requests)
        if dropped:
            dropping.drop(dropped, now_us, self._refused)
        if hopeless:
            dropping.give_up(hopeless, self._retry_s(), self._refused)
        return Batch(requests, filling.rows, now_us, tuner, limit)

    def _take_in_order(self, group: Group, priority: int, lane: Lane, now_us: int, limit: int) -> Batch:
        """The same where all have one priority and time enough, which is the way of most batches."""
        requests, dropped, rows, dropped_rows = take_in_order(lane, limit)
        if not (lane.timed or lane.fifo):
            del group.lanes[priority]
        self._left(group, len(requests) + len(dropped), rows + dropped_rows)
        self._moves += len(requests)
        if dropped:
            dropping.drop(dropped, now_us, self._refused)
        return Batch(requests, rows, now_us, group.tuner, limit)

    def _left(self, group: Group, requests: int, rows: int) -> None:
        group.rows -= rows
        self.pending_rows -= rows
        self.pending_requests -= requests

    def _is_stale(self, now_us: int) -> bool:
        """Whether the engine is idle and what is known of its cost is old."""
        return self.free_us <= now_us and now_us >= self._ran_us + _STALE_US

    def _retry_s(self) -> float:
        """When what waits now will have run."""
        tuner = self._tuner
        if not tuner.cost.known:
            return _RETRY_S
        return max(tuner.cost.drain_us(self.pending_rows, tuner.cap) / self._instances / 1e6, _LEAST_RETRY_S)

    def _make_room(self, request: Request) -> None:
        """Lets the places of cancelled and expired requests go to a new one, or refuses it."""
        self._moves += 1
        if self._moves * _SWEEP_SHARE >= self.pending_requests:
            self._sweep(request.arrived_us)
        if self.pending_rows + request.rows > self._max_pending_rows and self.pending_rows:
            self._refused("overloaded", 1)
            raise Overloaded(
                f"{self.pending_rows} rows wait already, and {request.rows} more would be over "
                f"batching.max_pending_rows = {self._max_pending_rows}; send again later",
                self._retry_s(),
            )

    def _sweep(self, now_us: int) -> None:
        """Drops every cancelled or expired request that waits, and finds anew when the next one expires."""
        self._group_the_lone()
        dropped, self._soonest_us = dropping.sweep(self._groups, now_us, patient=self._patient)
        self._moves = 0
        self.pending_requests -= len(dropped)
        self.pending_rows -= sum([request.rows for request in dropped])
        if dropped:
            dropping.drop(dropped, now_us, self._refused)
