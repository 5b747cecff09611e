"""Finds how many rows a run should have, and how long requests should wait for company, from what runs cost.

More rows a run pay only as long as they make a row cheaper: a small network runs best with many, a large one on a CPU
with one or two, and past that point a larger batch only makes everyone wait. So the cap is the fewest rows whose rate
(rows a second) is near the best known. What is not known is tried: once in a while one batch may be twice or half as
large, more and more seldom while that changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.cost import Cost

if TYPE_CHECKING:
    from forno.server.config import BatchingSettings

_NEAR_BEST = 0.98
"""Fewer rows are preferred when they cost no more than this share of the rate: everyone waits less."""
_WORTH_GROWING = 1.03
_WORTH_SHRINKING = 0.99
"""What the rate of another cap must be, as a share of the present one's, before it is taken."""
_AROUND_US = 200
"""What a batch may cost around its run: closing it, handing it over to a thread and back, answering."""
_REVIEW_RUNS = 64
_TRIAL_RUNS = 32
"""Full batches before another size is tried for one batch; doubled while trials change nothing, up to `_MOST_RUNS`."""
_MOST_RUNS = 1024
_TRIAL_SAMPLES = 4
"""A size that ran so often is tried in its turn; one that ran less is tried first."""
_NEWS = 1.5
"""What runs cost has changed by so much: trials begin anew."""
_WORTH_WAITING = 0.9
"""Company is waited for where it cuts the cost of a row to this share, and one-row runs would fill half of the time."""


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
        self.cap = self._settled = cap or max_rows
        self.delay_us = settings.max_delay_us if max_rows > 1 else 0
        self._max_rows = max_rows
        self._fixed_cap = off or max_rows == 1 or "max_rows" in given
        self._fixed_delay = off or max_rows == 1 or "max_delay_us" in given or not settings.latency_target_ms
        self._target_us = 0 if off else settings.latency_target_ms * 1000
        self._countdown = _REVIEW_RUNS
        self._every = self._trial_in = _TRIAL_RUNS
        self._low_trial = False
        self._settled_us = 0.0  # what a run of the cap took when it was chosen
        self._gap_us = 0.0  # between rows
        self._last_us = 0

    def ran(self, rows: int, run_us: int, closed_us: int) -> None:
        """Takes in one run."""
        self.cost.learn(rows, run_us)
        if self._target_us:
            self._gap_us += ((closed_us - self._last_us) / rows - self._gap_us) / 8 if self._last_us else 0.0
            self._last_us = closed_us
        if self._fixed_cap and self._fixed_delay:
            return
        if rows >= self.cap and not self._fixed_cap:
            self._try_another()
        self._countdown -= 1
        if not self._countdown:
            self.review()

    def review(self) -> None:
        """Decides anew from what is known."""
        self._countdown = _REVIEW_RUNS
        if not self._fixed_cap:
            known_us = self.cost.typical_us(self._settled)
            if self._settled_us and not self._settled_us / _NEWS <= known_us <= self._settled_us * _NEWS:
                self.cost.forget_but(self._settled)
                self._settled_us, self._every = known_us, _TRIAL_RUNS
            settled = self._best_cap()
            if settled != self._settled:
                self.cap = self._settled = settled
                self._settled_us, self._every = self.cost.typical_us(settled), _TRIAL_RUNS
            self._trial_in = min(self._trial_in, self._every)
        if not self._fixed_delay:
            self.delay_us = self._best_delay_us()

    def _try_another(self) -> None:
        """Lets one batch in `_every` have another size; called for full batches only."""
        if self.cap != self._settled:
            self.cap = self._settled
            self.review()
            return
        more, less = min(self.cap * 2, self._max_rows), max(self.cap // 2, 1)
        tried = self.cost.samples[self.cost.step_of(more)]
        self._trial_in -= 1
        if self._trial_in > 0 and (tried or not self._in_target(more)):
            return  # but what was never tried is tried at once: a slow model's runs are precious
        is_fresh = tried < _TRIAL_SAMPLES
        if not is_fresh:
            self._every = min(self._every * 2, _MOST_RUNS)
        self._trial_in = self._every
        self._low_trial = not (self._low_trial or is_fresh or less == self.cap)
        self.cap = less if self._low_trial or not self._in_target(more) else more

    def _in_target(self, rows: int) -> bool:
        """Whether a request that comes right after the start of a run is answered in time by the next."""
        return not self._target_us or 2 * self.cost.safe_us(rows) <= self._target_us

    def _best_cap(self) -> int:
        cost = self.cost
        rates = [
            (rows, rows / (cost.typical_us(rows) + _AROUND_US))
            for rows, samples in zip(cost.rows, cost.samples, strict=True)
            if samples and (rows == 1 or self._in_target(rows))
        ]
        if not rates:
            return 1 if self._target_us and self.cost.known else self._settled
        best = max(rate for _, rate in rates)
        cap, rate = next((rows, rate) for rows, rate in rates if rate >= best * _NEAR_BEST)
        settled = dict(rates).get(self._settled)
        if settled is not None:  # samples are noisy: no change without a reason
            if cap > self._settled and best < settled * _WORTH_GROWING:
                return self._settled
            if cap < self._settled and rate < settled * _WORTH_SHRINKING:
                return self._settled
        return cap

    def _best_delay_us(self) -> int:
        """Until the batch is likely full, within the target; 0 where runs of few rows do as well."""
        cost, cap = self.cost, self._settled
        alone_us = cost.typical_us(1) + _AROUND_US
        shared_us = (cost.typical_us(cap) + _AROUND_US) / cap
        if self._gap_us <= 0 or alone_us < self._gap_us / 2 or shared_us > alone_us * _WORTH_WAITING:
            return 0
        slack_us = self._target_us - 2 * cost.safe_us(cap)
        return max(0, int(min(self._gap_us * (cap - 1), slack_us)))
