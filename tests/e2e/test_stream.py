"""PredictStream under many clients: every answer is its own request's, whoever leaves, and nobody's memory grows."""

from __future__ import annotations

import queue
import random
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer

from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

TRANSPORTS = ("envoy", "grpc")
CONFIG = """
models:
  echo: {engine: "null", "null": {shape: [-1, 2]}}
  slow: {engine: "null", "null": {shape: [-1, 2], delay_us: 5000}, batching: {max_rows: 8}}
  wide: {engine: "null", "null": {shape: [-1, 4096]}}
"""
STREAMS = 24
ITEMS = 120


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("streams") / "forno.yaml"
    file.write_text(CONFIG)
    with FornoServer(file, transport=request.param) as running:
        yield running


def stub(server):
    return predictor_pb2_grpc.PredictorStub(server.channel)


def predict(model, x, request_id):
    return predictor_pb2.PredictRequest(model=model, inputs=[tensors.encode("x", x)], request_id=request_id)


def item(model, x, request_id=""):
    return predictor_pb2.PredictStreamRequest(request=predict(model, x, request_id))


def rows_of(stream, number):
    """One to three rows that nobody else sends."""
    return np.array([[stream, number * 4 + row] for row in range(1 + number % 3)], np.float32)


def one_client(server, stream, outcome):
    """Sends its items and checks each answer; some leave half-way."""
    chance = random.Random(stream)
    leaves_after = chance.randrange(1, ITEMS) if stream % 3 == 0 else ITEMS
    model = chance.choice(["echo", "slow"])

    def items():
        for number in range(ITEMS):
            name = "nobody" if number % 40 == 7 else model
            yield item(name, rows_of(stream, number), f"{stream}-{number}")

    try:
        answers = stub(server).PredictStream(items(), timeout=60)
        seen = set()
        for answer in answers:
            of, number = map(int, answer.request_id.split("-"))
            assert of == stream
            assert number not in seen
            seen.add(number)
            if number % 40 == 7:
                assert answer.error.code == grpc.StatusCode.NOT_FOUND.value[0]
            else:
                assert answer.response.request_id == answer.request_id
                got = tensors.decode(answer.response.outputs[0])
                assert got.tolist() == rows_of(stream, number).tolist()
            if len(seen) == leaves_after:
                answers.cancel()
                break
        assert len(seen) == leaves_after
        outcome.put(None)
    except BaseException as error:  # noqa: BLE001  (told to the test)
        outcome.put(error)


def test_each_answer_is_its_own_requests(server):
    outcome = queue.Queue()
    threads = [threading.Thread(target=one_client, args=(server, stream, outcome)) for stream in range(STREAMS)]
    for thread in threads:
        thread.start()
    unary = [
        stub(server).Predict.future(predict("echo", rows_of(1000, number), f"u{number}"), timeout=60)
        for number in range(300)
    ]
    for number, call in enumerate(unary):
        assert call.result().request_id == f"u{number}"
        assert tensors.decode(call.result().outputs[0]).tolist() == rows_of(1000, number).tolist()
    for thread in threads:
        thread.join()
    errors = [error for error in (outcome.get() for _ in threads) if error is not None]
    assert not errors, errors


def test_small_and_large_answers_of_one_stream_are_all_right(server):
    """Large ones leave at once, small ones at the end of the server's turn."""
    chance = random.Random(7)
    sent = {
        f"r{number}": np.full((chance.choice([1, 6]), 4096), number, np.float32)  # 16 or 96 KiB
        for number in range(120)
    }
    answered = {}
    for answer in stub(server).PredictStream(iter([item("wide", x, key) for key, x in sent.items()]), timeout=60):
        assert answer.request_id not in answered
        answered[answer.request_id] = tensors.decode(answer.response.outputs[0])
    assert answered.keys() == sent.keys()
    assert all(np.array_equal(answered[key], x) for key, x in sent.items())


def test_a_client_that_does_not_read_is_not_read_either(server):
    sent = 0

    def items():
        nonlocal sent
        for sent in range(1, 5001):
            yield item("wide", np.full((1, 4096), sent, np.float32), str(sent))

    answers = stub(server).PredictStream(items(), timeout=60)
    end, before = time.monotonic() + 20, -1
    while sent != before:  # until it stands still
        before = sent
        assert time.monotonic() < end, f"{sent} items have been taken, and nobody reads their answers"
        time.sleep(0.3)
    assert sent < 3000  # 16 KiB each: what lies in windows, queues and buffers on both sides
    assert stub(server).Predict(predict("echo", rows_of(1, 1), "other"), timeout=10).request_id == "other"
    seen = [(int(answer.request_id), tensors.decode(answer.response.outputs[0])) for answer in answers]
    assert sorted(number for number, _ in seen) == list(range(1, 5001))
    assert all((y == number).all() for number, y in seen)


def test_the_end_comes_after_the_last_answer(server):
    """The client's half-close overtakes what waits and runs."""
    answers = list(
        stub(server).PredictStream(iter([item("slow", rows_of(1, n), str(n)) for n in range(600)]), timeout=60)
    )
    assert sorted(int(answer.request_id) for answer in answers) == list(range(600))
    assert all(answer.WhichOneof("result") == "response" for answer in answers)


def test_a_stream_whose_time_runs_out_ends_with_that(server):
    over = threading.Event()

    def items():
        for number in range(200):
            yield item("slow", rows_of(1, number), str(number))
        over.wait(20)  # the stream stays open: items that could not be in time are answered one by one

    answers = stub(server).PredictStream(items(), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        for _ in answers:
            pass
    over.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(list(stub(server).PredictStream(iter([item("slow", rows_of(1, 1), "1")]), timeout=10))) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stream_to_a_model_that_is_still_loading_ends_with_unavailable(transport, tmp_path: Path):
    file = tmp_path / "forno.yaml"
    file.write_text('models: {late: {engine: "null", "null": {shape: [-1, 2], delay_us: 150000}}}')
    with FornoServer(file, transport=transport, ready=False) as running:
        end, told = time.monotonic() + 20, set()
        while time.monotonic() < end:
            answers = stub(running).PredictStream(
                iter([item("late", rows_of(1, 1), "1")]), timeout=10, wait_for_ready=True
            )
            try:
                results = [answer.WhichOneof("result") for answer in answers]
            except grpc.RpcError:
                told.add((answers.code(), "not ready to serve" in answers.details()))
                time.sleep(0.02)
            else:
                assert results == ["response"]
                break
        else:
            pytest.fail(f"the model is not ready after 20 s:\n{running.output()}")
        told.discard((grpc.StatusCode.UNAVAILABLE, False))  # nobody listened yet
        assert told == {(grpc.StatusCode.UNAVAILABLE, True)}
