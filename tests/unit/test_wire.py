"""Answers written by hand are what protobuf would write."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forno.server.request import Answer
from forno.server.servicers.predictor import encode_answer
from forno.server.servicers.wire import AnswerWriter, varint
from forno.server.signature import Signature, TensorSpec
from forno.v1 import predictor_pb2, tensors

DTYPES = [tensors.dtype_of(row.number) for row in tensors.TABLE if row.name not in {"string", "bfloat16"}]
NUMBERS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4).map(
    lambda words: np.array(words, object)
)
MICROSECONDS = st.integers(0, 2**40)


def model_of(outputs, name="m", version="1"):
    specs = tuple(TensorSpec(f"out{i}", output.dtype, (-1,) * output.ndim) for i, output in enumerate(outputs))
    return SimpleNamespace(name=name, version=version, signature=Signature((), specs, batched=False))


def joined(parts):
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


@given(
    outputs=st.lists(NUMBERS | TEXTS, min_size=1, max_size=3),
    queue_us=MICROSECONDS,
    compute_us=MICROSECONDS,
    rows=st.integers(0, 2**31 - 1),
    request_id=st.text(st.characters(max_codepoint=127), max_size=128),
    version=st.sampled_from(["", "1", "2026-11-22"]),
)
def test_equals_protobufs_own_bytes(outputs, queue_us, compute_us, rows, request_id, version):
    model = model_of(outputs, version=version)
    answer = Answer(outputs, queue_us, compute_us, rows)
    writer = AnswerWriter(model.name, model.version, list(enumerate(model.signature.outputs)))
    expected = encode_answer(model, answer, None, request_id).SerializeToString()
    for _ in range(2):  # the second time from what it has kept
        *parts, timings = writer.parts(answer)
        identity = predictor_pb2.PredictResponse(request_id=request_id).SerializeToString()  # the transport's to add
        assert joined([*parts, identity, timings]) == expected


def test_outputs_may_be_views_with_gaps():
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    outputs = [whole[:, ::2]]
    model = model_of(outputs)
    writer = AnswerWriter("m", "1", list(enumerate(model.signature.outputs)))
    response = predictor_pb2.PredictResponse.FromString(joined(writer.parts(Answer(outputs, 1, 2, 3))))
    assert (tensors.decode(response.outputs[0]) == whole[:, ::2]).all()


@given(st.integers(0, 2**63 - 1))
def test_varints_are_protobufs(number):
    assert predictor_pb2.Timings.FromString(b"\x08" + varint(number)).queue_us == number
