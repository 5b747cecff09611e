"""How long a run takes, learned from the runs themselves.

A mean is kept for each of a few counts of rows, a quarter of a doubling apart, and for all of them together the mean
deviation as a share of the mean; both follow the samples as TCP's round-trip estimate does (Jacobson and Karels, 1988).
Two answers come out of them. `typical_us` is what a run of so many rows is expected to take; `safe_us` is what it
should not exceed, far above the mean while there are few samples. Both grow with rows whatever the samples say, and
counts that were never run are drawn from their neighbours: in between by a line, beyond the largest in proportion to
rows, which overstates them.

When the machine grows slower or faster, all counts are off, also those that nobody runs now. So a run moves the mean of
its own count, and as much a scale that is common to all.
"""

from __future__ import annotations

_GAIN = 1 / 12
"""Share of a new sample in the mean of its count of rows, in the deviation, and in the scale."""
_MANY = 10
"""From so many samples of a count on: before, each weighs as in a plain mean, `1 / (samples + 2)`."""
_OUTLIER = 3.0
_LEAST_OUTLIER = 1 / 2
"""A sample farther from the mean than so many deviations, or this share of it, counts as that far: one hiccup is no
news, a few are."""
_SAFE = 3.0
"""Deviations above the mean of what is safe: 2.4 standard deviations where times are normally distributed."""
_FIRST_DEVIATION = 1 / 4
_FEW = 2.0
"""A count of rows that was run once is trusted by so much less than one that was run often."""
_AMPLE = 16.0
_LITTLE_NEWS = 4
"""After fewer runs no time has grown so many times: even samples at their bound double the product of mean and scale
hardly more than once each."""


def steps(max_rows: int) -> list[int]:
    """The counts of rows that are told apart: all up to 8, then four in each doubling, and `max_rows`."""
    counts: list[int] = []
    rows = 1
    while rows < max_rows:
        counts.append(rows)
        rows += max(1, 1 << (rows.bit_length() - 3)) if rows >= 4 else 1
    return [*counts, max_rows]


class Cost:
    """Time of a run by its rows, for one row shape of one model. Owned by a Batcher; no clock, no thread.

    `learn` costs the same however many counts there are; the table behind both answers is made when one is asked for.

    Args:
        max_rows: Most rows of a run.
    """

    def __init__(self, max_rows: int) -> None:
        self.rows = steps(max_rows)
        self.samples = [0] * len(self.rows)
        index = bytearray([0])
        for at, rows in enumerate(self.rows):
            index.extend([at] * (rows + 1 - len(index)))
        self._index = bytes(index)  # of the step that stands for a count of rows
        self._mean_us = [0.0] * len(self.rows)  # before scaling
        self._deviation = _FIRST_DEVIATION  # of a sample from its mean, as a share of it
        self._scale = 1.0
        self._typical_us = self._safe_us = self._mean_us
        self._least = len(self.rows)  # the first count that was run
        self._unseen = 0  # runs since the table was made

    def learn(self, rows: int, run_us: float) -> None:
        """Takes in one run."""
        at, scale = self._index[rows], self._scale
        count = self.samples[at]
        mean_us = self._mean_us[at] if count else self._prior_us(at)
        if mean_us <= 0:
            self._mean_us[at] = run_us / scale
        else:
            deviation = self._deviation
            most = _OUTLIER * deviation + _LEAST_OUTLIER
            error = run_us / scale / mean_us - 1
            if error > most:
                error = most
            elif error < -most:
                error = -most
            self._mean_us[at] = mean_us * (1 + error * (_GAIN if count >= _MANY else 1 / (count + 2)))
            self._deviation = deviation + (abs(error) - deviation) * _GAIN
            self._scale = scale * (1 + error * _GAIN)
        self.samples[at] = count + 1
        if not count:
            self._least = min(self._least, at)
        self._unseen += 1

    def _prior_us(self, at: int) -> float:
        """What the neighbours say of a count's first run; 0 where it is not between two.

        The first run may have met a hiccup, and a count that looks slow is seldom run again.
        """
        is_between = any(self.samples[:at]) and any(self.samples[at + 1 :])
        return self.typical_us(self.rows[at]) / self._scale if is_between else 0.0

    @property
    def known(self) -> bool:
        """Whether any run was seen."""
        return self._least < len(self.rows)

    def one_row_us(self) -> float:
        """What `typical_us(1)` is, without the table of the others: asked after each run of even the smallest model."""
        return self._mean_us[self._least] * self._scale if self.known else 0.0

    def typical_us(self, rows: int) -> float:
        """What a run of so many rows is expected to take; 0 while nothing is known."""
        if self._unseen:
            self._tabulate()
        return self._typical_us[self._index[rows]]

    def safe_us(self, rows: int) -> float:
        """What a run of so many rows should not exceed; 0 while nothing is known."""
        if self._unseen:
            self._tabulate()
        return self._safe_us[self._index[rows]]

    def ample_us(self, rows: int) -> float:
        """At least `safe_us`, and by far: for those who have that time, without a new table after each run."""
        if self._unseen >= _LITTLE_NEWS or self._safe_us is self._mean_us:
            return self.safe_us(rows) * _AMPLE
        return self._safe_us[self._index[rows]] * _AMPLE

    def drain_us(self, rows: int, cap: int) -> float:
        """What so many rows are expected to take in batches of up to `cap`."""
        if self._unseen:
            self._tabulate()
        full, rest = divmod(rows, cap)
        us = full * self._typical_us[self._index[cap]] if full else 0.0
        return us + self._typical_us[self._index[rest]] if rest else us

    def _tabulate(self) -> None:
        self._unseen = 0
        scale = self._scale
        seen = [at for at, count in enumerate(self.samples) if count]
        typical_us = [self._mean_us[at] * scale for at in seen]
        margins = [1 + _SAFE * self._deviation * (1 + _FEW / self.samples[at]) for at in seen]
        safe_us = [us * margin for us, margin in zip(typical_us, margins, strict=True)]
        self._typical_us, self._safe_us = self._between(seen, typical_us), self._between(seen, safe_us)

    def _between(self, seen: list[int], times_us: list[float]) -> list[float]:
        """Times of all counts from the times of those that were seen."""
        table = [times_us[0]] * len(self.rows)
        most_us = 0.0
        for place, at in enumerate(seen):
            low_us, most_us = (most_us, max(most_us, times_us[place]))
            table[at] = most_us
            if place:
                before = seen[place - 1]
                slope = (most_us - low_us) / (self.rows[at] - self.rows[before])
                for gap in range(before + 1, at):
                    table[gap] = low_us + slope * (self.rows[gap] - self.rows[before])
        for beyond in range(seen[-1] + 1, len(self.rows)):
            table[beyond] = most_us * self.rows[beyond] / self.rows[seen[-1]]
        return table
