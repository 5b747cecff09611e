"""Random and damaged request bytes: each gets a status, and the server goes on serving."""

from __future__ import annotations

import grpc
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

PREDICT = "/forno.v1.Predictor/Predict"
REFUSALS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
GOOD = predictor_pb2.PredictRequest(
    model="add", inputs=[tensors.encode(name, np.ones((1, 3), np.float32)) for name in ("a", "b")]
)


@st.composite
def damaged(draw) -> bytes:
    """A good request, cut off or with some bytes changed."""
    message = bytearray(GOOD.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        message[draw(st.integers(0, len(message) - 1))] = draw(st.integers(0, 255))
    return bytes(message[: draw(st.integers(0, len(message)))])


@given(message=st.binary(max_size=300) | damaged())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_get_a_status_and_harm_nobody(server, message):
    code = server.channel.unary_unary(PREDICT).future(message, timeout=10).code()
    assert code in {grpc.StatusCode.OK, *REFUSALS}
    answer = predictor_pb2_grpc.PredictorStub(server.channel).Predict(GOOD, timeout=10)
    assert tensors.decode(answer.outputs[0]).tolist() == [[12, 12, 12]]
