"""Finds how many rows a run should have, and how long requests should wait for company, from what runs cost.

More rows a run pay only as long as they make a row cheaper: a small network runs best with many, a large one on a CPU
with a few. Machines are noisy, and times of runs that lie a second apart hardly compare. So the cap is found by
contests: full batches of the cap and of twice or half as many rows take turns, each pair gives a ratio of their rates
(rows a second), and the other size wins once the ratios agree that it is better, or is let go once they agree that it
is not. While contests change nothing they grow rare.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from forno.server.company import Company
from forno.server.cost import Cost

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forno.server.config import BatchingSettings
    from forno.server.request import Batch

_WORTH_GROWING = math.log(1.01)
_WORTH_SHRINKING = math.log(0.995)
"""What the rate of another size must be, as a share of the cap's, before it is taken. Fewer rows win where they cost
next to nothing: everyone waits less."""
_NEAR_BEST = 0.99
"""To begin with, the fewest rows are taken whose rate is this share of the best."""
_LEAST_PAIRS = 5
_MOST_PAIRS = 24
_SURE = 2.5
"""A contest ends when the mean of its ratios is so many standard errors away from what would decide otherwise, or after
`_MOST_PAIRS`."""
_MOST_OF_A_PAIR = 0.5
"""A ratio counts as no more than this, as a logarithm: a run that met a hiccup says nothing of sizes."""
_MOST_MISSES = 32
"""A contest for more rows ends undecided after so many turns for which too few rows waited."""
_FULL = 3 / 4
"""A batch is full from this share of its limit on: what did not fit may have several rows."""
_FIRST_AROUND_US = 200.0
_AROUND_RUNS = 16
_MOST_AROUND = 4
"""What lies between two runs is followed as a mean over so many, in which one counts as no more than so many means."""
_REVIEW_RUNS = 64
_FIRST_FULL = 4
_MOST_FULL = 1024
"""Full batches before a contest; doubled while contests change nothing."""
_REST = 8
"""And so many at least for each pair of the last one: what the worse size costs stays small while that is found out."""
_NEWS = 1.5
"""What runs cost has changed by so much: contests become frequent again."""


class _Contest:
    """Which of two sizes has the better rate. Owned by a Tuner, for one decision."""

    __slots__ = ("_needed", "_other_rates", "_own_rates", "_ratios", "_turn_is_other", "misses", "rows")

    def __init__(self, rows: int, needed: float) -> None:
        self.rows = rows  # of the other size
        self.misses = 0
        self._needed = needed
        self._turn_is_other = False
        self._own_rates: deque[float] = deque()  # without their counterparts yet, as the next
        self._other_rates: deque[float] = deque()
        self._ratios: list[float] = []  # of the other's rate by the cap's, as logarithms

    def limit(self, cap: int, waiting_rows: int) -> int:
        """Most rows of the next batch, of which at least `cap` wait."""
        if self._turn_is_other and waiting_rows < self.rows:
            self.misses += 1
            return cap
        self._turn_is_other = not self._turn_is_other
        return cap if self._turn_is_other else self.rows

    @property
    def pairs(self) -> int:
        """Ratios so far."""
        return len(self._ratios)

    def learn(self, limit: int, rate: float) -> None:
        """Takes in the rate of a full batch."""
        if limit == self.rows:
            self._other_rates.append(rate)
        else:
            self._own_rates.append(rate)
        if self._own_rates and self._other_rates:
            ratio = math.log(self._other_rates.popleft() / self._own_rates.popleft())
            self._ratios.append(min(max(ratio, -_MOST_OF_A_PAIR), _MOST_OF_A_PAIR))

    def other_wins(self) -> bool | None:
        """Whether the other size is better by what is needed; None while that is open."""
        ratios, pairs = self._ratios, self.pairs
        if pairs < _LEAST_PAIRS:
            return None
        mean = sum(ratios) / pairs
        variance = sum([(ratio - mean) ** 2 for ratio in ratios]) / (pairs - 1)
        if pairs < _MOST_PAIRS and abs(mean - self._needed) < _SURE * math.sqrt(variance / pairs):
            return None
        return mean > self._needed


class Tuner:
    """Sizes batches of one row shape. Owned by a Batcher, which tells it of every run; no clock, no thread.

    Args:
        settings: Which values are fixed, and the latency to aim for.
        max_rows: Most rows of a run.
        cap: Rows to begin with.
    """

    def __init__(self, settings: BatchingSettings, max_rows: int, cap: int = 0) -> None:
        given = settings.model_fields_set
        off = settings.tune == "off"
        self.cost = Cost(max_rows)
        self.cap = cap or max_rows  # of a batch behind which nothing waits, as `limit` has it
        self.company = Company()
        self.delay_us = settings.max_delay_us if max_rows > 1 else 0
        self._best = self.cap  # the rows of the best rate known
        self._max_rows = max_rows
        self._fixed_cap = off or max_rows == 1 or "max_rows" in given
        self._target_us = 0 if off else settings.latency_target_ms * 1000
        self._countdown = _REVIEW_RUNS
        self._contest: _Contest | None = None
        self._full_left = self._every = _FIRST_FULL
        self._grows = True  # what the next contest tries
        self._around_us = _FIRST_AROUND_US  # from the end of a run to the start of the next, where that waits
        self._known_us = 0.0  # what a run of `_best` rows took at the last review

    def begin(self, samples: Iterable[tuple[int, float]]) -> None:
        """Takes in runs that were made before there was a request, and chooses the rows to begin with."""
        least_us: dict[int, float] = {}
        for rows, run_us in samples:
            if rows <= self._max_rows:
                self.cost.learn(rows, run_us)
                least_us[rows] = min(run_us, least_us.get(rows, run_us))
        if least_us and not self._fixed_cap:
            rates = {rows: rows / (us + self._around_us) for rows, us in sorted(least_us.items())}
            self._best = next(rows for rows, rate in rates.items() if rate >= max(rates.values()) * _NEAR_BEST)
        self.review()

    def limit(self, waiting_rows: int) -> int:
        """Most rows of the batch that is made now of so many that wait."""
        if waiting_rows < self.cap or self._fixed_cap:
            return self.cap
        if waiting_rows <= self._best and self.cap < self._best:
            return self.cap
        if self._contest is None:
            self._full_left -= 1
            if self._full_left > 0 or not self._challenge(waiting_rows):
                return self._best
        return self._contest.limit(self._best, waiting_rows) if self._contest else self._best

    def ran(self, batch: Batch, run_us: int, gap_us: int | None) -> None:
        """Takes in one run.

        Args:
            batch: What ran.
            run_us: What it took.
            gap_us: What passed since the run before, for which it waited; None where it did not wait.
        """
        rows, limit = batch.rows, batch.limit
        self.cost.learn(rows, run_us)
        if self._fixed_cap:
            return
        if gap_us is not None:
            self._around_us += (min(gap_us, _MOST_AROUND * self._around_us + 1) - self._around_us) / _AROUND_RUNS
        contest = self._contest
        if contest is not None and rows > limit * _FULL and limit in (self._best, contest.rows):
            contest.learn(limit, rows / (run_us + self._around_us))
            self._judge(contest)
        self._countdown -= 1
        if not self._countdown:
            self.review()

    def review(self) -> None:
        """Decides anew what follows from the cost alone."""
        self._countdown = _REVIEW_RUNS
        if self._fixed_cap:
            return
        known_us = self.cost.typical_us(self._best)
        if not self._known_us / _NEWS <= known_us <= self._known_us * _NEWS:
            self._known_us, self._every = known_us, _FIRST_FULL
            self._full_left = min(self._full_left, self._every)
        self.cap = self._largest_in_target()

    def _challenge(self, waiting_rows: int) -> bool:
        """Begins a contest, if there is a size to try now."""
        more, less = min(self._best * 2, self._max_rows), max(self._best // 2, 1)
        if self._grows and self._best < more <= waiting_rows:
            self._contest = _Contest(more, _WORTH_GROWING)
        elif less < self._best:
            self._grows = False
            self._contest = _Contest(less, _WORTH_SHRINKING)
        else:
            self._grows = True
        return self._contest is not None

    def _judge(self, contest: _Contest) -> None:
        other_wins = contest.other_wins()
        if other_wins is None and contest.misses < _MOST_MISSES:
            return
        self._contest = None
        if other_wins:
            self._best, self._every = contest.rows, _FIRST_FULL
            self.review()
        else:
            self._grows = not self._grows
            self._every = min(max(self._every * 2, _REST * contest.pairs), _MOST_FULL)
        self._full_left = self._every

    def _largest_in_target(self) -> int:
        """The rows with which a request that comes right after the start of a run is answered in time by the next."""
        if not self._target_us or not self.cost.known:
            return self._best
        fitting = [rows for rows in self.cost.rows if 2 * self.cost.safe_us(rows) <= self._target_us]
        return min(self._best, max(fitting, default=1))
