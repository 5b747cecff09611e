"""Predict, PredictStream, Invoke and the descriptions, as gRPC callers see them on every transport."""

from __future__ import annotations

import re
import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tests.e2e.forno_server import ROOT

from forno.v1 import model_pb2, predictor_pb2, predictor_pb2_grpc, tensor_pb2, tensors


def stub(server):
    return predictor_pb2_grpc.PredictorStub(server.channel)


def request(model, inputs, **more):
    encoded = [tensors.encode(name, np.asarray(array)) for name, array in inputs.items()]
    return predictor_pb2.PredictRequest(model=model, inputs=encoded, **more)


def row(*values):
    return np.array([values], np.float32)


def output(response, index=0):
    return tensors.decode(response.outputs[index])


def add(a=1.0, b=2.0, **more):
    return request("add", {"a": row(a, a, a), "b": row(b, b, b)}, **more)


def refused(call, *args, **more):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, timeout=10, **more)
    return caught.value.code(), caught.value.details(), caught.value


def test_answers_with_the_newest_version(server):
    response = stub(server).Predict(add(request_id="r1"), timeout=10)
    assert output(response).tolist() == [[13, 13, 13]]
    assert (response.model, response.version, response.request_id) == ("add", "2", "r1")
    assert response.timings.batch_rows >= 1
    assert response.timings.compute_us >= 0


@pytest.mark.parametrize(
    ("selector", "expected"), [({"version": "1"}, 3), ({"label": "old"}, 3), ({"version": "2"}, 13)]
)
def test_version_and_label_choose_who_answers(server, selector, expected):
    assert output(stub(server).Predict(add(**selector), timeout=10)).tolist() == [[expected] * 3]


def test_typed_values_need_neither_type_nor_shape(server):
    typed = predictor_pb2.PredictRequest(model="add")
    for name in ("a", "b"):
        typed.inputs.add(name=name).floats.values.extend([1, 2, 3, 4, 5, 6])
    assert output(stub(server).Predict(typed, timeout=10)).tolist() == [[12, 14, 16], [18, 20, 22]]


def test_an_unknown_input_is_told_with_those_there_are(server):
    misspelt = add()
    misspelt.inputs.add(name="aa").floats.values.extend([1, 2, 3])  # neither type nor shape, as by hand
    code, details, _ = refused(stub(server).Predict, misspelt)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "input 'aa' is unknown; this model takes 'a', 'b'")


def test_outputs_are_filtered_in_the_order_asked_for(server):
    pixels = np.zeros((1, 8, 8), np.float32)
    response = stub(server).Predict(
        request("digits", {"pixels": pixels}, outputs=["label", "probabilities"]), timeout=10
    )
    assert [tensor.name for tensor in response.outputs] == ["label", "probabilities"]
    response = stub(server).Predict(request("digits", {"pixels": pixels}, outputs=["label"]), timeout=10)
    assert [tensor.name for tensor in response.outputs] == ["label"]


def test_strings_arrive_unchanged(server):
    words = np.array(["", "brød", "🍞" * 1000, "a\x00b"], object)
    assert output(stub(server).Predict(request("words", {"x": words}), timeout=10)).tolist() == words.tolist()


def test_a_model_without_a_batch_axis_is_served_alone(server):
    response = stub(server).Predict(request("fixed", {"x": np.eye(2, dtype=np.float32)}), timeout=10)
    assert output(response).tolist() == [[2, 0], [0, 2]]
    assert not stub(server).GetModel(predictor_pb2.GetModelRequest(model="fixed"), timeout=10).batching.enabled


def test_a_first_axis_that_does_not_count_rows_is_found_out(server):
    assert not stub(server).GetModel(predictor_pb2.GetModelRequest(model="mean"), timeout=10).batching.enabled
    calls = [stub(server).Predict.future(request("mean", {"x": row(i, -i)}), timeout=10) for i in range(50)]
    assert all(output(call.result()).tolist() == [[0, 0]] for call in calls)


def test_concurrent_callers_each_get_their_own_answer(server):
    calls = [stub(server).Predict.future(add(i, 0.5), timeout=20) for i in range(500)]
    assert [output(call.result())[0, 0] for call in calls] == [i + 10.5 for i in range(500)]


REPEATED = {
    "add": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2, 3), np.float32)},
    "fixed": {"x": np.eye(2, dtype=np.float32)},
    "whole": {"x": np.arange(8, dtype=np.int64).reshape(2, 4)},
    "words": {"x": np.array(["a", "b"], object)},
    "mean": {"x": np.arange(4, dtype=np.float32).reshape(2, 2)},
    "pick": {"x": np.array([3, 1, 4])},
    "digits": {"pixels": np.ones((3, 8, 8), np.float32)},
}


