"""The Rest service on real models, without sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import os

import grpc
import numpy as np
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from tests.unit.calls import Aborted, CallContext, loaded, registry_of, spam_model, sums_model

from forno.server.config import Config, EndpointSettings, ModelSettings
from forno.server.endpoints import build, json_body, json_inputs, json_outputs
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.servicers.rest import RestServicer
from forno.v1 import predictor_pb2, rest_pb2

CODE = grpc.StatusCode


class Rest:
    """A Rest servicer over models, and the outcome of calls: JSON, or code and message."""

    def __init__(self, *models, endpoints=None):
        self.registry = registry_of(*models)
        config = Config(endpoints=endpoints or {})
        self.servicer = RestServicer(self.registry, build(config, self.registry), Metrics())

    async def predict(self, body, content_type="application/json", context=None, **path):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = rest_pb2.RestPredictRequest(body=HttpBody(content_type=content_type, data=data), **path)
        return await self.outcome(self.servicer.Predict, request, context)

    async def invoke(self, endpoint, body, content_type="application/json", context=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = rest_pb2.RestInvokeRequest(endpoint=endpoint, body=HttpBody(content_type=content_type, data=data))
        return await self.outcome(self.servicer.Invoke, request, context)

    async def outcome(self, method, request, context=None):
        context = context or CallContext()
        try:
            body = await method(request, context)
        except Aborted:
            return context.code, context.message
        assert body.content_type == "application/json"
        return json.loads(body.data)


@pytest.fixture
async def rest(tmp_path):
    models = [
        await loaded("spam", spam_model(tmp_path / "spam.onnx")),
        await loaded("sums", sums_model(tmp_path / "sums.onnx")),
        await loaded("echo", shape=(-1, 3)),
    ]
    endpoints = {
        "spam/detect": EndpointSettings(
            model="spam", input={"codec": "text"}, output={"codec": "label", "labels": ["ham", "spam"]}
        )
    }
    yield Rest(*models, endpoints=endpoints)
    for model in models:
        await model.close(0)


class TestPredict:
    async def test_rows(self, rest):
        assert await rest.predict({"instances": [[1, 2, 3]]}, model="echo") == {"predictions": [[1, 2, 3]]}

    async def test_rows_of_several_inputs_and_outputs(self, rest):
        rows = [{"x": [1, 2], "k": 9007199254740993}, {"x": [0.5, 0], "k": -1}]
        assert await rest.predict({"instances": rows}, model="sums") == {
            "predictions": [
                {"total": 3.0, "label": 9007199254740993, "both": [1.0, 2.0]},
                {"total": 0.5, "label": -1, "both": [0.5, 0.0]},
            ]
        }

    async def test_columns_with_the_outputs_that_are_wanted(self, rest):
        body = {"inputs": {"x": [[1, 2]], "k": [3]}, "outputs": ["label", "total"]}
        assert await rest.predict(body, model="sums") == {"outputs": {"label": [3], "total": [3.0]}}

    async def test_native_with_the_model_in_the_body(self, rest):
        body = {
            "model": "echo",
            "version": "1",
            "request_id": "r",
            "inputs": [{"name": "x", "data": [1, 2, 3]}],
        }
        answer = await rest.predict(body)
        assert answer.pop("timings").keys() == {"queue_us", "compute_us", "batch_rows"}
        outputs = [{"name": "y", "data_type": "float32", "shape": [1, 3], "data": [[1, 2, 3]]}]
        assert answer == {"model": "echo", "version": "1", "request_id": "r", "outputs": outputs}

    @pytest.mark.parametrize(
        ("model", "tensor"),
        [
            ("echo", {"name": "x", "floats": {"values": [1, 2, 3]}}),
            ("echo", {"name": "x", "data_type": "DATA_TYPE_FLOAT32", "shape": [1, 3], "floats": {"values": [1, 2, 3]}}),
            ("echo", {"name": "x", "data_type": "DATA_TYPE_FLOAT32", "data": [1, 2, 3]}),
            ("spam", {"name": "text", "strings": {"values": ["buy"]}}),
            ("spam", {"name": "text", "shape": [1], "blobs": {"values": ["YnV5"]}}),
        ],
        ids=str,
    )
    async def test_tensors_as_the_grpc_message_has_them(self, rest, model, tensor):
        body = {"model": model, "inputs": [tensor]}
        message = json_format.ParseDict(body, predictor_pb2.PredictRequest()) if "data" not in tensor else None
        assert message is None or message.inputs[0].WhichOneof("contents") in tensor
        [first, *_] = (await rest.predict(body))["outputs"]
        assert np.allclose(first["data"], [[1, 2, 3]] if model == "echo" else [[0.03, 0.97]])

    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            ({"doubles": {"values": [1, 2, 3]}}, ["`floats`", "float32"]),
            ({"floats": [1, 2, 3]}, ["a list", '{"values": [...]}']),
            ({"floats": {"value": [1, 2, 3]}}, ["an object", '{"values": [...]}']),
            ({"floats": {"values": [1, 2, "a"]}}, ["floats[2]"]),
            ({"floats": {"values": [1, 2, 3]}, "data": [1, 2, 3]}, ["exactly one"]),
            ({"float": {"values": [1, 2, 3]}}, ["did you mean `floats`"]),
            ({"data_type": "DATA_TYPE_FLOAT64", "data": [1, 2, 3]}, ["DATA_TYPE_FLOAT64", "float32[?, 3]"]),
        ],
        ids=str,
    )
    async def test_tensors_that_the_grpc_message_would_not_have(self, rest, tensor, words):
        code, message = await rest.predict({"model": "echo", "inputs": [{"name": "x", **tensor}]})
        assert code is CODE.INVALID_ARGUMENT
        for word in words:
            assert word in message

    async def test_raw_bytes_of_the_only_input(self, rest):
        data = np.arange(6, dtype=np.float32).tobytes()
        answer = await rest.predict(data, "application/octet-stream", model="echo")
        assert answer["outputs"][0]["data"] == [[0, 1, 2], [3, 4, 5]]
        code, message = await rest.predict(data[:-1], "application/octet-stream", model="echo")
        assert code is CODE.INVALID_ARGUMENT
        assert "23 bytes" in message
        code, message = await rest.predict(data, "application/octet-stream", model="sums")
        assert "'x', 'k'" in message

    @pytest.mark.parametrize(
        "content_type", ["", "application/json; charset=utf-8", "application/x-www-form-urlencoded"]
    )
    async def test_what_curl_and_browsers_call_json(self, rest, content_type):
        assert "predictions" in await rest.predict({"instances": [[1, 2, 3]]}, content_type, model="echo")

    @pytest.mark.parametrize(
        ("body", "path", "code", "words"),
        [
            ({"instances": [[1, 2]]}, {"model": "echo"}, CODE.INVALID_ARGUMENT, ["[1, 2]", "float32[?, 3]"]),
            ({"instances": [1, 2]}, {"model": "echo"}, CODE.INVALID_ARGUMENT, ["rank"]),
            ({"instances": [[]]}, {"model": "echo"}, CODE.INVALID_ARGUMENT, ["[1, 0]"]),
            ({"inputs": {"x": [[1, 2]]}}, {"model": "sums"}, CODE.INVALID_ARGUMENT, ["'k' is missing"]),
            ({"inputs": [[1, 2, 3]], "outputs": ["z"]}, {"model": "echo"}, CODE.INVALID_ARGUMENT, ["'z'"]),
            ({"instances": [[1, 2, 3]]}, {"model": "ecco"}, CODE.NOT_FOUND, ["'echo'"]),
            ({"instances": [[1, 2, 3]]}, {"model": "echo", "version": "9"}, CODE.NOT_FOUND, ["'9'"]),
            ({"instances": [[1, 2, 3]]}, {}, CODE.INVALID_ARGUMENT, ["`model` is missing"]),
            (
                {"instances": [[1]], "model": "a"},
                {"model": "b"},
                CODE.INVALID_ARGUMENT,
                ["'a'", "path says 'b'"],
            ),
            (
                {"instances": [[1]], "label": "a"},
                {"model": "echo", "version": "1"},
                CODE.INVALID_ARGUMENT,
                ["version"],
            ),
            ({"instances": [[1]], "input": 1}, {"model": "echo"}, CODE.INVALID_ARGUMENT, ["`inputs`"]),
            (b"{", {"model": "echo"}, CODE.INVALID_ARGUMENT, ["not JSON", "byte"]),
            (gzip.compress(b"{}"), {"model": "echo"}, CODE.INVALID_ARGUMENT, ["gzip"]),
        ],
        ids=str,
    )
    async def test_refusals(self, rest, body, path, code, words):
        seen, message = await rest.predict(body, **path)
        assert seen is code, message
        for word in words:
            assert word in message

    async def test_a_long_call_lets_others_in_between_its_steps(self, monkeypatch):
        """Others come as bytes do, while a step holds the loop."""
        rest, steps = Rest(await loaded("wide", shape=(-1, 40_000))), []
        read, write = os.pipe()

        def noted(step, function):
            def noting(*args, **more):
                steps.append(step)
                os.write(write, b"x")
                return function(*args, **more)

            return noting

        asyncio.get_running_loop().add_reader(read, lambda: (os.read(read, 1), steps.append("others")))
        for module, step in (
            (json_body, "parse"),
            (json_inputs, "tensors_of"),
            (json_outputs, "document"),
            (json_outputs, "dumps"),
        ):
            monkeypatch.setattr(module, step, noted(step, getattr(module, step)))
        assert "predictions" in await rest.predict({"instances": [["NaN"] + [0.25] * 39_999] * 2}, model="wide")
        assert steps[:7] == ["parse", "others", "tensors_of", "others", "document", "others", "dumps"]
        asyncio.get_running_loop().remove_reader(read)
        os.close(read)
        os.close(write)

    async def test_another_content_type_says_which_are_read(self, rest):
        code, message = await rest.predict(b"<x/>", "application/xml", model="echo")
        assert code is CODE.INVALID_ARGUMENT
        assert "application/json" in message
        assert "application/octet-stream" in message

    async def test_the_query_cannot_choose_the_model(self, rest):
        context = CallContext(path="/v1/models/echo:predict?model=spam")
        code, _ = await rest.predict({"instances": [[1, 2, 3]]}, model="spam", context=context)
        assert code is CODE.INVALID_ARGUMENT

    async def test_a_deadline_that_has_passed(self, rest):
        code, _ = await rest.predict({"instances": [[1, 2, 3]]}, model="echo", context=CallContext(0.0))
        assert code is CODE.DEADLINE_EXCEEDED

    async def test_a_queue_timeout_bounds_the_wait(self):
        rest = Rest(await loaded("slow", shape=(1, 1), delay_us=50_000))
        body = {"inputs": [[1]]}
        first = asyncio.ensure_future(rest.predict(body, model="slow"))
        await asyncio.sleep(0.005)
        code, _ = await rest.predict(body | {"parameters": {"queue_timeout_ms": 1}}, model="slow")
        assert code is CODE.DEADLINE_EXCEEDED
        assert await first == {"outputs": [[1]]}

    async def test_a_cancelled_call_cancels_its_request(self):
        model = await loaded("slow", shape=(1, 1), delay_us=50_000)
        rest = Rest(model)
        calls = [asyncio.ensure_future(rest.predict({"inputs": [[1]]}, model="slow")) for _ in range(2)]
        await asyncio.sleep(0.005)
        calls[1].cancel()
        assert await calls[0] == {"outputs": [[1]]}
        assert calls[1].cancelled()


class TestInvoke:
    async def test_an_endpoint_answers(self, rest):
        assert await rest.invoke("spam/detect", {"text": "buy"}) == {"prediction": "spam", "confidence": 0.97}
        assert await rest.invoke("spam/detect", b"hello", "text/plain") == {
            "prediction": "ham",
            "confidence": 0.9,
        }

    async def test_refusals(self, rest):
        code, message = await rest.invoke("spam/detec", {"text": "buy"})
        assert code is CODE.NOT_FOUND
        assert "'spam/detect'" in message
        code, message = await rest.invoke("spam/detect", {"txt": "buy"})
        assert code is CODE.INVALID_ARGUMENT
        assert "`text`" in message
        context = CallContext(path="/v1/x?endpoint=spam/detect")
        code, _ = await rest.invoke("spam/detect", {"text": "buy"}, context=context)
        assert code is CODE.INVALID_ARGUMENT
        code, _ = await rest.invoke("spam/detect", {"text": "buy"}, context=CallContext(0.0))
        assert code is CODE.DEADLINE_EXCEEDED


class TestPages:
    async def test_health(self, rest):
        assert await rest.outcome(rest.servicer.Health, rest_pb2.HealthRequest()) == {"status": "ok"}

    async def test_ready(self, rest):
        assert await rest.outcome(rest.servicer.Ready, rest_pb2.ReadyRequest()) == {
            "ready": True,
            "models": {"echo": {"1": "ready"}, "spam": {"1": "ready"}, "sums": {"1": "ready"}},
        }

    async def test_not_ready_names_what_is_not(self, rest):
        rest.registry.add(Model("late", "2", None, ModelSettings(engine="null"), Metrics().model("late", "2")))
        code, message = await rest.outcome(rest.servicer.Ready, rest_pb2.ReadyRequest())
        assert code is CODE.UNAVAILABLE
        assert message == "not ready: late 2 is loading"

    async def test_metrics(self, rest):
        body = await rest.servicer.Metrics(rest_pb2.MetricsRequest(), CallContext())
        assert body.content_type == "text/plain; version=0.0.4; charset=utf-8"
        assert b"# TYPE" in body.data
