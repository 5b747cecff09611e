"""Shapes that an engine is built for: which ranges there are, which of them a run takes, and what none of them takes.

An engine that was compiled for ranges of shapes refuses all others. What it refuses must not come into a batch, where
it would fail the rows of others; so requests are held against the ranges one by one, before they wait, and batches have
only counts of rows that every one of those requests can run with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from forno.server.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from forno.server.shapes import Padding

    Array = np.ndarray[Any, np.dtype[Any]]

_MOST_PASSED = 4096

Shapes = tuple[tuple[int, ...], ...]
"""Of every input, in the signature's order."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One range of shapes, and those in it for which the engine is at its best."""

    least: Shapes
    best: Shapes
    most: Shapes

    def holds(self, shapes: Shapes) -> bool:
        """Whether the engine runs inputs of these shapes with it."""
        return all(
            len(shape) == len(least) and all(map(_between, least, shape, most))
            for least, shape, most in zip(self.least, shapes, self.most, strict=True)
        )

    def distance(self, shapes: Shapes) -> int:
        """How far shapes are from the best ones, in sizes added up over all dimensions."""
        return sum(
            abs(size - best)
            for bests, sizes in zip(self.best, shapes, strict=True)
            for best, size in zip(bests, sizes, strict=True)
        )

    @property
    def rows(self) -> range:
        """The counts of rows that it holds, where axis 0 counts them."""
        return range(max(shape[0] for shape in self.least), min(shape[0] for shape in self.most) + 1)

    @property
    def row_ranges(self) -> tuple[Shapes, Shapes]:
        """The least and the most shapes of one row."""
        return tuple([shape[1:] for shape in self.least]), tuple([shape[1:] for shape in self.most])