@pytest.mark.parametrize("model", REPEATED)
def test_calls_that_repeat_are_answered_alike(server, model):
    """From the second call on they take a shorter way inside Envoy."""
    answers = [stub(server).Predict(request(model, REPEATED[model], request_id=f"r{i}"), timeout=10) for i in range(5)]
    assert [answer.request_id for answer in answers] == [f"r{i}" for i in range(5)]
    assert {(answer.model, answer.version, answer.timings.batch_rows > 0) for answer in answers} == {
        (model, answers[0].version, True)
    }
    for answer in answers[1:]:
        for first, later in zip(answers[0].outputs, answer.outputs, strict=True):
            assert (first.name, first.data_type, first.shape) == (later.name, later.data_type, later.shape)
            assert (tensors.decode(first) == tensors.decode(later)).all()


def test_each_repeated_call_gets_the_answer_to_its_own_elements(server):
    x = np.arange(4, dtype=np.int64).reshape(1, 4)
    calls = [stub(server).Predict.future(request("whole", {"x": x + i}), timeout=20) for i in range(300)]
    assert all((output(call.result()) == x + i + 1).all() for i, call in enumerate(calls))


def test_a_repeated_call_fails_as_the_first_did(server):
    good, bad = np.array([1, 2]), np.array([1, 99])
    for _ in range(3):
        assert output(stub(server).Predict(request("pick", {"x": good}), timeout=10)).tolist() == [1, 2]
    code, details, error = refused(stub(server).Predict, request("pick", {"x": bad}))
    assert code is grpc.StatusCode.INTERNAL
    assert re.search(r"\b[0-9a-f]{8}\b", details), details
    assert rpc_status.from_call(error).details
    hurried = request("slow", {"x": row(1, 2)})
    stub(server).Predict(hurried, timeout=5)
    waiting = [stub(server).Predict.future(hurried, timeout=5) for _ in range(3)]
    assert refused_soon(server, hurried) is grpc.StatusCode.RESOURCE_EXHAUSTED  # it could not be in time
    assert all(output(call.result()).tolist() == [[1, 2]] for call in waiting)


def refused_soon(server, made):
    with pytest.raises(grpc.RpcError) as caught:
        stub(server).Predict(made, timeout=0.05)
    return caught.value.code()


def test_requests_share_batches(server):
    responses = []

    def call():
        responses.append(stub(server).Predict(request("slow", {"x": row(1, 2)}), timeout=20))

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(response.timings.batch_rows for response in responses) > 1
    assert all(response.timings.compute_us >= 300_000 for response in responses)


def test_a_stream_answers_each_request_and_errors_leave_it_open(server):
    def items():
        for i in range(30):
            item = add(i, 0, request_id=str(i))
            if i % 10 == 3:
                item.model = "nobody"
            yield predictor_pb2.PredictStreamRequest(request=item)

    answers = {answer.request_id: answer for answer in stub(server).PredictStream(items(), timeout=20)}
    assert len(answers) == 30
    for i in range(30):
        if i % 10 == 3:
            assert answers[str(i)].error.code == grpc.StatusCode.NOT_FOUND.value[0]
        else:
            assert output(answers[str(i)].response)[0, 0] == i + 10


def test_a_stream_answers_while_it_is_still_being_sent(server):
    more = threading.Event()

    def items():
        yield predictor_pb2.PredictStreamRequest(request=add(1, 1, request_id="first"))
        more.wait(10)
        yield predictor_pb2.PredictStreamRequest(request=add(2, 2, request_id="second"))

    answers = stub(server).PredictStream(items(), timeout=20)
    assert next(answers).request_id == "first"
    more.set()
    assert [answer.request_id for answer in answers] == ["second"]


def test_endpoints_take_values_and_documents(server):
    invoke = predictor_pb2.InvokeRequest(endpoint="spam/detect", request_id="x")
    invoke.value.struct_value["text"] = "WIN a FREE prize now!!! click here"
    response = stub(server).Invoke(invoke, timeout=10)
    assert response.output.struct_value["prediction"] == "spam"
    assert (response.model, response.version, response.request_id) == ("spam", "1", "x")
    image = (ROOT / "examples/data/digit-3.png").read_bytes()
    invoke = predictor_pb2.InvokeRequest(endpoint="digits/classify")
    invoke.body.content_type, invoke.body.data = "image/png", image
    assert stub(server).Invoke(invoke, timeout=10).output.struct_value["prediction"] == "3"


