"""A worker on a bench, with a batcher that watches every rule of batching."""

from __future__ import annotations

from typing import Any, Self

from tests.unit.puppets import PATIENCE_S, Clock, PuppetEngine, PuppetLoop, RecordingMetrics, request

from forno.server.admission import AHEAD
from forno.server.batcher import Batcher
from forno.server.config import BatchingSettings
from forno.server.errors import Overloaded
from forno.server.request import NEVER_US, Batch, Request
from forno.server.worker import SPARE_SLOTS, Worker


class WatchedBatcher(Batcher):
    """Fails the test where a batch holds what must not run or is out of order, or a refusal was not needed."""

    def submit(self, request: Request) -> None:
        refusal = self.refusal(request)
        if refusal is None:
            return
        assert refusal.retry_after_s > 0
        if "taken before it" in str(refusal):
            (group,) = [each for key, each in self._groups.items() if key == request.row_shapes]
            behind = [each for each in group if each.priority == request.priority and each.expires_us < NEVER_US]
            assert max(map(self.urgency, behind)) > self.urgency(request)
        elif "deadline" in str(refusal):
            assert self.expected_us(request, self.waiting()) > request.expires_us
        else:
            waiting_rows = sum(each.rows for each in self.waiting()) + self.taken_back_rows
            assert waiting_rows + request.rows > self._max_pending_rows
        raise refusal

    def refusal(self, request: Request) -> Overloaded | None:
        try:
            super().submit(request)
        except Overloaded as error:
            return error
        return None

    def waiting(self) -> list[Request]:
        return [request for group in self._groups.values() for request in group]

    @property
    def taken_back_rows(self) -> int:
        return sum(request.rows for request, _ in self._singles)

    def expected_us(self, request: Request, waiting: list[Request]) -> float:
        """When a request would be answered by the batcher's own numbers, found the long way."""
        urgent_us = self.urgency(request)
        ahead: dict[Any, int] = {}
        for each in waiting:
            same = each.priority == request.priority
            if each.priority > request.priority or (same and self.urgency(each) <= urgent_us):
                ahead[each.row_shapes] = ahead.get(each.row_shapes, 0) + each.rows
        at_us = max(request.arrived_us, self.free_us) + self.lag_us
        own = self._tuners[request.row_shapes]
        run_rows = request.rows
        for key, rows in ahead.items():
            tuner = self._tuners[key]
            with_me = rows % tuner.cap if key == request.row_shapes else 0
            if with_me + request.rows > tuner.cap:
                with_me = 0
            at_us += tuner.cost.drain_us(rows - with_me, tuner.cap) * AHEAD / self._instances
            if key == request.row_shapes:
                run_rows = max(tuner.cap, request.rows) if rows - with_me >= tuner.cap else with_me + request.rows
        return at_us + own.cost.safe_us(run_rows)

    def urgency(self, request: Request) -> int:
        return min(request.expires_us, request.arrived_us + self._promote_us)

    def try_close(self, now_us: int, *, only_full: bool = False) -> Batch | None:
        singles = len(self._singles)
        batch = super().try_close(now_us, only_full=only_full)
        if batch is not None and len(self._singles) == singles:
            for priority in {each.priority for each in batch.requests}:
                order = [self.urgency(each) for each in batch.requests if each.priority == priority]
                assert order == sorted(order)
                left = [
                    self.urgency(each)
                    for each in self.waiting()
                    if each.priority == priority and each.row_shapes == batch.requests[0].row_shapes
                ]
                assert not left or order[-1] <= min(left)
        if batch is not None:
            assert 0 < batch.rows == sum(each.rows for each in batch.requests) <= self._max_rows
            assert len({each.row_shapes for each in batch.requests}) == 1
            assert not any(each.future.done() or each.expires_us <= now_us for each in batch.requests)
        return batch


class Bench:
    """A worker with everything around it."""

    def __init__(
        self,
        *,
        threaded: bool = False,
        instances: int = 1,
        run_us: int = 100,
        inline_below_us: int = 150,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        self.loop = PuppetLoop(self.clock)
        self.engine = PuppetEngine(gated=threaded)
        self.metrics = RecordingMetrics()
        self.settings = BatchingSettings(**settings)
        self.batcher = WatchedBatcher(
            self.settings,
            self.settings.max_rows,
            by_shape=True,
            instances=instances,
            refused=self.metrics.refused,
        )
        self.worker = Worker(
            "puppet",
            self.engine,
            self.batcher,
            self.metrics,
            slots=[self.engine.new_slot(self.settings.max_rows) for _ in range(instances + SPARE_SLOTS)],
            run_us=run_us,
            inline_below_us=0 if threaded else inline_below_us,
            instances=instances,
            clock_us=self.clock,
            loop=self.loop,
        )

    def submit(self, number: int = 0, **more: Any) -> Request:
        more.setdefault("arrived_us", self.clock.now_us)
        made = request(self.loop, number=number, **more)
        self.worker.submit(made)
        return made

    def finish_run(self) -> None:
        self.engine.let_run()
        self.loop.turn_when_posted()

    def let_abandoned_end(self, runs: int) -> None:
        """Lets runs end for which a closed worker did not wait, and then its thread, which closes the engine."""
        for _ in range(runs):
            self.engine.let_run()
        for _ in range(runs + 1):
            self.loop.posted.get(timeout=PATIENCE_S)
        self.loop.turn()

    def close(self, grace_s: float = 0) -> None:
        closing = self.loop.create_task(self.worker.close(grace_s))
        for _ in range(1000):
            self.clock.now_us += 10_000
            self.loop.turn()
            if closing.done():
                break
            if self.worker.running_rows:
                self.finish_run()
            elif not self.worker.inline and self.worker._closed:
                self.loop.turn_when_posted()
        closing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.worker._closed:
            self.close(grace_s=1000)
        self.loop.close()


def rows_of(number: int, rows: int = 1, width: int = 2) -> list[list[int]]:
    """What a request of that number should be answered."""
    return [[number * 10 + 1] * width] * rows
