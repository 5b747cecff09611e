"""REST, as curl users see it: bodies, paths, errors and pages."""

from __future__ import annotations

import base64
import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.forno_server import ROOT


def post(server, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = server.http("POST", path, data, {key.replace("_", "-"): value for key, value in headers.items()})
    return reply.status, json.loads(reply.body)


def get(server, path):
    reply = server.http("GET", path)
    return reply.status, json.loads(reply.body)


def test_rows(rest_server):
    body = {"instances": [{"a": [1, 2, 3], "b": [4, 5, 6]}, {"a": [0, 0, 0], "b": [0.5, 0, 0]}]}
    assert post(rest_server, "/v1/models/add:predict", body) == (200, {"predictions": [[15, 17, 19], [10.5, 10, 10]]})


def test_columns(rest_server):
    body = {"inputs": {"a": [[1, 2, 3]], "b": [[4, 5, 6]]}}
    assert post(rest_server, "/v1/models/add/versions/1:predict", body) == (200, {"outputs": [[5, 7, 9]]})
    assert post(rest_server, "/v1/models/add/labels/old:predict", body) == (200, {"outputs": [[5, 7, 9]]})


def test_native(rest_server):
    body = {
        "model": "add",
        "request_id": "r",
        "inputs": [
            {"name": "a", "data_type": "float32", "shape": [1, 3], "data": [1, 2, 3]},
            {"name": "b", "data": [[4, 5, 6]]},
        ],
    }
    status, answer = post(rest_server, "/v1/predict", body)
    assert status == 200
    assert (answer["model"], answer["version"], answer["request_id"]) == ("add", "2", "r")
    assert answer["outputs"] == [{"name": "y", "data_type": "float32", "shape": [1, 3], "data": [[15, 17, 19]]}]
    assert set(answer["timings"]) == {"queue_us", "compute_us", "batch_rows"}


def test_integers_beyond_double_survive(rest_server):
    body = {"instances": [[9007199254740993, -9223372036854775808]]}
    assert post(rest_server, "/v1/models/whole:predict", body) == (
        200,
        {"predictions": [[9007199254740994, -9223372036854775807]]},
    )


def test_nan_and_infinity_are_quoted(rest_server):
    body = {"inputs": {"a": [["NaN", "Infinity", "-Infinity"]], "b": [[0, 0, 0]]}}
    assert post(rest_server, "/v1/models/add:predict", body) == (200, {"outputs": [["NaN", "Infinity", "-Infinity"]]})
    status, answer = post(rest_server, "/v1/models/add:predict", b'{"inputs": {"a": [[NaN, 0, 0]], "b": [[0, 0, 0]]}}')
    assert status == 400
    assert "NaN" in answer["message"]


def test_endpoints(rest_server):
    status, answer = post(rest_server, "/v1/spam/detect", {"text": "WIN a FREE prize now!!! click here"})
    assert status == 200
    assert answer["prediction"] == "spam"
    assert 0.5 < answer["confidence"] <= 1
    for digit in range(10):
        image = (ROOT / f"examples/data/digit-{digit}.png").read_bytes()
        status, answer = post(rest_server, "/v1/digits/classify", image, content_type="image/png")
        assert (status, answer["prediction"]) == (200, str(digit))


def test_descriptions_show_numbers_not_strings(rest_server):
    status, answer = get(rest_server, "/v1/models/add/labels/old")
    assert status == 200
    assert (answer["name"], answer["version"], answer["labels"]) == ("add", "1", ["old"])
    assert answer["inputs"][0]["shape"] == [-1, 3]
    assert get(rest_server, "/v1/models/add")[1]["version"] == "2"
    assert {model["name"] for model in get(rest_server, "/v1/models")[1]["models"]} >= {"add", "digits", "spam"}


def test_health_ready_and_metrics(rest_server):
    assert get(rest_server, "/health")[0] == 200
    status, answer = get(rest_server, "/ready")
    assert (status, answer["ready"]) == (200, True)
    assert rest_server.http("HEAD", "/health").status == 200
    assert rest_server.http("HEAD", "/ready").status == 200
    post(rest_server, "/v1/models/add:predict", {"instances": [{"a": [1, 2, 3], "b": [4, 5, 6]}]})
    reply = rest_server.http("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    assert {"forno_request_seconds", "forno_batch_rows", "forno_rpcs", "forno_pending_requests"} <= set(families)
    counted = [
        s for s in families["forno_request_seconds"].samples if s.name.endswith("_count") and s.labels["model"] == "add"
    ]
    assert sum(sample.value for sample in counted) >= 1


PREDICT = "/v1/models/add:predict"
GOOD = {"inputs": {"a": [[1, 2, 3]], "b": [[4, 5, 6]]}}
BAD = {
    "typo in a key": (PREDICT, {"imputs": {}}, 400, ["imputs", "inputs"]),
    "typo in an input": (PREDICT, {"inputs": {"a": [[1, 2, 3]], "bb": [[1, 2, 3]]}}, 400, ["bb"]),
    "typo in a native key": (PREDICT, {"inputs": [{"name": "a", "dta": [1]}]}, 400, ["dta", "data"]),
    "broken": (PREDICT, b'{"inputs": {"a": [[1, 2, }', 400, []),
    "empty": (PREDICT, b"", 400, []),
    "not an object": (PREDICT, [1, 2], 400, []),
    "deep": (PREDICT, b"[" * 100_000, 400, []),
    "deep inside": (PREDICT, b'{"inputs": {"a": ' + b"[" * 100_000, 400, []),
    "ragged": (PREDICT, {"inputs": {"a": [[1, 2, 3], [1, 2]], "b": [[1, 2, 3], [1, 2, 3]]}}, 400, ["a"]),
    "wrong dim": (PREDICT, {"inputs": {"a": [[1, 2]], "b": [[1, 2]]}}, 400, ["'a'"]),
    "text for a number": (PREDICT, {"inputs": {"a": [["x", 2, 3]], "b": [[1, 2, 3]]}}, 400, ["a", "x"]),
    "true for a number": (PREDICT, {"inputs": {"a": [[True, 2, 3]], "b": [[1, 2, 3]]}}, 400, ["a"]),
    "fraction for an integer": ("/v1/models/whole:predict", {"instances": [[1.5]]}, 400, ["x", "1.5"]),
    "too large for an integer": ("/v1/models/whole:predict", {"instances": [[2**64]]}, 400, ["x"]),
    "unknown model": ("/v1/models/ad:predict", GOOD, 404, ["'ad'", "'add'"]),
    "unknown version": ("/v1/models/add/versions/9:predict", GOOD, 404, ["'9'"]),
    "unknown endpoint": ("/v1/spam/detekt", {"text": "x"}, 404, ["spam/detect"]),
    "endpoint key": ("/v1/spam/detect", {"txt": "x"}, 400, ["txt", "text"]),
    "no model": ("/v1/predict", GOOD, 400, ["model"]),
    "two models": (PREDICT, {**GOOD, "model": "spam"}, 400, ["model"]),
    "query on predict": (PREDICT + "?model=spam", GOOD, 400, ["model"]),
    "query on an endpoint": ("/v1/spam/detect?endpoint=digits/classify", {"text": "x"}, 400, ["endpoint"]),
    "unknown query": (PREDICT + "?verbose=1", GOOD, 400, ["verbose"]),
    "broken image": ("/v1/digits/classify", b"\x89PNG\r\n\x1a\nnot really", 400, []),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_told_what_is_wrong(rest_server, name):
    path, body, expected, words = BAD[name]
    headers = {"content_type": "image/png"} if "image" in name else {}
    status, answer = post(rest_server, path, body, **headers)
    assert status == expected, answer
    assert set(answer) == {"code", "message", "details"}, answer
    assert isinstance(answer["code"], int)
    assert answer["message"]
    assert all(word in answer["message"] for word in words), answer["message"]
    assert post(rest_server, PREDICT, GOOD)[0] == 200


@pytest.mark.parametrize("path", ["/", "/nope", "/v1", "/v2/models", "/forno.v1.Predictor/Predict"])
def test_unknown_paths_are_404_with_a_json_body(rest_server, path):
    status, answer = get(rest_server, path)
    assert status in {404, 405, 415, 400}, answer
    assert answer["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", PREDICT, ["POST"]),
        ("PUT", "/v1/models/add/versions/1:predict?x=1", ["POST"]),
        ("GET", "/v1/predict", ["POST"]),
        ("GET", "/v1/spam/detect", ["POST"]),
        ("DELETE", "/v1/models", ["GET"]),
        ("PATCH", "/v1/models/add/labels/old", ["GET"]),
        ("POST", "/health", ["GET", "HEAD"]),
        ("POST", "/metrics", ["GET"]),
    ],
)
def test_a_known_path_by_a_wrong_method_is_405_and_says_what_it_takes(rest_server, method, path, allowed):
    reply = rest_server.http(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, ", ".join(allowed))
    message = f"this path takes {' and '.join(allowed)}, not {method}"
    assert json.loads(reply.body) == {"code": 12, "message": message, "details": []}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../models/add:predict",
        "/v1/./models/add:predict",
        "/v1//models/add:predict",
        "//v1/models/add:predict",
        "/v1/models%2Fadd:predict",
        "/v1/models/add%00:predict",
    ],
)
def test_no_path_is_normalised(rest_server, path):
    """What a proxy before the server refuses by its path is not reached by dots, slashes or escaped slashes."""
    connection = http.client.HTTPConnection("127.0.0.1", rest_server.port, timeout=10)
    connection.putrequest("POST", path, skip_host=False)
    body = json.dumps(GOOD).encode()
    connection.putheader("content-length", str(len(body)))
    connection.putheader("content-type", "application/json")
    connection.endheaders(body)
    reply = connection.getresponse()
    answer = reply.read()
    connection.close()
    assert reply.status in {400, 404}, answer


