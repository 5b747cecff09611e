"""Who may do what: every kind of credential against every way in, on every transport."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.e2e.secured import ROWS, Authority, Credential, Provider, Secured, SecuredServer, predict

from forno.v1 import predictor_pb2 as pb
from forno.v1 import rest_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

PREDICTOR, REST = "/forno.v1.Predictor", "/forno.v1.Rest"
TRANSPORTS = ("envoy", "proxy", "grpc", "fleet")
BODY = httpbody_pb2.HttpBody(content_type="application/json", data=ROWS)
NAMED = httpbody_pb2.HttpBody(content_type="application/json", data=b'{"model": "beta", "inputs": {"x": [[1, 1]]}}')
LISTING = reflection_pb2.ServerReflectionRequest(list_services="")
STREAMED = pb.PredictStreamRequest
HTTP = {200: "OK", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}

# Method, request, whether it is a stream, and what it takes.
RPCS = [
    (f"{PREDICTOR}/Predict", predict("alpha"), False, "model/alpha"),
    (f"{PREDICTOR}/Predict", predict("beta"), False, "model/beta"),
    (f"{PREDICTOR}/Predict", predict("nowhere"), False, "model/nowhere"),
    (f"{PREDICTOR}/Invoke", pb.InvokeRequest(endpoint="alpha/run", body=BODY), False, "endpoint/alpha/run"),
    (f"{PREDICTOR}/Invoke", pb.InvokeRequest(endpoint="beta/run", body=BODY), False, "endpoint/beta/run"),
    (f"{PREDICTOR}/GetModel", pb.GetModelRequest(model="alpha", version="1"), False, "model/alpha"),
    (f"{PREDICTOR}/GetModel", pb.GetModelRequest(model="beta"), False, "model/beta"),
    (f"{REST}/Predict", rest_pb2.RestPredictRequest(model="beta", body=BODY), False, "model/beta"),
    (f"{REST}/Predict", rest_pb2.RestPredictRequest(body=NAMED), False, "model/beta"),
    (f"{REST}/Invoke", rest_pb2.RestInvokeRequest(endpoint="beta/run", body=BODY), False, "endpoint/beta/run"),
    (f"{REST}/Metrics", rest_pb2.MetricsRequest(), False, "metrics"),
    (f"{REST}/Ready", rest_pb2.ReadyRequest(), False, "health"),
    ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), False, "health"),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", LISTING, True, "reflection"),
]
PATHS = [
    ("POST", "/v1/models/alpha:predict", ROWS, "model/alpha"),
    ("POST", "/v1/models/beta:predict", ROWS, "model/beta"),
    ("POST", "/v1/models/beta/versions/1:predict", ROWS, "model/beta"),
    ("POST", "/v1/predict", NAMED.data, "model/beta"),
    ("POST", "/v1/alpha/run", ROWS, "endpoint/alpha/run"),
    ("POST", "/v1/beta/run", ROWS, "endpoint/beta/run"),
    ("GET", "/v1/models/beta", None, "model/beta"),
    ("GET", "/v1/models/beta/versions/1", None, "model/beta"),
    ("GET", "/metrics", None, "metrics"),
    ("GET", "/health", None, "health"),
    ("GET", "/ready", None, "health"),
]


def credentials_of(files: Secured, *, certificates: bool) -> dict[str, Credential]:
    wrong = {"known": False}
    found = {
        "nobody": Credential(),
        "wrong key": Credential({"x-api-key": "forno_00000000_AAAA"}, **wrong),
        "wrong scheme": Credential({"authorization": "Basic eDp5"}, **wrong),
        "key of alpha": files.key("predict:model/alpha"),
        "key of beta's endpoint": files.key("predict:endpoint/beta/*"),
        "key of all models": files.key("predict"),
        "key of the pages": files.key("metrics", "reflection"),
        "token of alpha": files.token("openid predict:model/alpha"),
        "token of nothing": files.token("openid"),
        "token of another": Credential({"authorization": f"Bearer {Provider().token('*')}"}, **wrong),
        "old token": Credential(files.token("*", exp=time.time() - 60).headers, **wrong),
        "token for another": Credential(files.token("*", aud="another").headers, **wrong),
        "forged headers": Credential(
            {
                "x-forwarded-client-cert": "URI=spiffe://test/alpha",
                "x-forno-door": "admin",
                "x-forno-peer": "127.0.0.1",
                "certificate-names": "spiffe://test/alpha",
                "x-envoy-original-path": "/health",
            }
        ),
    }
    if certificates:
        found["certificate of alpha"] = files.certificate("spiffe://test/alpha", "predict:model/alpha")
        found["certificate of a stranger"] = files.certificate("spiffe://test/stranger")
        found["certificate and key"] = Credential(
            found["key of beta's endpoint"].headers,
            found["certificate of alpha"].certificate,
            found["key of beta's endpoint"].rights,
        )
    return found


@pytest.fixture(scope="module", params=TRANSPORTS)
def locked(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[tuple[SecuredServer, dict[str, Credential]]]:
    """A server with every lock on; plain gRPC asks for certificates of all or none, and has a test of its own."""
    files = Secured(tmp_path_factory.mktemp("secured"))
    certificates = request.param != "grpc"
    found = credentials_of(files, certificates=certificates)
    settings = files.settings(**files.all_locks(client_ca=certificates))
    with SecuredServer(files, settings, request.param) as server:
        yield server, found


NAMES = [
    "nobody", "wrong key", "wrong scheme", "key of alpha", "key of beta's endpoint", "key of all models",
    "key of the pages", "token of alpha", "token of nothing", "token of another", "old token", "token for another",
    "forged headers", "certificate of alpha", "certificate of a stranger", "certificate and key",
]  # fmt: skip


def expected(credential: Credential, right: str) -> str:
    rights = credential.rights
    kind = right.partition("/")[0]
    covered = f"predict:{right}" in rights or ("predict" in rights and kind in {"model", "endpoint"})
    covered = (
        covered or right in rights or any(r.endswith("*") and f"predict:{right}".startswith(r[:-1]) for r in rights)
    )
    shown = {name.lower() for name in credential.headers} & {"x-api-key", "authorization"} or credential.certificate
    if not credential.known:
        return "UNAUTHENTICATED"
    if covered or right == "health":
        return "NOT_FOUND" if "nowhere" in right else "OK"
    return "PERMISSION_DENIED" if shown else "UNAUTHENTICATED"


@pytest.mark.parametrize("name", NAMES)
def test_every_way_in_asks_the_same(locked, name):
    server, credentials = locked
    if name not in credentials:
        return
    credential = credentials[name]
    seen, right = {}, {}
    for path, request, stream, need in RPCS:
        seen[path, need] = server.rpc(path, request, credential, stream=stream)[0]
        right[path, need] = expected(credential, need)
    if server.transport != "grpc":
        for method, path, body, need in PATHS:
            reply = server.rest(method, path, credential, body)
            seen[path, need] = HTTP.get(reply.status, str(reply.status))
            right[path, need] = expected(credential, need)
            assert ("www-authenticate" in reply.headers) == (reply.status == 401)
    assert seen == right


def test_items_of_a_stream_are_asked_one_by_one(locked):
    server, credentials = locked
    channel = server.connect()
    stream = channel.stream_stream(
        f"{PREDICTOR}/PredictStream", STREAMED.SerializeToString, pb.PredictStreamResponse.FromString
    )
    items = [STREAMED(request=predict(model)) for model in ("alpha", "beta", "alpha", "nowhere")]
    answers = list(stream(iter(items), metadata=credentials["key of alpha"].metadata, timeout=10))
    assert sorted(answer.error.code for answer in answers) == [0, 0, 7, 7]
    channel.close()


def test_calls_that_repeat_are_asked_each_time(locked):
    """The short way of repeated calls (servicers/hot.py) must not remember who has asked before."""
    server, credentials = locked
    for _ in range(3):
        assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), credentials["key of alpha"])[0] == "OK"
        for name in ("key of beta's endpoint", "key of the pages"):
            assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), credentials[name])[0] == "PERMISSION_DENIED"
        assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), Credential())[0] == "UNAUTHENTICATED"
        if server.transport != "grpc":
            path = "/v1/models/alpha:predict"
            assert server.rest("POST", path, credentials["key of alpha"], ROWS).status == 200
            assert server.rest("POST", path, credentials["key of beta's endpoint"], ROWS).status == 403


def test_lists_show_what_the_caller_may_use(locked):
    server, credentials = locked

    def listed(name: str) -> dict[str, list[str]]:
        _, data = server.rpc(f"{PREDICTOR}/ListModels", pb.ListModelsRequest(), credentials[name])
        return {model.name: list(model.endpoints) for model in pb.ListModelsResponse.FromString(data).models}

    assert listed("key of alpha") == {"alpha": []}
    assert listed("key of beta's endpoint") == {}
    assert listed("key of all models") == {"alpha": ["alpha/run"], "beta": ["beta/run"]}
    told = [
        server.rpc(f"{PREDICTOR}/Predict", predict(model), credentials["key of alpha"])[1].replace(model, "")
        for model in ("beta", "nowhere")
    ]
    assert told[0] == told[1]  # whether it exists is not for this caller
    wrong = server.rpc(f"{PREDICTOR}/Predict", predict("alpha2"), credentials["key of all models"])[1]
    assert "did you mean 'alpha'" in wrong
    codes = [
        server.rpc("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=model), credentials[name])[0]
        for name in ("nobody", "key of alpha")
        for model in ("alpha", "beta", "nowhere")
    ]
    assert codes == ["NOT_FOUND", "NOT_FOUND", "NOT_FOUND", "OK", "NOT_FOUND", "NOT_FOUND"]
    if server.transport != "grpc":
        assert server.rest("GET", "/ready", Credential()).body == b'{"ready":true,"models":{}}'
        assert b"beta" not in server.rest("GET", "/ready", credentials["key of alpha"]).body


def test_certificates_of_others_do_not_connect(locked):
    server, _ = locked
    if server.transport == "grpc":
        return
    stranger = Credential(certificate=Authority().issue("client"))
    assert server.rpc("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), stranger)[0] == "UNAVAILABLE"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_where_certificates_are_required_there_is_no_way_around(tmp_path, transport):
    files = Secured(tmp_path)
    locks = files.all_locks()
    locks["tls"]["require_client_certificate"] = True
    alpha = files.certificate("spiffe://test/alpha", "predict:model/alpha")
    key = files.key("*")
    with SecuredServer(files, files.settings(**locks), transport, certificate=alpha.certificate) as server:
        assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), alpha)[0] == "OK"
        assert server.rpc(f"{PREDICTOR}/Predict", predict("beta"), alpha)[0] == "PERMISSION_DENIED"
        assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), key)[0] == "UNAVAILABLE"
        stranger = Credential(certificate=Authority().issue("client"))
        assert server.rpc(f"{PREDICTOR}/Predict", predict("alpha"), stranger)[0] == "UNAVAILABLE"
        both = Credential(key.headers, alpha.certificate)
        assert server.rpc(f"{PREDICTOR}/Predict", predict("beta"), both)[0] == "OK"
        with grpc.insecure_channel(server.target) as plain, pytest.raises(grpc.RpcError):
            plain.unary_unary(f"{PREDICTOR}/Predict")(predict("alpha").SerializeToString(), timeout=2)
