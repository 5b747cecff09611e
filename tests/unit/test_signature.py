"""What a model takes, and how it says that something does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.errors import InvalidArgument
from forno.server.signature import Signature, TensorSpec

F4, I8 = np.dtype("f4"), np.dtype("i8")
X, N = TensorSpec("x", F4, (-1, 3)), TensorSpec("n", I8, (-1,))
BATCHED = Signature((X, N), (TensorSpec("y", F4, (-1,)), TensorSpec("z", F4, (-1,))), batched=True)


def alone(*shape: int) -> Signature:
    return Signature((TensorSpec("x", F4, shape),), (), batched=False)


def test_a_spec_reads_well():
    assert str(X) == "float32[?, 3]"
    assert str(TensorSpec("s", np.dtype(object), ())) == "string[]"


def test_inputs_are_arranged_in_the_signatures_order():
    x, n = np.zeros((2, 3), F4), np.zeros(2, I8)
    assert BATCHED.arrange({"n": n, "x": x}) == (x, n)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("x", "input 'n' is missing; this model takes 'x', 'n'"),
        ("", "input 'x' is missing; input 'n' is missing; this model takes 'x', 'n'"),
        ("xnq", "input 'q' is unknown; this model takes 'x', 'n'"),
        ("xq", "input 'n' is missing; input 'q' is unknown; this model takes 'x', 'n'"),
    ],
)
def test_missing_and_unknown_inputs_are_named(names, text):
    with pytest.raises(InvalidArgument) as caught:
        BATCHED.arrange({name: np.zeros(1) for name in names})
    assert (str(caught.value), caught.value.field) == (text, "inputs")


def test_a_model_without_inputs_takes_none():
    signature = Signature((), (), batched=False)
    assert signature.validate(signature.arrange({})) == 1
    with pytest.raises(InvalidArgument, match="this model takes none"):
        signature.arrange({"x": np.zeros(1)})


def test_rows_are_counted_where_they_are_independent():
    assert BATCHED.validate((np.zeros((4, 3), F4), np.zeros(4, I8))) == 4
    assert alone(-1, 3).validate((np.zeros((4, 3), F4),)) == 1
    assert alone(-1, 3).validate((np.zeros((0, 3), F4),)) == 1
    assert alone().validate((np.zeros((), F4),)) == 1


@pytest.mark.parametrize(
    ("x", "n", "text", "field"),
    [
        (np.zeros((2, 3), "f8"), np.zeros(2, I8), "input 'x': element type is float64, expected float32[?, 3]", "x"),
        (np.zeros((2, 4), F4), np.zeros(2, I8), "input 'x': shape of [2, 4] does not fit, expected float32[?, 3]", "x"),
        (np.zeros(3, F4), np.zeros(2, I8), "input 'x': rank of [3] does not fit, expected float32[?, 3]", "x"),
        (np.zeros((), F4), np.zeros(2, I8), "input 'x': rank of [] does not fit, expected float32[?, 3]", "x"),
        (np.zeros((2, 3), F4), np.zeros(1, I8), "input 'n': 1 rows, but input 'x' has 2", "n"),
        (np.zeros((2, 3), F4), np.zeros(0, I8), "input 'n': 0 rows, but input 'x' has 2", "n"),
        (np.zeros((0, 3), F4), np.zeros(0, I8), "the request has no rows: dimension 0 is 0, expected at least 1", ""),
    ],
)
def test_what_does_not_fit_says_why(x, n, text, field):
    with pytest.raises(InvalidArgument) as caught:
        BATCHED.validate((x, n))
    assert str(caught.value) == text
    assert caught.value.field.startswith(f"inputs[{field}]" if field else "inputs")


sizes = st.integers(0, 3)


@given(want=st.lists(st.integers(-1, 3), max_size=3), have=st.lists(sizes, max_size=3))
def test_a_shape_fits_where_every_dimension_does(want, have):
    fits = len(want) == len(have) and all(w in (-1, h) for w, h in zip(want, have, strict=True))
    try:
        alone(*want).validate((np.zeros(have, F4),))
    except InvalidArgument:
        assert not fits
    else:
        assert fits


def test_outputs_are_chosen_by_name():
    assert BATCHED.output_indexes([]) is None
    assert BATCHED.output_indexes(["z", "y"]) == (1, 0)
    with pytest.raises(InvalidArgument, match="output 'q' is unknown; this model has 'y', 'z'"):
        BATCHED.output_indexes(["q"])
