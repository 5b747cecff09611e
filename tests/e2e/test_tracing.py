"""A served call's spans, as a collector receives them."""

from __future__ import annotations

import json
from concurrent import futures

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import ROOT, FornoServer
from tests.e2e.hosts import eventually
from tests.e2e.test_otlp import SPAN, TRACE, TRACEPARENT, Collector, attributes

from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors


@pytest.fixture
def collector():
    server = grpc.server(futures.ThreadPoolExecutor(4))
    made = Collector(server)
    made.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made
    server.stop(None).wait()


@pytest.mark.parametrize("transport", ["envoy", "grpc"])
def test_the_stages_of_a_sampled_call_arrive(collector, transport, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds between exports
    endpoint = f"telemetry.otlp_endpoint=http://127.0.0.1:{collector.port}"
    interval = "telemetry.metrics_interval_s=0.2"
    with FornoServer(ROOT / "examples/forno.yaml", "--set", endpoint, "--set", interval, transport=transport) as server:
        stub = predictor_pb2_grpc.PredictorStub(server.channel)
        pixels = tensors.encode("pixels", np.zeros((2, 8, 8), np.float32))
        request = predictor_pb2.PredictRequest(model="digits", inputs=[pixels], request_id="r-7")
        stub.Predict(request, timeout=10)
        stub.Predict(request, timeout=10, metadata=[("traceparent", f"00-{TRACE}-{SPAN}-00")])
        stub.Predict(request, timeout=10, metadata=[("traceparent", TRACEPARENT)])
        eventually(lambda: "forno.v1.Predictor/Predict" in collector.spans(), 10)
        spans = collector.spans()
        call = spans["forno.v1.Predictor/Predict"]
        assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, SPAN)
        found = attributes(call)
        assert (found["forno.model"], found["forno.batch_rows"], found["forno.request_id"]) == ("digits", 2, "r-7")
        stages = [spans[name] for name in ("decode", "queue", "compute", "encode")]
        assert all(stage.parent_span_id == call.span_id for stage in stages)
        times = [t for stage in stages for t in (stage.start_time_unix_nano, stage.end_time_unix_nano)]
        assert times == sorted(times)
        assert len(call_spans(collector)) == 1, "unsampled calls leave no span"
        if transport == "envoy":
            body = json.dumps({"text": "hello"}).encode()
            server.http("POST", "/v1/spam/detect", body, {"traceparent": TRACEPARENT})
            eventually(lambda: "forno.v1.Rest/Invoke" in collector.spans(), 10)
            assert attributes(collector.spans()["forno.v1.Rest/Invoke"])["forno.model"] == "spam"
        eventually(lambda: "forno_request_seconds" in collector.metrics(), 10)


def call_spans(collector):
    return [
        span
        for request in collector.received
        for resource in getattr(request, "resource_spans", ())
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "forno.v1.Predictor/Predict"
    ]
