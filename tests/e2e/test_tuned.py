"""A latency target over real sockets: what was chosen for it is shown, and answers keep to it."""

from __future__ import annotations

import json
import random
import re
import time

import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer

from forno.v1 import predictor_pb2, predictor_pb2_grpc, rest_pb2, rest_pb2_grpc, tensors

RUN_MS, ROW_MS, TARGET_MS = 2, 3, 50
MOST_ROWS = (TARGET_MS / 2 - RUN_MS) / ROW_MS  # two runs of so many fit into the target
CALLS_PER_S, SECONDS = 100, 2
ENGINE = f'engine: "null", "null": {{delay_us: {RUN_MS * 1000}, row_delay_us: {ROW_MS * 1000}, shape: [-1, 2]}}'
CONFIG = f"""
models:
  aimed: {{{ENGINE}, batching: {{latency_target_ms: {TARGET_MS}}}}}
  plain: {{{ENGINE}}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("tuned") / "forno.yaml"
    file.write_text(CONFIG)
    with FornoServer(file) as running:
        yield running


def call(server, model):
    x = tensors.encode("x", np.ones((1, 2), np.float32))
    stub = predictor_pb2_grpc.PredictorStub(server.channel)
    return stub.Predict.future(predictor_pb2.PredictRequest(model=model, inputs=[x]), timeout=10)


def batching(server, model):
    return json.loads(server.http("GET", f"/v1/models/{model}").body)["batching"]


def test_what_was_chosen_is_shown_in_the_description_and_in_the_metrics(server):
    aimed, plain = batching(server, "aimed"), batching(server, "plain")
    assert aimed["latency_target_ms"] == TARGET_MS
    assert plain["latency_target_ms"] == 0
    assert 1 < aimed["tuned_rows"] <= MOST_ROWS < plain["tuned_rows"] <= plain["max_rows"] == aimed["max_rows"] == 32
    page = rest_pb2_grpc.RestStub(server.channel).Metrics(rest_pb2.MetricsRequest(), timeout=10).data.decode()
    limits = dict(re.findall(r'^forno_batch_rows_limit\{model="(\w+)"[^}]*\} (\d+)', page, re.MULTILINE))
    assert limits == {"aimed": str(aimed["tuned_rows"]), "plain": str(plain["tuned_rows"])}


def test_runs_are_no_larger_than_the_target_allows(server):
    largest = {}
    for model in ("aimed", "plain"):
        calls = [call(server, model) for _ in range(24)]
        largest[model] = max(each.result().timings.batch_rows for each in calls)
    assert largest["aimed"] <= MOST_ROWS < largest["plain"]


def test_calls_at_random_are_answered_within_the_target(server):
    source, calls = random.Random(1), []
    due_s = time.monotonic()
    end_s = due_s + SECONDS
    while due_s < end_s:
        due_s += source.expovariate(CALLS_PER_S)
        time.sleep(max(0.0, due_s - time.monotonic()))
        calls.append(call(server, "aimed"))
    timings = [each.result().timings for each in calls]
    in_time = sum(each.queue_us + each.compute_us <= TARGET_MS * 1000 for each in timings)
    assert in_time >= 0.95 * len(calls)
