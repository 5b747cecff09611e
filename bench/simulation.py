"""The batcher on made-up time: the policy that serves, an engine that is a formula, and no machine to disturb it.

Figures of a real run are ratios of two noisy things; what a policy does with noise is better seen where the noise is
known. Arrivals, runs and hiccups are seeded, so a run comes out the same each time. Time is a heap of events; the one
thing simulated of the worker is when it closes a batch: when the engine is free, or behind a short run.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.batcher import Batcher
from forno.server.config import BatchingSettings
from forno.server.errors import FornoError
from forno.server.request import NEVER_US, Batch, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Run = Callable[[int, random.Random], float]

SHORT_US, LONG_US = 500, 5_000  # as in worker.py: when a batch is closed behind one that runs
ROW = np.zeros((1, 1), np.float32)


class _Reply:
    """As much of a future as batcher and simulation need."""

    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.ended = False
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self.ended

    def set_exception(self, error: BaseException) -> None:
        self.ended, self.error = True, error


@dataclass
class Load:
    """What arrives: `in_air` callers that ask again once answered, or calls at random (Poisson)."""

    in_air: int = 0
    think_us: float = 200.0  # from an answer to the caller's next request
    rate_per_s: float = 0.0
    deadlines_ms: Sequence[int] = ()  # one of them a request, at random


@dataclass
class Outcome:
    """What came of a simulation, its warm-up left out."""

    seconds: float
    arrivals: int = 0
    answers: int = 0
    in_time: int = 0  # answers within their deadline, where they had one
    refused: int = 0
    took_us: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)  # of its deadline, by each answer that had one
    rows: Counter[int] = field(default_factory=Counter)  # of the runs
    caps: Counter[int] = field(default_factory=Counter)  # settled, at each run
    rows_cap: int = 0
    delay_us: int = 0

    @property
    def answers_per_s(self) -> float:
        """Throughput."""
        return self.answers / self.seconds

    def within(self, target_us: float) -> float:
        """Answers a second that took no longer than this."""
        return sum(us <= target_us for us in self.took_us) / self.seconds


class Simulation:
    """One engine with its batcher under one load. Made for one `run`.

    Args:
        batching: Settings by name.
        run_us: What a run of so many rows takes.
        load: What arrives.
        around_us: From the end of a run to the start of the next that waited for it.
        seed: Of arrivals and noise.
        samples: Rows and times of first runs.
    """

    def __init__(
        self, batching: dict[str, Any], run_us: Run, load: Load, *,
        around_us: float = 200.0, seed: int = 1, samples: Sequence[tuple[int, float]] = (),
    ) -> None:  # fmt: skip
        settings = BatchingSettings(**batching)
        self._random = random.Random(seed)  # noqa: S311  (arrivals, not secrets)
        self._run_us, self._load, self._around_us = run_us, load, around_us
        self.batcher = Batcher(
            settings, settings.max_rows, by_shape=False, refused=lambda _why, _count: None, samples=samples
        )
        self.batcher.lag_us = int(around_us)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._held: list[tuple[Batch, float, float]] = []  # with the engine: batch, start and end of its run
        self._last_run_us = 0.0
        self._timer_us = float(NEVER_US)

    def run(self, seconds: float, warm_s: float = 1.0) -> Outcome:
        """Lets so much time pass."""
        self._from_us, self._end_us = warm_s * 1e6, (warm_s + seconds) * 1e6
        self.outcome = Outcome(seconds)
        if self._load.rate_per_s:
            self._at(self._gap_us(), self._arrive)
        for caller in range(self._load.in_air):
            self._at(1.0 + caller, self._arrive)
        while self._events and self._events[0][0] < self._end_us:
            now_us, _, what = heapq.heappop(self._events)
            what(now_us)
        statistics = self.batcher.statistics()
        self.outcome.rows_cap, self.outcome.delay_us = statistics.rows_cap, statistics.delay_us
        return self.outcome

    def _at(self, when_us: float, what: Callable[[float], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (when_us, self._order, what))

    def _gap_us(self) -> float:
        return self._random.expovariate(self._load.rate_per_s) * 1e6

    def _arrive(self, now_us: float) -> None:
        if self._load.rate_per_s:
            self._at(now_us + self._gap_us(), self._arrive)
        deadlines = self._load.deadlines_ms
        expires_us = int(now_us) + self._random.choice(deadlines) * 1000 if deadlines else NEVER_US
        request = Request((ROW,), 1, _nothing, _Reply(), int(now_us), expires_us)  # type: ignore[arg-type]
        self.outcome.arrivals += now_us >= self._from_us
        try:
            self.batcher.submit(request)
        except FornoError:
            self._refused(now_us)
        self._pump(now_us)

    def _refused(self, now_us: float) -> None:
        self.outcome.refused += now_us >= self._from_us
        if self._load.in_air:
            self._at(now_us + self._load.think_us, self._arrive)

    def _pump(self, now_us: float) -> None:
        self.batcher.expire(int(now_us))
        while len(self._held) < (2 if self._last_run_us < LONG_US else 1):
            only_full = bool(self._held) and self._last_run_us >= SHORT_US
            batch = self.batcher.try_close(int(now_us), only_full=only_full)
            if batch is None:
                break
            starts_us = max(self._held[-1][2] if self._held else 0.0, now_us + self._around_us)
            ends_us = starts_us + self._run_us(batch.rows, self._random)
            self._held.append((batch, starts_us, ends_us))
            self._at(ends_us, self._ended)
            self._expect(now_us)
        close_us = self.batcher.next_close_us()
        if close_us is not None and not self._held and close_us > now_us and close_us < self._timer_us:
            self._timer_us = close_us
            self._at(close_us, self._on_time)

    def _on_time(self, now_us: float) -> None:
        self._timer_us = float(NEVER_US)
        self._pump(now_us)

    def _ended(self, now_us: float) -> None:
        batch, starts_us, ends_us = self._held.pop(0)
        self._last_run_us = ends_us - starts_us
        self.batcher.ran(batch, int(ends_us - starts_us), int(now_us))
        self._expect(now_us)
        self._pump(now_us)
        done_us = now_us + self._around_us
        for request in batch.requests:
            if request.future.done():
                continue
            request.future.ended = True  # type: ignore[attr-defined]
            if request.arrived_us >= self._from_us:
                self.outcome.answers += 1
                self.outcome.took_us.append(done_us - request.arrived_us)
                if request.expires_us < NEVER_US:
                    self.outcome.in_time += done_us <= request.expires_us
                    allowed_us = request.expires_us - request.arrived_us
                    self.outcome.used.append((done_us - request.arrived_us) / allowed_us)
            if self._load.in_air:
                self._at(done_us + self._random.random() * self._load.think_us, self._arrive)
        if now_us >= self._from_us:
            self.outcome.rows[batch.rows] += 1
            self.outcome.caps[self.batcher.statistics().rows_cap] += 1

    def _expect(self, now_us: float) -> None:
        self.batcher.expect([(batch, int(starts_us)) for batch, starts_us, _ in self._held], int(now_us))


def _nothing(_answer: Any) -> None:
    return None


def noisy(
    run_us: float, row_us: float, *, deviation: float = 0.02, hiccups: float = 0.0, hiccup: float = 1.0, step: int = 0
) -> Run:
    """A run's time by its rows: a part that does not grow, one that does, and what real machines add.

    Args:
        run_us: Of every run.
        row_us: Of every row.
        deviation: Standard deviation of the noise, as a share.
        hiccups: Share of the runs that something else disturbs.
        hiccup: How much longer those take, as a share, on average (exponentially distributed).
        step: Rows beyond which a row costs twice as much, as where a cache grows too small; 0 = never.
    """

    def draw(rows: int, source: random.Random) -> float:
        beyond = max(0, rows - step) if step else 0
        us = (run_us + row_us * (rows + beyond)) * max(0.2, source.gauss(1.0, deviation))
        return us * (1 + source.expovariate(1 / hiccup)) if hiccups and source.random() < hiccups else us

    return draw
