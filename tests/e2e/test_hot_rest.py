"""The short way of REST's Predict gives what the ordinary way gives, byte for byte, or leaves the call to it."""

from __future__ import annotations

import asyncio
import json

import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.compiling import needs_compiler
from tests.e2e.json_splitter import HEAD, compiled
from tests.unit.calls import Aborted, CallContext, loaded, registry_of, sums_model

from forno.server.clock import clock_us
from forno.server.errors import DeadlineExceeded
from forno.server.metrics import Metrics
from forno.server.request import NEVER_US
from forno.server.servicers import status
from forno.server.servicers.hot_rest import HotRest
from forno.server.servicers.plans import MAX_PLANS
from forno.server.servicers.rest import RestServicer, request_of

pytestmark = needs_compiler

JSON = "application/json"


class Reply:
    """Keeps one answer."""

    def __init__(self, expires_us):
        self.future = asyncio.get_running_loop().create_future()
        self.expires_us = expires_us

    def done(self):
        return self.future.done()

    def set_result(self, parts):
        self.future.set_result(b"".join(parts))

    def set_exception(self, error):
        self.future.set_exception(error)


class Both:
    """The two ways over the same models."""

    def __init__(self, split, *models):
        registry = registry_of(*models)
        self._split = split
        self.hot = HotRest(registry, clock_us)
        self.ordinary = RestServicer(registry, {}, Metrics())

    async def by_the_short_way(self, path, body, content_type=JSON, expires_us=NEVER_US):
        """The answer; None where the call is left to the ordinary way."""
        found = self._split(body)
        if found is None:
            return None
        key = path.encode() + b"\n" + content_type.encode() + b"\n" + found[0][len(HEAD) :]
        reply = Reply(expires_us)
        if not self.hot(key, *found[1:], reply):
            return None
        return await reply.future

    async def by_the_ordinary_way(self, path, body, content_type=JSON, context=None):
        """The answer; None where there is an error instead."""
        try:
            answer = await self.ordinary.Predict(request_of(path, content_type, body), context or CallContext())
        except Aborted:
            return None
        assert isinstance(answer, HttpBody)
        return answer.data


@pytest.fixture(scope="session")
def split(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("json_split"))


@pytest.fixture(scope="module")
def both(split, tmp_path_factory):
    with asyncio.Runner() as runner:

        async def build():
            sums = sums_model(tmp_path_factory.mktemp("models") / "sums.onnx")
            return Both(split, await loaded("sums", sums), await loaded("echo", shape=(-1, 3)))

        yield runner, runner.run(build())


FLOATS = st.one_of(st.floats(-1e9, 1e9), st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-5, 5))
INTEGERS = st.integers(-(2**52), 2**52)
SPECIAL = st.sampled_from(["NaN", "x", None, True, 1e39, 2.5, 1.0, 2**53, 2**53 + 1, -(2**64), [1]])


def rows(width, elements):
    return st.lists(st.lists(elements, min_size=width, max_size=width), min_size=1, max_size=3)


def seldom(draw):
    return draw(st.integers(0, 11)) == 0


@st.composite
def calls(draw):
    """Path and body of a call that is right, or wrong in one of many ways."""
    path = draw(st.sampled_from(["/v1/models/sums:predict", "/v1/models/sums/versions/1:predict", "/v1/predict"]))
    extra = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "parameters": st.sampled_from([{"priority": 3}, {"queue_timeout_ms": 5000}, {}]),
                "request_id": st.just("r"),
                "signature_name": st.just("serving_default"),
            },
        )
    )
    if seldom(draw):
        extra |= draw(st.sampled_from([{"request_id": 7}, {"model": "echo"}, {"parameters": {"priority": 1000}}]))
    if path == "/v1/predict":
        extra["model"] = "sums"
    x = draw(rows(2, FLOATS))
    k = draw(st.lists(INTEGERS, min_size=len(x), max_size=len(x)))
    if seldom(draw):
        (x[0] if draw(st.booleans()) else k)[0] = draw(SPECIAL)
    form = draw(st.sampled_from(["rows", "columns", "native", "only"]))
    names = ("x", "q") if seldom(draw) else ("x", "k")
    if form != "only" and draw(st.booleans()):
        extra["outputs"] = draw(st.sampled_from([["total"], ["label", "both"], ["both"]] * 3 + [["nothing"], "total"]))
    match form:
        case "rows":
            body = {"instances": [{names[0]: row, names[1]: whole} for row, whole in zip(x, k, strict=False)]}
        case "columns":
            body = {"inputs": dict(zip(names, (x, k), strict=True))}
        case "native":
            items = [{"name": name, "data": data} for name, data in zip(names, (x, k), strict=True)]
            if draw(st.booleans()):
                items[0]["data"] = [element for row in x for element in row]
                items[0]["shape"] = [2, len(x)] if seldom(draw) else [len(x), 2]
            body = {"inputs": items}
        case _:
            path, body = "/v1/models/echo:predict", {"instances": draw(rows(3, FLOATS | INTEGERS))}
            extra.pop("model", None)
    text = json.dumps({**body, **extra}, indent=draw(st.sampled_from([None, 1]))).encode()
    return path, text