def test_models_are_described(server):
    models = stub(server).ListModels(predictor_pb2.ListModelsRequest(), timeout=10).models
    names = [(model.name, model.version) for model in models]
    assert names == sorted(names, key=lambda pair: (pair[0], -int(pair[1])))
    assert ("add", "2") in names
    assert ("add", "1") in names
    one = stub(server).GetModel(predictor_pb2.GetModelRequest(model="add", label="old"), timeout=10)
    assert (one.version, list(one.labels), one.state) == ("1", ["old"], model_pb2.MODEL_STATE_READY)
    assert [(spec.name, spec.data_type, list(spec.shape)) for spec in one.inputs] == [
        ("a", tensor_pb2.DATA_TYPE_FLOAT32, [-1, 3]),
        ("b", tensor_pb2.DATA_TYPE_FLOAT32, [-1, 3]),
    ]
    assert one.batching.enabled
    assert stub(server).GetModel(predictor_pb2.GetModelRequest(model="spam"), timeout=10).endpoints == ["spam/detect"]


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(server):
    def call():
        return stub(server).Predict(request("slow", {"x": row(1, 2)}), timeout=5)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        stub(server).Predict(request("slow", {"x": row(3, 4)}), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert time.monotonic() - began < 0.1
    thread.join()


def test_a_queue_timeout_of_its_own_answers_deadline_exceeded(server):
    first = stub(server).Predict.future(request("slow", {"x": row(1, 2)}), timeout=5)
    time.sleep(0.05)
    hurried = request("slow", {"x": row(1, 2)})
    hurried.parameters.queue_timeout.FromMilliseconds(20)
    code, details, _ = refused(stub(server).Predict, hurried)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED, details
    first.result()


@pytest.mark.parametrize("rows", [33, 200, 4096])
def test_more_rows_than_one_run_takes_are_answered_as_one(server, rows):
    a, b = (np.random.default_rng(seed).standard_normal((rows, 3)).astype(np.float32) for seed in (1, 2))
    response = stub(server).Predict(request("add", {"a": a, "b": b}), timeout=20)
    np.testing.assert_allclose(output(response), a + b + 10, rtol=1e-6)
    assert response.timings.batch_rows <= 32


def test_health_and_reflection_are_there(server):
    health = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", "forno.v1.Predictor", "digits"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service="digits"), timeout=10)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = next(reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(iter([ask]), timeout=10))
    assert "forno.v1.Predictor" in [service.name for service in reply.list_services_response.service]


@pytest.mark.parametrize(
    ("symbol", "found"),
    [
        ("forno.v1.Predictor", True),
        ("forno.v1.Predictor.Predict", True),  # `grpcurl describe`
        ("forno.v1.PredictRequest.model", True),
        ("forno.v1.Predictor.Predic", False),
        ("Predict", False),
    ],
)
def test_reflection_finds_all_that_has_a_name(server, symbol, found):
    ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    reply = next(reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(iter([ask]), timeout=10))
    assert reply.WhichOneof("message_response") == ("file_descriptor_response" if found else "error_response")


def bad(change):
    made = add()
    change(made)
    return made


def _set(tensor, **fields):
    for name, value in fields.items():
        if name == "shape":
            del tensor.shape[:]
            tensor.shape.extend(value)
        else:
            setattr(tensor, name, value)


INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
BAD_REQUESTS = {
    "wrong dtype": (
        lambda r: _set(r.inputs[0], data_type=tensor_pb2.DATA_TYPE_INT32),
        INVALID,
        ["'a'", "int32", "float32"],
    ),
    "unknown dtype": (lambda r: _set(r.inputs[0], data_type=99), INVALID, ["'a'", "99"]),
    "no dtype": (lambda r: _set(r.inputs[0], data_type=0), INVALID, ["'a'", "data_type"]),
    "wrong rank": (lambda r: _set(r.inputs[0], shape=[3]), INVALID, ["'a'", "rank", "[3]"]),
    "wrong dim": (lambda r: _set(r.inputs[0], shape=[1, 4], data=bytes(16)), INVALID, ["'a'", "[1, 4]", "[?, 3]"]),
    "missing input": (lambda r: r.inputs.pop(), INVALID, ["'b'", "missing"]),
    "extra input": (
        lambda r: r.inputs.add(name="c", data_type=12, shape=[1, 3], data=bytes(12)),
        INVALID,
        ["'c'", "unknown"],
    ),
    "twice": (lambda r: r.inputs.append(r.inputs[0]), INVALID, ["'a'", "twice"]),
    "bytes do not match": (lambda r: _set(r.inputs[0], data=bytes(11)), INVALID, ["'a'", "11", "12"]),
    "no contents": (lambda r: r.inputs[0].ClearField("data"), INVALID, ["'a'", "contents"]),
    "negative dim": (lambda r: _set(r.inputs[0], shape=[-1, 3]), INVALID, ["'a'", "-1"]),
    "huge dims": (lambda r: _set(r.inputs[0], shape=[2**31 - 1] * 8), INVALID, ["'a'", "12"]),
    "empty batch": (lambda r: [_set(t, shape=[0, 3], data=b"") for t in r.inputs], INVALID, ["no rows"]),
    "rows differ": (lambda r: _set(r.inputs[1], shape=[2, 3], data=bytes(24)), INVALID, ["'b'", "2", "1"]),
    "unknown output": (lambda r: r.outputs.append("z"), INVALID, ["'z'", "'y'"]),
    "unknown model": (lambda r: setattr(r, "model", "ad"), NOT_FOUND, ["'ad'", "'add'"]),
    "no model": (lambda r: setattr(r, "model", ""), NOT_FOUND, ["''"]),
    "unknown version": (lambda r: setattr(r, "version", "7"), NOT_FOUND, ["'7'", "'2'"]),
    "unknown label": (lambda r: setattr(r, "label", "new"), NOT_FOUND, ["'new'"]),
    "too many rows": (
        lambda r: [_set(t, shape=[4097, 3], data=bytes(4097 * 12)) for t in r.inputs],
        INVALID,
        ["4097", "4096"],
    ),
    "long request id": (lambda r: setattr(r, "request_id", "x" * 200), INVALID, ["request_id", "200"]),
    "priority": (lambda r: setattr(r.parameters, "priority", 1000), INVALID, ["priority", "1000"]),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_told_what_is_wrong(server, name):
    change, expected_code, words = BAD_REQUESTS[name]
    code, details, error = refused(stub(server).Predict, bad(change))
    assert code is expected_code, details
    assert all(word in details for word in words), details
    status = rpc_status.from_call(error)
    kinds = [detail.TypeName() for detail in status.details]
    assert "google.rpc.ErrorInfo" in kinds
    if code is INVALID and name != "empty batch":
        violation = error_details_pb2.BadRequest()
        assert any(detail.Unpack(violation) for detail in status.details)
    assert output(stub(server).Predict(add(), timeout=10)).tolist() == [[13, 13, 13]]


def test_a_failed_run_says_so_and_fails_nobody_else(server):
    code, details, _ = refused(stub(server).Predict, request("pick", {"x": np.array([99])}))
    assert code is grpc.StatusCode.INTERNAL
    assert re.search(r"\b[0-9a-f]{8}\b", details), details
    assert "/" not in details, "paths of the server are nobody's business"
    assert output(stub(server).Predict(request("pick", {"x": np.array([7])}), timeout=10)).tolist() == [7]


def test_who_runs_together_with_a_request_that_fails_is_answered_all_the_same(server):
    for _ in range(20):
        asked = [np.array([index]) for index in (1, 99, 2, 3)]
        calls = [stub(server).Predict.future(request("pick", {"x": each}), timeout=10) for each in asked]
        assert [call.code() for call in calls].count(grpc.StatusCode.INTERNAL) == 1
        assert [output(calls[at].result()).tolist() for at in (0, 2, 3)] == [[1], [2], [3]]
        if "requests failed to run together" in server.output():
            return
    pytest.fail("they never ran together")


def test_overload_is_refused_at_once_with_a_hint(server):
    calls = [stub(server).Predict.future(request("narrow", {"x": row(1, 2)}), timeout=10) for _ in range(8)]
    outcomes = [call.exception() for call in calls]
    refusals = [error for error in outcomes if error is not None]
    assert 1 <= len(refusals) <= 7
    for error in refusals:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
        assert "max_pending_rows" in error.details()
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
        assert retry.retry_delay.ToMilliseconds() > 0


def test_an_unknown_endpoint_names_the_nearest(server):
    invoke = predictor_pb2.InvokeRequest(endpoint="spam/detekt")
    invoke.value.string_value = "x"
    code, details, _ = refused(stub(server).Invoke, invoke)
    assert code is NOT_FOUND
    assert "spam/detect" in details


def test_a_message_over_the_limit_is_refused_and_named(server):
    big = request("whole", {"x": np.zeros((1, 2_000_000), np.int64)})
    code, details, _ = refused(stub(server).Predict, big)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, details
    assert "8388608" in details


def test_a_message_below_the_limit_passes(server):
    x = np.arange(500_000, dtype=np.int64).reshape(1, -1)
    assert (output(stub(server).Predict(request("whole", {"x": x}), timeout=20)) == x + 1).all()