@dataclass(frozen=True)
class Profiles:
    """All ranges of one engine; none of them = whatever its signature says. Immutable; any thread.

    Args:
        names: Of the inputs.
        ranges: In the engine's order.
    """

    names: tuple[str, ...] = ()
    ranges: tuple[Profile, ...] = ()

    def choose(self, shapes: Shapes) -> int | None:
        """The range with which inputs of these shapes run best, the first of equals; None where no range holds them."""
        holding = [index for index, profile in enumerate(self.ranges) if profile.holds(shapes)]
        return min(holding, key=lambda index: self.ranges[index].distance(shapes), default=None)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The counts of rows that a batch may have whatever the shapes of its rows, ascending; empty = any.

        Raises:
            ConfigError: There is none.
        """
        by_row: dict[tuple[Shapes, Shapes], set[int]] = {}
        for profile in self.ranges:
            by_row.setdefault(profile.row_ranges, set()).update(profile.rows)
        if not by_row:
            return ()
        common = set.intersection(*by_row.values())
        if not common:
            told = ", ".join(f"{one.rows.start} to {one.rows.stop - 1}" for one in self.ranges)
            raise ConfigError(f"its profiles run {told} rows, and have no count in common: shapes cannot be batched")
        return tuple(sorted(common))

    def check_row(self, row_shapes: Shapes) -> None:
        """Checks a request's row shapes, of all inputs.

        Raises:
            InvalidArgument: The engine was not built for them.
        """
        if not any(_holds_row(profile, row_shapes) for profile in self.ranges):
            raise self._refusal(row_shapes, 1)

    def refusal(self, shapes: Shapes) -> InvalidArgument:
        """The error for inputs of shapes that no range holds."""
        return self._refusal(shapes, 0)

    def _refusal(self, shapes: Shapes, first_axis: int) -> InvalidArgument:
        for index, (name, shape) in enumerate(zip(self.names, shapes, strict=True)):
            spans = [(one.least[index][first_axis:], one.most[index][first_axis:]) for one in self.ranges]
            if not any(len(least) == len(shape) and all(map(_between, least, shape, most)) for least, most in spans):
                return _refused(name, shape, dict.fromkeys(spans), "")
        name, shape = self.names[0], shapes[0]
        spans = [(one.least[0][first_axis:], one.most[0][first_axis:]) for one in self.ranges]
        return _refused(name, shape, dict.fromkeys(spans), " together with those of the other inputs")


class ShapeCheck:
    """Holds requests against ranges, and remembers what has passed. Owned by a Model; event loop only.

    Args:
        profiles: The ranges.
        batched: Whether axis 0 of every input counts rows, which are then no matter of the request.
        run_shapes: What inputs of some shapes run with, where that is something else.
    """

    def __init__(self, profiles: Profiles, batched: bool, run_shapes: Callable[[Shapes], Shapes] | None = None) -> None:
        self._profiles = profiles
        self._batched = batched
        self._run_shapes = run_shapes
        self._passed: set[Shapes] = set()

    def __call__(self, inputs: Sequence[Array], padding: Padding | None) -> None:
        """Checks a request, with the shapes that it will run with.

        Raises:
            InvalidArgument: The engine was not built for them.
        """
        shapes = tuple([array.shape[1:] if self._batched else array.shape for array in inputs])
        if self._run_shapes is not None:
            shapes = self._run_shapes(shapes)
        if shapes in self._passed:
            return
        if self._batched:
            self._profiles.check_row(padding.fit(shapes).key if padding is not None and padding.exact else shapes)
        elif self._profiles.choose(shapes) is None:
            raise self._profiles.refusal(shapes)
        if len(self._passed) >= _MOST_PASSED:  # a caller chooses shapes, and must not choose our memory
            self._passed.clear()
        self._passed.add(shapes)


def limited(
    allowed: Sequence[int], max_rows: int, engine_rows: Sequence[int], *, settings_name: str = "padding.allowed_rows"
) -> tuple[tuple[int, ...], int]:
    """The counts of rows that both the settings and the engine allow (empty = any up to the limit), and the limit.

    Args:
        allowed: What the settings allow; empty = any.
        max_rows: Most rows by the settings.
        engine_rows: What the engine allows, ascending; empty = any.
        settings_name: What `allowed` is called.

    Raises:
        ConfigError: Nothing is left.
    """
    if not engine_rows:
        return tuple(allowed), max_rows
    within = [rows for rows in engine_rows if rows <= max_rows]
    if not within:
        raise ConfigError(f"batching.max_rows is {max_rows}, but the plan runs {engine_rows[0]} rows or more")
    if allowed:
        known = set(within)
        both = tuple([rows for rows in allowed if rows in known])
        if not both:
            raise ConfigError(
                f"{settings_name} is {list(allowed)}, but the plan runs {_spelled(engine_rows)} rows, "
                f"and batching.max_rows is {max_rows}"
            )
        return both, both[-1]
    if within == [*range(1, len(within) + 1)]:
        return (), within[-1]
    return tuple(within), within[-1]


def _holds_row(profile: Profile, row_shapes: Shapes) -> bool:
    least, most = profile.row_ranges
    return all(
        len(shape) == len(low) and all(map(_between, low, shape, high))
        for low, shape, high in zip(least, row_shapes, most, strict=True)
    )


def _between(least: int, size: int, most: int) -> bool:
    return least <= size <= most


def _refused(
    name: str, shape: tuple[int, ...], spans: dict[tuple[tuple[int, ...], tuple[int, ...]], None], more: str
) -> InvalidArgument:
    known = ", ".join(f"{list(least)} to {list(most)}" for least, most in spans)
    return InvalidArgument(
        f"input '{name}': the engine was not built for shape {list(shape)}{more}, expected {known}",
        f"inputs[{name}].shape",
    )


def _spelled(rows: Sequence[int]) -> str:
    if len(rows) > 8 and rows[-1] - rows[0] == len(rows) - 1:
        return f"{rows[0]} to {rows[-1]}"
    return ", ".join(map(str, rows))
