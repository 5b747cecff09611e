"""The native splitter of JSON bodies against the ordinary reader: it may give up, but never disagree."""

from __future__ import annotations

import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiling import needs_compiler
from tests.e2e.json_splitter import HEAD, compiled

MARK = "\0"

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def split(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("json_split"))


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-1e4, 1e4, width=32).map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-9, 9).map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,21})(\.[0-9]{1,21})?([eE][+-]?[0-9]{1,3})?", fullmatch=True).filter(str.isascii),
    st.sampled_from(["-0", "-0.0", "0e5", "1E5", "1e-400", "01", "1.", ".5", "+1", "-", "1e", "0x1", "1_0", "NaN"]),
)
SPACES = st.sampled_from(["", "", "", " ", "\n\t", " \r "])


@st.composite
def arrays(draw):
    """The text of nested lists: mostly full and of numbers."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    leaves = draw(st.lists(NUMBERS, min_size=1, max_size=3))

    def level(depth):
        if depth == len(shape):
            return draw(SPACES) + draw(st.sampled_from(leaves)) + draw(SPACES)
        size = shape[depth] + draw(st.sampled_from([0] * 30 + [1]))
        return "[" + ",".join(level(depth + 1) for _ in range(size)) + "]" + draw(SPACES)

    return level(0)


@st.composite
def bodies(draw):
    """The text of an object whose values are arrays, and other things."""
    others = st.sampled_from(['"text"', "7", "true", "null", "[]", "{}", '["y"]', '"a\\"b"', '{"shape":[1,2]}', '"é"'])
    keys = st.sampled_from(["instances", "inputs", "x", "shape", "data", "y", "\\u0000"])
    pairs = draw(st.lists(st.tuples(keys, st.one_of(arrays(), arrays(), others)), max_size=4))
    text = ",".join(f'{draw(SPACES)}"{key}"{draw(SPACES)}:{draw(SPACES)}{value}' for key, value in pairs)
    return f"{{{text}}}{draw(SPACES)}".encode()


def restored(value, numbers):
    """A key's value with its numbers back in their places."""
    if type(value) is dict:
        if MARK in value:
            count = math.prod(value[MARK])
            taken = [next(numbers) for _ in range(count)]
            return np.array(taken).reshape(value[MARK]).tolist()
        return {key: restored(item, numbers) for key, item in value.items()}
    return [restored(item, numbers) for item in value] if type(value) is list else value


def agrees(split, body, ends=()):
    """Whether the body was split; fails where the ordinary reader sees something else in it."""
    found = split(body, ends)
    if found is None:
        return False
    key, counts, numbers = found
    assert key.startswith(HEAD)
    try:
        orjson.loads(key[len(HEAD) :])
        value = json.loads(key[len(HEAD) :], object_pairs_hook=_without_repeats)
    except (ValueError, KeyError):
        return False  # which is when the ordinary reader decides
    doubles = np.frombuffer(numbers).tolist()
    assert len(doubles) == sum(counts)
    left = iter(doubles)
    assert repr(_floats(restored(value, left))) == repr(_floats(orjson.loads(body)))
    assert next(left, None) is None
    return True


def _without_repeats(pairs):
    if len(dict(pairs)) != len(pairs):
        raise KeyError
    return dict(pairs)


def _floats(value):
    """A value whose numbers are all floats, so that they can be compared by their digits."""
    match value:
        case dict():
            return {key: _floats(item) for key, item in value.items()}
        case list():
            return [_floats(item) for item in value]
        case bool() | str() | None:
            return value
        case _:
            return float(value)


@given(body=bodies(), ends=st.lists(st.integers(0, 200), max_size=6))
@settings(deadline=None, max_examples=400)
def test_what_is_split_is_what_the_reader_reads(split, body, ends):
    agrees(split, body, [end for end in ends if end <= len(body)])


@given(body=bodies(), at=st.integers(0, 300), byte=st.integers(0, 255), cut=st.booleans())
@settings(deadline=None, max_examples=400)
def test_damaged_bodies_are_never_read_as_something_else(split, body, at, byte, cut):
    at %= len(body)
    agrees(split, body[:at] + (b"" if cut else bytes([byte])) + body[at + 1 :])


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [[1, 2.5], [3e2, -4]]}',
        b'{"inputs":[{"name":"x","shape":[1,2],"data":[1,2]},{"name":"k","data":[[3]]}],"outputs":["y"]}',
        b'{"inputs": {"x": [0.1234567890123456789, 1e22, 1e23, 123456789012345678]}, "parameters": {"priority": 5}}',
    ],
)
def test_usual_bodies_are_split_wherever_they_are_cut(split, body):
    whole = split(body)
    assert agrees(split, body)
    for end in range(len(body)):
        assert split(body, [end]) == whole
    assert split(body, range(len(body))) == whole


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [[1, 2], [3]]}',
        b'{"instances": [[1, "NaN"]]}',
        b'{"instances": [1e39]}',
        b'{"instances": [01]}',
        b'{"instances": [1, true]}',
        b'{"instances": []}',
        b'{"\\u0000": [2], "instances": [1]}',
        b'{"instances": [' + b"9" * 5000 + b"]}",
        b'{"instances": ' + b" " * 5000 + b"[1]}",
        b"[" * 100_000,
        b"",
        b'{"instances": [1',
    ],
)
def test_what_is_unusual_is_left_to_the_reader(split, body):
    assert split(body) is None


def test_a_key_is_the_same_for_other_numbers_and_for_no_other_shape(split):
    key = split(b'{"instances": [[1, 2]]}')[0]
    assert split(b'{"instances": [[-1.5e3, 0]]}')[0] == key
    assert split(b'{"instances": [[1, 2, 3]]}')[0] != key
    assert split(b'{"instances": [1, 2]}')[0] != key
    shaped = [b'{"inputs":[{"name":"x","shape":[%d,%d],"data":[1,2]}]}' % shape for shape in ((1, 2), (2, 1))]
    assert split(shaped[0])[0] != split(shaped[1])[0]
