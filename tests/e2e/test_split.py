"""The native splitter against the ordinary parser: it may give up, but never disagree."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiling import NATIVE, needs_compiler, shared_library
from tests.e2e.forno_server import ROOT

from forno.server.servicers.hot import ITEM_LAYOUT, LAYOUT
from forno.v1 import predictor_pb2, tensor_pb2

SOURCES = ROOT / "server/forno/server/transport/envoy/native"
MAX_SPANS = 512

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def split(tmp_path_factory):
    library = tmp_path_factory.mktemp("split") / "split.so"
    shared_library(library, NATIVE / "split_c.cc", SOURCES / "split.cc", options=(f"-I{SOURCES}",))
    function = ctypes.CDLL(str(library)).split
    function.restype = ctypes.c_size_t

    def call(message: bytes, layout=LAYOUT):
        key, spans = ctypes.create_string_buffer(4096), (ctypes.c_uint64 * MAX_SPANS)()
        count, places = ctypes.c_size_t(), (ctypes.c_uint64 * 3)()
        size = function(
            message,
            ctypes.c_size_t(len(message)),
            (ctypes.c_uint32 * 8)(*layout),
            key,
            spans,
            ctypes.c_size_t(MAX_SPANS),
            ctypes.byref(count),
            places,
        )
        if not size:
            return None
        assert places[0] == spans[0]
        return key.raw[:size], list(spans[: count.value]), bytes(message[places[1] : places[1] + places[2]])

    return call


TENSORS = st.builds(
    tensor_pb2.Tensor,
    name=st.text(max_size=6),
    data_type=st.integers(0, 16),
    shape=st.lists(st.integers(-5, 300), max_size=4),
    data=st.binary(max_size=60),
)
REQUESTS = st.builds(
    predictor_pb2.PredictRequest,
    model=st.text(max_size=6),
    inputs=st.lists(TENSORS, max_size=4),
    outputs=st.lists(st.text(max_size=4), max_size=2),
    request_id=st.text(max_size=140),
)


def agrees(split, message: bytes) -> bool:
    """Whether the message was split; fails where the parser sees something else."""
    found = split(message)
    if found is None:
        return False
    _, spans, request_id = found
    try:
        request = predictor_pb2.PredictRequest.FromString(message)
    except DecodeError:
        return True  # the key's first request goes to the parser, which refuses it: there is never a plan
    assert len(spans) == 2 * len(request.inputs)
    for index, tensor in enumerate(request.inputs):
        at, size = spans[2 * index : 2 * index + 2]
        assert message[at : at + size] == tensor.data
        assert tensor.WhichOneof("contents") == "data"
    assert request_id == request.request_id.encode()
    return True


def distances(spans):
    """Places of all tensors' elements from those of the first, which is what a plan remembers."""
    return [at - spans[0] for at in spans[::2]], spans[1::2]


@given(REQUESTS)
@settings(max_examples=500)
def test_requests_are_split_where_the_parser_sees_elements(split, request):
    expected = bool(request.inputs) and len(request.request_id) <= 128 and request.request_id.isascii()
    expected = expected and all(tensor.WhichOneof("contents") == "data" for tensor in request.inputs)
    assert agrees(split, request.SerializeToString()) == expected


@given(REQUESTS, st.data())
@settings(max_examples=300)
def test_an_equal_key_means_an_equal_request_but_for_elements_and_id(split, request, data):
    before = split(request.SerializeToString())
    for tensor in request.inputs:
        tensor.data = data.draw(st.binary(min_size=len(tensor.data), max_size=len(tensor.data)))
    request.request_id = data.draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
    after = split(request.SerializeToString())
    if before is not None and after is not None:
        assert before[0] == after[0]
        assert distances(before[1]) == distances(after[1])
    for tensor in request.inputs:
        tensor.shape.append(7)
    changed = split(request.SerializeToString())
    if before is not None and changed is not None:
        assert before[0] != changed[0]


@given(st.binary(max_size=200))
@settings(max_examples=1000)
def test_random_bytes_are_no_trouble(split, message):
    agrees(split, message)


@given(REQUESTS, st.data())
@settings(max_examples=1000)
def test_damaged_requests_are_no_trouble(split, request, data):
    message = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        if message:
            at = data.draw(st.integers(0, len(message) - 1))
            kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
            if kind == "flip":
                message[at] ^= data.draw(st.integers(1, 255))
            elif kind == "cut":
                del message[at:]
            elif kind == "insert":
                message[at:at] = data.draw(st.binary(max_size=6))
            else:
                message += message[at:]
    agrees(split, bytes(message))


@given(REQUESTS, st.binary(max_size=12))
@settings(max_examples=500)
def test_an_item_of_a_stream_is_split_as_its_request(split, request, more):
    message = request.SerializeToString()
    item = predictor_pb2.PredictStreamRequest(request=request).SerializeToString()
    alone, inside = split(message), split(item, ITEM_LAYOUT)
    assert (alone is None) == (inside is None)
    if inside is not None:
        assert (inside[0], distances(inside[1]), inside[2]) == (alone[0], distances(alone[1]), alone[2])
        assert item[inside[1][0] :][: inside[1][1]] == request.inputs[0].data
    if more:  # an item that is more than one request is nobody's to cut
        assert split(item + more, ITEM_LAYOUT) is None


@given(
    st.lists(st.sampled_from(["id", "tensor"]), min_size=1, max_size=4),
    st.text(st.characters(codec="ascii"), max_size=9),
)
def test_an_id_between_tensors_is_not_split(split, order, identity):
    parts = {
        "id": predictor_pb2.PredictRequest(request_id=identity + "."),
        "tensor": predictor_pb2.PredictRequest(inputs=[tensor_pb2.Tensor(name="x", data=b"1234")]),
    }
    found = split(b"".join(parts[part].SerializeToString() for part in order))
    between = (
        order.count("id") == 1 and "tensor" in order[: order.index("id")] and "tensor" in order[order.index("id") :]
    )
    assert (found is not None) == ("tensor" in order and order.count("id") <= 1 and not between)


def test_a_large_tensor_is_found(split):
    request = predictor_pb2.PredictRequest(model="m", request_id="r")
    elements = np.arange(1_000_000, dtype=np.float32).tobytes()
    request.inputs.add(name="x", data_type=12, shape=[1_000_000], data=elements)
    assert agrees(split, request.SerializeToString())
