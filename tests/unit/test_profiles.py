"""Ranges of shapes: what is chosen, what is refused, and which counts of rows batches may have."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.errors import ConfigError, InvalidArgument
from forno.server.profiles import Profile, Profiles, limited

SIZES = st.integers(0, 6)


@st.composite
def profiles(draw: st.DrawFn, least_size: int = 0) -> Profile:
    """Of two inputs, [rows, size] and [rows]."""
    bounds = []
    for axes in (2, 1):
        sizes = [sorted(draw(st.lists(SIZES, min_size=3, max_size=3))) for _ in range(axes)]
        bounds.append([tuple(max(size[which], least_size) for size in sizes) for which in range(3)])
    least, best, most = [tuple(bound[which] for bound in bounds) for which in range(3)]
    return Profile(least, best, most)


@given(ranges=st.lists(profiles(), max_size=4), rows=SIZES, size=SIZES, others=SIZES)
def test_the_nearest_that_holds_the_shapes_is_chosen(ranges: list[Profile], rows: int, size: int, others: int) -> None:
    shapes = ((rows, size), (others,))
    flat = (rows, size, others)

    def inside(profile: Profile) -> bool:
        bounds = zip(sum(profile.least, ()), flat, sum(profile.most, ()), strict=True)
        return all(low <= at <= high for low, at, high in bounds)

    def far(profile: Profile) -> int:
        return sum(abs(at - best) for at, best in zip(flat, sum(profile.best, ()), strict=True))

    chosen = Profiles(("a", "b"), tuple(ranges)).choose(shapes)
    if chosen is None:
        assert not any(map(inside, ranges))
    else:
        assert inside(ranges[chosen])
        assert far(ranges[chosen]) == min(far(profile) for profile in ranges if inside(profile))


@given(ranges=st.lists(profiles(1), min_size=1, max_size=3), size=st.integers(1, 6))
def test_a_row_that_is_let_in_runs_with_every_count_of_rows(ranges: list[Profile], size: int) -> None:
    both = Profiles(("a", "b"), tuple(ranges))
    try:
        counts = both.rows
        both.check_row(((size,), ()))
    except (ConfigError, InvalidArgument):
        return
    assert counts == tuple(sorted(set(counts)))
    for rows in counts:
        assert both.choose(((rows, size), (rows,))) is not None


@given(
    engine=st.sets(st.integers(1, 12), min_size=1).map(sorted),
    allowed=st.sets(st.integers(1, 12)).map(sorted),
    max_rows=st.integers(1, 12),
)
def test_what_settings_and_engine_allow(engine: list[int], allowed: list[int], max_rows: int) -> None:
    both = {rows for rows in engine if rows <= max_rows and (not allowed or rows in allowed)}
    if not both:
        with pytest.raises(ConfigError):
            limited(allowed, max_rows, engine)
        return
    counts, most = limited(allowed, max_rows, engine)
    assert most == max(both)
    assert set(counts or range(1, most + 1)) == both


def test_an_engine_without_ranges_takes_what_the_settings_say() -> None:
    assert Profiles().rows == ()
    assert limited((1, 2), 32, ()) == ((1, 2), 32)


def test_what_no_range_holds_is_told_by_the_input_that_is_wrong() -> None:
    first = Profile(((1, 2), (1,)), ((1, 2), (1,)), ((4, 8), (4,)))
    second = Profile(((1, 20), (1,)), ((1, 20), (1,)), ((4, 80), (2,)))
    both = Profiles(("a", "b"), (first, second))
    for shapes, complaint in (
        (((1, 9), (1,)), r"input 'a': .* shape \[1, 9\], expected \[1, 2\] to \[4, 8\], \[1, 20\] to \[4, 80\]"),
        (((1, 8), (5,)), r"input 'b': .* shape \[5\], expected \[1\] to \[4\], \[1\] to \[2\]"),
        (((1, 80), (4,)), r"input 'a': .* shape \[1, 80\] together with those of the other inputs"),
        (((1, 8, 1), (1,)), r"input 'a': .* shape \[1, 8, 1\], expected"),
    ):
        assert both.choose(shapes) is None
        with pytest.raises(InvalidArgument, match=complaint) as caught:
            raise both.refusal(shapes)
        assert caught.value.field.startswith("inputs[")
    assert both.rows == (1, 2)


def test_ranges_without_a_common_count_of_rows() -> None:
    one, other = (Profile(((rows, size),), ((rows, size),), ((rows, size),)) for rows, size in ((1, 5), (8, 50)))
    with pytest.raises(ConfigError, match="its profiles run 1 to 1, 8 to 8 rows, and have no count in common"):
        _ = Profiles(("x",), (one, other)).rows


def test_rows_of_every_range_with_the_same_row_shapes_add_up() -> None:
    bounds = itertools.starmap(lambda low, high: Profile(((low, 3),), ((low, 3),), ((high, 3),)), [(1, 2), (4, 6)])
    assert Profiles(("x",), tuple(bounds)).rows == (1, 2, 4, 5, 6)
