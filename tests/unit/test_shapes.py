"""Buckets, padding and cutting back, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.config import PaddingSettings
from forno.server.errors import ConfigError, InvalidArgument
from forno.server.shapes import Fit, Padding, plan, rows_limit
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.host import HostSlot

F4, I8, U1, TEXT = np.dtype("f4"), np.dtype("i8"), np.dtype("u1"), np.dtype(object)

ENCODER = Signature(
    (TensorSpec("tokens", I8, (-1, -1), ("n", "length")), TensorSpec("mask", I8, (-1, -1), ("n", "length"))),
    (TensorSpec("each", F4, (-1, -1, 4), ("n", "length", "")), TensorSpec("mean", F4, (-1, 4), ("n", ""))),
    batched=True,
)


def planned(signature: Signature = ENCODER, **settings: Any) -> Padding:
    settings.setdefault("enabled", True)
    found = plan(signature, PaddingSettings(**settings))
    assert found is not None
    return found


def test_nothing_is_planned_unless_it_is_asked_for():
    assert plan(ENCODER, PaddingSettings()) is None
    assert not planned(enabled=False, allowed_rows=(1, 2)).names


@pytest.mark.parametrize(("given", "enabled"), [("auto", "auto"), (True, True), (False, False), ("true", True)])
def test_settings_have_a_short_form(given, enabled):
    assert PaddingSettings.model_validate(given).enabled == enabled


def test_another_word_is_told_what_it_could_be():
    with pytest.raises(ValueError, match="auto, true, false or a mapping such as"):
        PaddingSettings.model_validate("often")


def test_axes_are_found_by_the_names_that_the_model_gives_them():
    padding = planned()
    assert padding.names == ("length",)
    assert [each.axes for each in padding.inputs] == [((1, "length"),)] * 2
    assert padding.outputs == (((1, "length"),), ())
    assert padding.fit(((5,), (5,))) == Fit(((8,), (8,)), ((slice(None), slice(5)), ()))


def test_axes_without_names_are_told_in_settings():
    x = TensorSpec("x", F4, (-1, -1, 3, -1), ("n", "", "", ""))
    y = TensorSpec("y", F4, (-1, -1), ("n", "k"))
    signature = Signature((x,), (y,), batched=True)
    padding = planned(signature)
    assert padding.names == ("x.1", "x.3")
    assert padding.fit(((5, 3, 20),)) == Fit(((8, 3, 24),), None)
    padding = planned(signature, axes={"x": [3]}, outputs={"y": {1: "x.3"}})
    assert padding.fit(((5, 3, 20),)) == Fit(((5, 3, 24),), ((slice(None), slice(20)),))


def test_axes_of_one_name_must_be_of_one_size():
    with pytest.raises(InvalidArgument, match=r"'mask': dimension 1 \('length'\) is 7, but it is 5 in input 'tokens'"):
        planned().fit(((5,), (7,)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"axes": {"tokns": [1]}}, "padding.axes has 'tokns', which the model does not have; it has 'tokens', 'mask'"),
        ({"axes": {"tokens": [0]}}, r"padding.axes.tokens has 0, but the input is int64\[\?, \?\]"),
        ({"axes": {"tokens": [2]}}, "padding.axes.tokens has 2"),
        ({"values": {"x": 1}}, "padding.values has 'x'"),
        ({"values": {"mask": 0.5}}, r"padding.values.mask is 0.5, which is no element of the input: it is int64"),
        ({"values": {"mask": "a"}}, "padding.values.mask is 'a'"),
        ({"outputs": {"each": {1: "width"}}}, "padding.outputs.each has 1: width.*what it measures: 'length'"),
        ({"outputs": {"each": {3: "length"}}}, "padding.outputs.each has 3: length"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        planned(**settings)


@pytest.mark.parametrize("key", ["sizes", "allowed_rows"])
@pytest.mark.parametrize("counts", [[2, 1], [1, 1], [0, 1]])
def test_lists_of_sizes_ascend(key, counts):
    with pytest.raises(ValueError, match=key):
        PaddingSettings(**{key: counts})


def test_buckets_are_steps_unless_they_are_given():
    padding = planned()
    assert [padding.size_for(size) for size in (0, 1, 8, 9, 12, 13, 33, 49, 128, 129)] == [
        *(0, 8, 8, 12, 12, 16, 48, 64, 128, 192)
    ]
    padding = planned(sizes=(32, 100))
    assert [padding.size_for(size) for size in (0, 1, 32, 33, 100, 101)] == [0, 32, 32, 100, 100, 101]


@given(st.integers(1, 1 << 40))
def test_a_step_is_never_below_and_at_most_half_above(size):
    bucket = planned().size_for(size)
    assert size <= bucket <= max(8, size * 1.5)
    assert planned().size_for(bucket) == bucket


def test_rows_are_limited_to_what_is_allowed():
    assert rows_limit(32, ()) == 32
    assert rows_limit(32, (1, 8, 64)) == 8
    with pytest.raises(ConfigError, match=r"padding\.allowed_rows begins with 8, but batching\.max_rows is 4"):
        rows_limit(4, (8, 16))


def fill(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    random = np.random.default_rng(seed)
    if dtype == TEXT:
        return np.asarray(random.choice(["a", "bb", ""], shape)).astype(object)
    return np.asarray(random.integers(0, 100, shape)).astype(dtype)


PLANS = st.fixed_dictionaries(
    {
        "exact": st.booleans(),
        "sizes": st.sampled_from([(), (4,), (2, 5, 7)]),
        "allowed_rows": st.sampled_from([(), (1, 2, 4, 8, 16, 32), (16,)]),
    }
)
VALUES = {F4: -1.5, I8: -3, U1: 255, TEXT: "pad", np.dtype("f2"): 7, np.dtype("?"): True}


@given(
    requests=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    dtype=st.sampled_from([*VALUES]),
    settings=PLANS,
)
def test_what_is_padded_and_cut_back_is_each_requests_own(requests, dtype, settings):
    """Through the very slot that an engine reads, as if the engine answered its inputs."""
    fixed = TensorSpec("fixed", I8, (-1, 2), ("n", ""))
    x = TensorSpec("x", dtype, (-1, -1, 2, -1), ("n", "a", "", "b"))
    y = TensorSpec("y", F4, (-1, -1), ("n", "b"))
    base = Signature((x, fixed, y), (x, fixed, y), batched=True)
    padding = planned(base, values={"x": VALUES[dtype], "y": -1}, **settings)
    signature = Signature(base.inputs, base.outputs, batched=True, padding=padding)
    slot = HostSlot(signature, 20)
    arrays = [
        (fill(dtype, (rows, a, 2, b), seed), fill(I8, (rows, 2), seed), fill(F4, (rows, b), seed))
        for seed, (rows, a, b) in enumerate(requests)
    ]
    fits = [padding.fit(tuple([array.shape[1:] for array in each])) for each in arrays]
    for key in {fit.key for fit in fits}:
        together = [(each, fit) for each, fit in zip(arrays, fits, strict=True) if fit.key == key]
        rows = sum(len(each[0]) for each, _ in together)
        slot.load([each for each, _ in together], rows)
        check(slot, padding, together, rows, key, VALUES[dtype])


def check(slot, padding, together, rows, key, value):
    run_rows = padding.rows_for(rows)
    assert all(array.shape[0] == run_rows for array in slot.inputs)
    assert all(
        np.array_equal(array[rows:], np.repeat(array[rows - 1 : rows], run_rows - rows, 0)) for array in slot.inputs
    )
    if padding.exact:
        assert tuple([array.shape[1:] for array in slot.inputs]) == key
    outputs = slot.own_rows(slot.inputs)
    own = sum(array.size for each, _ in together for array in each)
    assert slot.elements - slot.padded_elements == own
    assert slot.elements == sum(array.size for array in slot.inputs)
    start = 0
    for each, fit in together:
        end = start + len(each[0])
        for index, array in enumerate(each):
            output = outputs[index][start:end]
            cut = output[fit.cuts[index]]
            np.testing.assert_array_equal(cut, array, strict=True)
            if index == 0 and output.size > cut.size:
                rest = np.ones(output.shape, bool)
                rest[tuple(map(slice, cut.shape))] = False
                assert all(element == np.asarray(value, output.dtype) for element in output[rest])
        start = end


def test_a_lone_row_is_not_padded_but_for_exact_sizes():
    for exact, width in ((False, 5), (True, 8)):
        padding = planned(exact=exact)
        slot = HostSlot(Signature(ENCODER.inputs, ENCODER.outputs, batched=True, padding=padding), 4)
        row = np.ones((1, 5), I8)
        slot.load([(row, row)], 1)
        assert slot.inputs[0].shape == (1, width)
        assert slot.padded_elements == 2 * (width - 5)