def test_a_body_over_the_limit_is_413(rest_server):
    status, answer = post(rest_server, "/v1/models/whole:predict", b" " * 9_000_000)
    assert status in {413, 429}, answer
    assert answer["message"]


def test_overload_is_429_with_retry_after(rest_server):
    with ThreadPoolExecutor(8) as pool:
        body = json.dumps({"instances": [[1, 2]]}).encode()
        replies = list(pool.map(lambda _: rest_server.http("POST", "/v1/models/narrow:predict", body), range(8)))
    refused = [reply for reply in replies if reply.status != 200]
    assert 1 <= len(refused) <= 7
    assert {reply.status for reply in refused} == {429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert all(json.loads(reply.body)["code"] == 8 for reply in refused)


def test_raw_bytes_of_the_only_input(rest_server):
    status, answer = post(rest_server, "/v1/models/fixed:predict", bytes(16), content_type="application/octet-stream")
    assert status == 200
    assert answer["outputs"][0]["data"] == [[0, 0], [0, 0]]


def test_strings_that_are_not_text_go_as_base64(rest_server):
    body = {"instances": [{"b64": base64.b64encode(b"bread").decode()}]}
    assert post(rest_server, "/v1/models/words:predict", body) == (200, {"predictions": ["bread"]})


def test_a_deadline_in_a_header_is_kept(rest_server):
    body = {"instances": [[1, 2]]}
    status, answer = post(rest_server, "/v1/models/slow:predict", body, grpc_timeout="100m")
    assert (status, answer["code"]) == (504, 4), answer
