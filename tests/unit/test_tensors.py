"""Tensors between NumPy and the wire."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from forno.v1 import tensor_pb2 as pb
from forno.v1 import tensors

NUMERIC = [row.name for row in tensors.TABLE if row.name != "string"]
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any bits of any element type but strings."""
    dtype = tensors.dtype_named(draw(st.sampled_from(NUMERIC)))
    shape = draw(shapes)
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


def test_every_element_type_has_one_row_and_one_dtype():
    numbers = {value.number for value in pb.DataType.DESCRIPTOR.values} - {pb.DATA_TYPE_UNSPECIFIED}
    assert {row.number for row in tensors.TABLE} == numbers
    for row in tensors.TABLE:
        dtype = tensors.dtype_of(row.number)
        assert tensors.number_of(dtype) == row.number
        assert tensors.name_of(dtype) == row.name
        assert tensors.dtype_named(row.name) is tensors.dtype_named(row.name) or dtype.name == "bfloat16"


@pytest.mark.parametrize("number", [0, 99, -1])
def test_other_numbers_are_no_element_types(number):
    with pytest.raises(KeyError):
        tensors.dtype_of(number)


@pytest.mark.parametrize("dtype", ["c8", ">f4", "M8[s]"])
def test_other_dtypes_have_no_number(dtype):
    with pytest.raises(KeyError):
        tensors.number_of(np.dtype(dtype))


@given(arrays())
def test_raw_data_comes_back_bit_by_bit(array):
    tensor = tensors.encode("x", array)
    back = tensors.decode(pb.Tensor.FromString(tensor.SerializeToString()))
    assert (tensor.name, back.dtype, back.shape) == ("x", array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(arrays())
def test_typed_values_come_back(array):
    with np.errstate(invalid="ignore"):  # bfloat16 tells of a NaN in a comparison
        array = np.where(array == array, array, np.zeros((), array.dtype)).astype(array.dtype)  # noqa: PLR0124  (NaN has many forms)
    back = tensors.decode(tensors.encode_typed("x", array), array.dtype, array.shape)
    np.testing.assert_array_equal(back, array, strict=True)


@given(npst.arrays(object, shapes, elements=st.text() | st.binary(max_size=5)))
def test_strings_come_back_as_text_where_they_are_text(array):
    def as_text(value: str | bytes) -> str | bytes:
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return value

    back = tensors.decode(tensors.encode("x", array))
    assert back.shape == array.shape
    assert back.ravel().tolist() == [as_text(value) for value in array.ravel().tolist()]


def test_views_of_any_memory_order_are_encoded_in_row_major_order():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert tensors.encode("x", array.T).data == np.ascontiguousarray(array.T).tobytes()


def test_the_signature_decides_what_typed_values_leave_open():
    tensor = pb.Tensor(ints=pb.IntValues(values=[1, 2, 3, 4]))
    assert tensors.decode(tensor, np.dtype("i2"), (-1, 2)).tolist() == [[1, 2], [3, 4]]
    assert tensors.decode(tensor, np.dtype("i2"), (2, 2)).dtype == np.int16
    assert tensors.decode(tensor, np.dtype("i8")).shape == (4,)
    assert tensors.decode(pb.Tensor(ints=pb.IntValues(values=[7])), np.dtype("i4"), ()).shape == ()


@pytest.mark.parametrize(
    ("tensor", "dtype", "text"),
    [
        (pb.Tensor(), "f4", "has no contents"),
        (pb.Tensor(data=b"1234", shape=[1]), "f4", "data_type is DATA_TYPE_UNSPECIFIED; raw data needs one"),
        (pb.Tensor(data=b"12", data_type=98), "f4", "data_type is 98"),
        (pb.Tensor(data=b"123", data_type=pb.DATA_TYPE_FLOAT32, shape=[1]), "f4", "holds 3 bytes.* needs 4"),
        (pb.Tensor(data=b"", data_type=pb.DATA_TYPE_FLOAT32, shape=[-1]), "f4", "negative dimension"),
        (pb.Tensor(data=b"\0\2", data_type=pb.DATA_TYPE_BOOL, shape=[2]), "?", "neither 0 nor 1"),
        (pb.Tensor(floats=pb.FloatValues(values=[1])), "i4", "floats given, but int32 elements go into `ints`"),
        (pb.Tensor(floats=pb.FloatValues(values=[1]), shape=[2]), "f4", r"holds 1 values, but shape \[2\] needs 2"),
        (pb.Tensor(floats=pb.FloatValues(values=[1]), data_type=98), "f4", "data_type 98 is unknown"),
        (pb.Tensor(floats=pb.FloatValues(values=[1e9])), "f2", "reach to 1000000000.0, which float16 cannot hold"),
        (pb.Tensor(ints=pb.IntValues(values=[-129, 5])), "i1", "reach from -129 to 5, but int8 holds -128 to 127"),
        (pb.Tensor(uints=pb.UintValues(values=[256])), "u1", "uint8 holds 0 to 255"),
        (pb.Tensor(strings=pb.StringValues(values=["a"])), "f4", "strings given"),
        (pb.Tensor(data=b"\1\0\0\0", data_type=pb.DATA_TYPE_STRING, shape=[1]), "O", "says 1 bytes, but 0 are left"),
        (pb.Tensor(data=b"\0\0\0\0!", data_type=pb.DATA_TYPE_STRING, shape=[1]), "O", "1 bytes are left over"),
        (pb.Tensor(data=b"\0\0\0\0", data_type=pb.DATA_TYPE_STRING, shape=[9]), "O", "too few for 9 strings"),
    ],
)
def test_what_contradicts_itself_says_how(tensor, dtype, text):
    with pytest.raises(ValueError, match=text):
        tensors.decode(tensor, np.dtype(dtype), (-1,))


def test_a_value_too_large_for_bfloat16_is_refused_and_infinity_is_not():
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 cannot hold"):
        tensors.decode(pb.Tensor(floats=pb.FloatValues(values=[3.4e38])), bfloat16)
    assert np.isinf(tensors.decode(pb.Tensor(floats=pb.FloatValues(values=[float("inf")])), bfloat16)).all()


def test_a_shape_that_values_do_not_decide_is_asked_for():
    tensor = pb.Tensor(floats=pb.FloatValues(values=[1, 2, 3]))
    for shape in ((-1, -1), (-1, 2), (-1, 0)):
        with pytest.raises(ValueError, match="shape is missing, and 3 values do not decide it"):
            tensors.decode(tensor, np.dtype("f4"), shape)
    with pytest.raises(ValueError, match="data_type is missing and no signature decides it"):
        tensors.decode(tensor)


@given(st.binary(max_size=60), st.integers(0, 20), st.lists(st.integers(-2, 5), max_size=3))
def test_random_bytes_are_decoded_or_refused(data, number, shape):
    tensor = pb.Tensor(data=data, data_type=number, shape=shape)  # type: ignore[arg-type]
    try:
        array = tensors.decode(tensor)
    except ValueError:
        return
    assert array.shape == tuple(shape)