def without_timings(text):
    value = orjson.loads(text)
    value.pop("timings", None)
    return orjson.dumps(value)


@given(call=calls())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_ways_answer_alike(both, call):
    runner, ways = both
    short = runner.run(ways.by_the_short_way(*call))
    if short is not None:
        ordinary = runner.run(ways.by_the_ordinary_way(*call))
        assert without_timings(short) == without_timings(ordinary)
        assert ("timings" in orjson.loads(short)) == ("timings" in orjson.loads(ordinary))
        if b"timings" not in short:
            assert short == ordinary


ECHO = "/v1/models/echo:predict"
GOOD = [
    (ECHO, {"instances": [[1, 2.5, -3]]}),
    (ECHO, {"inputs": [[1, 2.5, -3], [4, 5, 6]]}),
    (ECHO, {"inputs": [{"name": "x", "shape": [1, 3], "data": [1, 2, 3]}], "request_id": "r"}),
    ("/v1/predict", {"model": "echo", "instances": [{"x": [1, 2, 3]}], "parameters": {"priority": -2}}),
    ("/v1/models/sums:predict", {"inputs": {"k": [3, 4], "x": [[1, 2], [3, 4]]}, "outputs": ["label"]}),
    ("/v1/models/sums:predict", {"inputs": {"k": [9007199254740991], "x": [[1e-40, 3e38]]}}),
]


@pytest.mark.parametrize("call", GOOD, ids=lambda call: json.dumps(call[1])[:40])
def test_usual_calls_take_the_short_way(both, call):
    runner, ways = both
    path, body = call[0], json.dumps(call[1]).encode()
    short = runner.run(ways.by_the_short_way(path, body))
    assert short is not None
    assert without_timings(short) == without_timings(runner.run(ways.by_the_ordinary_way(path, body)))


LEFT = {
    "an unknown key": (ECHO, b'{"instances": [[1, 2, 3]], "modle": "echo"}', JSON),
    "a key twice": (ECHO, b'{"instances": [[1, 2, 3]], "instances": [[1, 2, 3]]}', JSON),
    "an unknown model": ("/v1/models/ech:predict", b'{"instances": [[1, 2, 3]]}', JSON),
    "two models": (ECHO, b'{"instances": [[1, 2, 3]], "model": "sums"}', JSON),
    "a wrong shape": (ECHO, b'{"instances": [[1, 2]]}', JSON),
    "an unknown output": (ECHO, b'{"instances": [[1, 2, 3]], "outputs": ["z"]}', JSON),
    "a content type": (ECHO, b'{"instances": [[1, 2, 3]]}', "text/csv"),
    "what follows": (ECHO, b'{"instances": [[1, 2, 3]]} x', JSON),
    "a deadline of its own": (ECHO, b'{"instances": [[1, 2, 3]], "parameters": {"timeout_ms": 50}}', JSON),
    "a fraction for an integer": ("/v1/models/sums:predict", b'{"inputs": {"x": [[1, 2]], "k": [1.5]}}', JSON),
    "an integer beyond doubles": (
        "/v1/models/sums:predict",
        b'{"inputs": {"x": [[1, 2]], "k": [9007199254740993]}}',
        JSON,
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_wrong_or_unusual_is_left_to_the_ordinary_way(both, name):
    runner, ways = both
    assert runner.run(ways.by_the_short_way(*LEFT[name])) is None


def test_what_is_refused_is_told_as_on_the_ordinary_way(both):
    runner, ways = both
    with pytest.raises(DeadlineExceeded) as caught:
        runner.run(ways.by_the_short_way(ECHO, b'{"instances": [[1, 2, 3]]}', expires_us=clock_us()))
    context = CallContext(time_remaining_s=0.0)
    assert runner.run(ways.by_the_ordinary_way(ECHO, b'{"instances": [[1, 2, 3]]}', context=context)) is None
    code, message, trailing = status.told(caught.value)
    assert (code.name, message, dict(trailing)) == ("DEADLINE_EXCEEDED", context.message, context.trailing)
    assert context.code == code


def test_plans_are_bounded(both):
    runner, ways = both
    for number in range(MAX_PLANS + 5):
        body = json.dumps({"instances": [[1, 2, 3]], "parameters": {"queue_timeout_ms": 1000 + number}}).encode()
        assert runner.run(ways.by_the_short_way(ECHO, body)) == b'{"predictions":[[1.0,2.0,3.0]]}'
    assert len(ways.hot.plans) == MAX_PLANS


@pytest.mark.parametrize(
    ("path", "selected"),
    [
        ("/v1/predict", ("", "", "")),
        ("/v1/models/a.b-c_1:predict", ("a.b-c_1", "", "")),
        ("/v1/models/a/versions/2:predict", ("a", "2", "")),
        ("/v1/models/a/labels/stable:predict", ("a", "", "stable")),
    ],
)
def test_paths_say_which_model(path, selected):
    request = request_of(path, JSON, b"{}")
    assert (request.model, request.version, request.label) == selected
    assert (request.body.content_type, request.body.data) == (JSON, b"{}")
