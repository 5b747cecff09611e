"""REST calls that go past the transcoder answer as those that go through it: the same call with an empty query does."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.e2e.forno_server import FLEET, FornoServer
from tests.e2e.test_rest import BAD, GOOD, PREDICT, post

CASES = {
    "rows": (PREDICT, {"instances": [{"a": [1, 2, 3], "b": [4, 5, 6]}, {"a": [0, 0, 0], "b": [0.5, 0, 0]}]}),
    "columns": ("/v1/models/add/versions/1:predict", GOOD),
    "a label": ("/v1/models/add/labels/old:predict", GOOD),
    "no model in the path": ("/v1/predict", {**GOOD, "model": "add", "version": 1}),
    "integers": ("/v1/models/whole:predict", {"instances": [[9007199254740993, -9223372036854775808]]}),
    "not finite": (PREDICT, {"inputs": {"a": [["NaN", "Infinity", 1]], "b": [[0, 0, 0]]}}),
    "strings": ("/v1/models/words:predict", {"instances": ["bread"]}),
    **{name: case[:2] for name, case in BAD.items() if "?" not in case[0] and "image" not in name},
}


def ask(server, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers.setdefault("content-type", "application/json")
    return server.http("POST", path, data, headers)


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_bytes(rest_server, name):
    path, body = CASES[name]
    through, past = ask(rest_server, path + "?", body), ask(rest_server, path, body)
    assert (past.status, past.body) == (through.status, through.body)
    kept = {"content-type", "retry-after"}
    assert {k: v for k, v in past.headers.items() if k in kept} == {
        k: v for k, v in through.headers.items() if k in kept
    }


def test_the_usual_way_shows_nothing_of_grpc(rest_server):
    if rest_server.transport not in ("envoy", FLEET):
        pytest.skip("another transport has one way")
    for body in (GOOD, {"inputs": {}}):
        assert not [key for key in ask(rest_server, PREDICT, body).headers if key.startswith("grpc-")]


def test_a_body_in_chunks_and_one_without_length(rest_server):
    connection = http.client.HTTPConnection("127.0.0.1", rest_server.port, timeout=10)
    text = json.dumps(GOOD).encode()
    for _ in range(3):  # on one connection, which stays open
        connection.request("POST", PREDICT, (text[at : at + 7] for at in range(0, len(text), 7)), encode_chunked=True)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())) == (200, {"outputs": [[15, 17, 19]]})
    connection.close()


def test_a_body_over_the_limit_is_refused_in_every_form(rest_server):
    connection = http.client.HTTPConnection("127.0.0.1", rest_server.port, timeout=10)
    connection.request("POST", PREDICT, iter([b" " * 1_000_000] * 9), encode_chunked=True)
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["code"]) == (413, 8)
    connection.close()


def test_many_callers_get_their_own_answers(rest_server):
    def one(number):
        body = {"inputs": {"a": [[number, 0, 0]], "b": [[0, number, 0]]}}
        return post(rest_server, PREDICT, body)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(300)))
    offset = np.array(post(rest_server, PREDICT, {"inputs": {"a": [[0, 0, 0]], "b": [[0, 0, 0]]}})[1]["outputs"])
    for number, answer in enumerate(answers):
        assert answer[0] == 200
        assert (np.array(answer[1]["outputs"]) - offset).tolist() == [[number, number, 0]]


TOLD = {
    "x-request-timeout-ms": ({"x_request_timeout_ms": "50"}, {}),
    "parameters.timeout_ms": ({}, {"timeout_ms": 50}),
    "grpc-timeout": ({"grpc_timeout": "50m"}, {}),
}


@pytest.fixture(scope="module", params=["envoy", "proxy"])
def slow_server(request, tmp_path_factory):
    """Models whose cost is not known yet, so that a deadline is not refused beforehand; runs take 0.2 s."""
    folder = tmp_path_factory.mktemp("slow")
    null = {"engine": "null", "null": {"delay_us": 200_000, "shape": [-1, 2]}}
    models = {f"slow{number}": null for number in range(len(TOLD))}
    (folder / "forno.yaml").write_text(json.dumps({"models": models}))
    with FornoServer(folder / "forno.yaml", transport=request.param) as server:
        yield server


@pytest.mark.parametrize("told", TOLD)
def test_what_is_late_is_504_however_the_deadline_is_told(slow_server, told):
    headers, parameters = TOLD[told]
    path, body = f"/v1/models/slow{list(TOLD).index(told)}:predict", {"instances": [[1, 2]], "parameters": parameters}
    began = time.monotonic()
    status, answer = post(slow_server, path, body, **headers)
    assert (status, answer["code"]) == (504, 4), answer
    assert 0.04 < time.monotonic() - began < 0.2
    status, answer = post(slow_server, path, body, **headers)  # the run that was given up goes on: there is no chance
    assert (status, answer["code"]) in {(429, 8), (504, 4)}, answer


def test_what_is_in_time_is_answered(rest_server):
    headers = {"x_request_timeout_ms": "5000"}
    assert post(rest_server, PREDICT, {**GOOD, "parameters": {"timeout_ms": 5000, "priority": 5}}, **headers)[0] == 200
    assert post(rest_server, PREDICT, GOOD, **headers) == (200, {"outputs": [[15, 17, 19]]})


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "5s", "", "1" * 10])
def test_a_bad_timeout_is_told(rest_server, value):
    for path, body in ((PREDICT, GOOD), ("/v1/spam/detect", {"text": "x"})):
        status, answer = post(rest_server, path, body, x_request_timeout_ms=value)
        assert status == 400, answer
        assert "x-request-timeout-ms" in answer["message"]
        assert f"'{value}'" in answer["message"]
    status, answer = post(rest_server, PREDICT, {**GOOD, "parameters": {"timeout_ms": value}})
    assert (status, "parameters.timeout_ms" in answer["message"]) == (400, True)


def test_an_endpoint_keeps_a_deadline(rest_server):
    reply = ask(rest_server, "/v1/spam/detect", {"text": "x"}, **{"x-request-timeout-ms": "5000"})
    assert reply.status == 200


def test_who_may_not_call_is_told_so_on_both_ways(tmp_path):
    null = {"engine": "null", "null": {"shape": [-1, 2]}}
    settings = {"models": {"echo": null}, "security": {"anonymous": ["health", "predict:model/other"]}}
    (tmp_path / "forno.yaml").write_text(json.dumps(settings))
    with FornoServer(tmp_path / "forno.yaml", ready=False) as server:
        wait_until_it_answers(server)
        path, body = "/v1/models/echo:predict", {"instances": [[1, 2]]}
        through, past = ask(server, path + "?", body), ask(server, path, body)
        assert past.status in {401, 403}
        assert (past.status, past.body) == (through.status, through.body)
        assert past.headers.get("www-authenticate") == through.headers.get("www-authenticate")


def wait_until_it_answers(server):
    for _ in range(200):
        try:
            if server.http("GET", "/health").status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail("the server does not answer")
