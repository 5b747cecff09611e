"""The response cache as callers see it: over gRPC, REST, streams and endpoints."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer
from tests.unit import onnx_models

from forno.v1 import predictor_pb2, predictor_pb2_grpc, rest_pb2, rest_pb2_grpc, tensors

RUN_S = 0.15
CONFIG = """
models:
  kept:
    engine: "null"
    "null": {delay_us: 150000, shape: [-1, 2]}
    cache: {max_bytes: 65536, ttl_s: 600}
endpoints:
  ask: {model: kept}
"""


@pytest.fixture(scope="module", params=["envoy", "grpc"])
def server(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("kept") / "forno.yaml"
    file.write_text(CONFIG)
    with FornoServer(file, transport=request.param) as running:
        yield running


def predict(number, **more):
    x = tensors.encode("x", np.full((1, 2), number, np.float32))
    return predictor_pb2.PredictRequest(model="kept", inputs=[x], **more)


def stub(server):
    return predictor_pb2_grpc.PredictorStub(server.channel)


def cached(server):
    """What the server has counted: hit, miss, joined, entries."""
    page = rest_pb2_grpc.RestStub(server.channel).Metrics(rest_pb2.MetricsRequest(), timeout=10).data.decode()
    counts = dict(re.findall(r'^forno_cache_requests_total\{.*result="(\w+)"\} (\d+)', page, re.MULTILINE))
    entries = re.search(r"^forno_cache_entries\{.*\} (\S+)", page, re.MULTILINE)
    return [int(counts[name]) for name in ("hit", "miss", "joined")] + [int(float(entries.group(1)))]


def since(server, before):
    return [now - then for now, then in zip(cached(server), before, strict=True)]


def test_equal_calls_share_a_run_and_later_ones_its_answer(server):
    before = cached(server)
    ids = [f"caller {index}" for index in range(8)]
    with ThreadPoolExecutor(len(ids)) as pool:
        began = time.monotonic()
        calls = pool.map(lambda name: stub(server).Predict(predict(1, request_id=name), timeout=10), ids)
        answers = list(calls)
        took_s = time.monotonic() - began
    assert [answer.request_id for answer in answers] == ids
    assert {answer.outputs[0].data for answer in answers} == {np.full((1, 2), 1, np.float32).tobytes()}
    assert {answer.timings.batch_rows for answer in answers} == {1}
    assert took_s < 2 * RUN_S
    assert since(server, before) == [0, 1, 7, 1]
    again = stub(server).Predict(predict(1, request_id="later"), timeout=10)
    assert (again.request_id, again.outputs[0].data) == ("later", answers[0].outputs[0].data)
    assert (again.timings.queue_us, again.timings.compute_us, again.timings.batch_rows) == (0, 0, 0)
    assert since(server, before) == [1, 1, 7, 1]


def test_every_way_in_meets_the_same_answers(server):
    stub(server).Predict(predict(2), timeout=10)
    before = cached(server)
    typed = predictor_pb2.PredictRequest(model="kept", outputs=["y"])
    typed.inputs.add(name="x", shape=[1, 2]).floats.values.extend([2, 2])
    assert tensors.decode(stub(server).Predict(typed, timeout=10).outputs[0]).tolist() == [[2, 2]]
    stream = stub(server).PredictStream(
        iter([predictor_pb2.PredictStreamRequest(request=predict(2, request_id=name)) for name in "abc"]), timeout=10
    )
    assert sorted(item.response.request_id for item in stream) == ["a", "b", "c"]
    body = {"instances": [[2, 2]]}
    invoke = predictor_pb2.InvokeRequest(endpoint="ask")
    invoke.body.content_type, invoke.body.data = "application/json", json.dumps(body).encode()
    answer = stub(server).Invoke(invoke, timeout=10)
    assert answer.timings.batch_rows == 0
    expected = 5
    if server.transport != "grpc":
        reply = server.http("POST", "/v1/models/kept:predict", json.dumps(body).encode())
        assert json.loads(reply.body)["predictions"] == [[2, 2]]
        expected += 1
    assert since(server, before) == [expected, 0, 0, 0]


def test_a_caller_who_leaves_takes_nobody_along(server):
    before = cached(server)
    first = stub(server).Predict.future(predict(3), timeout=10)
    time.sleep(RUN_S / 4)
    hasty = stub(server).Predict.future(predict(3), timeout=RUN_S / 4)
    patient = stub(server).Predict.future(predict(3), timeout=10)
    time.sleep(RUN_S / 8)
    first.cancel()
    assert patient.result().outputs[0].data == np.full((1, 2), 3, np.float32).tobytes()
    assert hasty.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert since(server, before) == [0, 1, 2, 1]


def test_a_model_that_draws_random_numbers_stops_the_start(tmp_path):
    (tmp_path / "dice" / "1").mkdir(parents=True)
    onnx_models.noisy(tmp_path / "dice" / "1" / "model.onnx")
    (tmp_path / "dice" / "model.yaml").write_text("cache: {max_bytes: 65536}\n")
    with (
        pytest.raises(AssertionError, match=r"model 'dice': cache\.max_bytes is 65536, but output 'y' differs"),
        FornoServer(tmp_path, transport="grpc"),
    ):
        pass
