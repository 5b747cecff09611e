"""The address for administration, calls from web pages, and starts that say what is wrong."""

from __future__ import annotations

import http.client
import json

import grpc
import pytest
from bench.process import free_port
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.e2e.forno_server import forno
from tests.e2e.secured import ROWS, Credential, Secured, SecuredServer, keyed_server, predict

PREDICT, METRICS = "/forno.v1.Predictor/Predict", "/forno.v1.Rest/Metrics"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LISTING = reflection_pb2.ServerReflectionRequest(list_services="")


def code_at(port: int, path: str, request, credential: Credential, *, stream: bool = False) -> str:
    """The status of a call at another door than the public one."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        data = request.SerializeToString()
        try:
            if stream:
                next(channel.stream_stream(path)(iter([data]), metadata=credential.metadata, timeout=10))
            else:
                channel.unary_unary(path)(data, metadata=credential.metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"


@pytest.mark.parametrize("transport", ["envoy", "proxy", "grpc"])
def test_administration_has_a_door_of_its_own(tmp_path, transport):
    files = Secured(tmp_path)
    port = free_port()
    everything = files.key("*")
    settings = files.settings(**files.all_locks(client_ca=False), admin_address=f"127.0.0.1:{port}")
    with SecuredServer(files, settings, transport) as server:
        calls = [(METRICS, empty_pb2.Empty(), False), (REFLECTION, LISTING, True)]
        for path, request, stream in calls:
            assert server.rpc(path, request, everything, stream=stream)[0] == "PERMISSION_DENIED"
            forged = Credential({"x-forno-door": "admin", **everything.headers})
            assert server.rpc(path, request, forged, stream=stream)[0] == "PERMISSION_DENIED"
            assert code_at(port, path, request, Credential(), stream=stream) == "OK"
        health = "/grpc.health.v1.Health/Check"
        assert server.rpc(health, health_pb2.HealthCheckRequest(), Credential())[0] == "OK"
        assert code_at(port, health, health_pb2.HealthCheckRequest(), Credential()) == "OK"
        assert server.rpc(PREDICT, predict("alpha"), everything)[0] == "OK"
        wrong = Credential({"x-api-key": "forno_00000000_x"})
        assert code_at(port, PREDICT, predict("alpha"), wrong) == "UNAUTHENTICATED"
        if transport != "grpc":
            assert server.rest("GET", "/metrics", everything).status == 403
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/metrics")
            assert b"forno_model_state" in connection.getresponse().read()
            connection.close()


@pytest.mark.parametrize("transport", ["envoy", "proxy"])
def test_only_pages_of_named_origins_may_call(tmp_path, transport):
    files = Secured(tmp_path)
    key = files.key("predict")
    with keyed_server(files, transport, cors={"origins": ["https://app.example"]}) as server:
        path = "/v1/models/alpha:predict"
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
        allowed = server.rest("OPTIONS", path, Credential(), origin="https://app.example", **asks)
        assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert "x-api-key" in allowed.headers["access-control-allow-headers"]
        refused = server.rest("OPTIONS", path, Credential(), origin="https://evil.example", **asks)
        assert "access-control-allow-origin" not in refused.headers
        answer = server.rest("POST", path, key, ROWS, origin="https://app.example")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert server.rest("POST", "/nowhere", key, ROWS, origin="https://app.example").status == 404
        forged = {"x-forno-nowhere": "servicers", "origin": "https://app.example"}
        assert server.rest("POST", "/nowhere", key, ROWS, **forged).status == 404
        # A refusal is readable too, or the page could not tell why it was refused.
        refusal = server.rest("POST", path, Credential(), ROWS, origin="https://app.example")
        assert (refusal.status, refusal.headers["access-control-allow-origin"]) == (401, "https://app.example")


def start(settings, *more: str) -> tuple[int, str]:
    """Exit status and output of a start that should fail."""
    done = forno("serve", settings, "--address", f"127.0.0.1:{free_port()}", *more)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("transport", ["envoy", "proxy", "grpc"])
def test_a_start_that_cannot_be_says_why(tmp_path, transport):
    files = Secured(tmp_path)
    tls = {"certificate_file": "server.pem", "key_file": "server.key"}
    (tmp_path / "other.key").write_bytes(files.authority.issue_server()[1])
    wrong = {
        "keys_file": ({"keys_file": "none.yaml"}, "forno keys add --file"),
        "pair": ({"tls": {**tls, "key_file": "other.key"}}, "other.key are not a certificate and its key"),
        "missing": ({"tls": {**tls, "certificate_file": "none.pem"}}, "none.pem: cannot be read"),
        "jwks": ({"jwt": {"jwks_file": "keys.yaml", "issuer": "a", "audience": "b"}}, "keys.yaml: is no JWKS"),
        "scope": ({"anonymous": ["all"]}, "security.anonymous: 'all' is not a scope; expected `*`"),
    }
    if transport == "grpc":
        wrong["optional"] = ({"tls": {**tls, "client_ca_file": "clients.pem"}}, "with transport grpc it must be")
    for name, (security, told) in wrong.items():
        status, output = start(files.settings(**security), "--transport", transport)
        assert (status, told in output, "Traceback" in output) == (2, True, False), (name, output)


def test_wrong_settings_are_told_by_line(tmp_path):
    path = tmp_path / "forno.yaml"
    for security, told in (
        ({"tls": {"certificate_file": "a"}}, "both `certificate_file` and `key_file`"),
        ({"jwt": {"jwks_file": "a"}}, "`issuer` and `audience` beside `jwks_file`"),
        ({"jwt": {"algorithms": ["HS256"]}}, "security.jwt.algorithms"),
        ({"certificates": {"a": ["predict"]}}, "`certificates` only beside `tls.client_ca_file`"),
        ({"admin_address": "9090"}, "security.admin_address is '9090'; expected HOST:PORT"),
        ({"key_file": "x"}, "did you mean `keys_file`?"),
    ):
        path.write_text(json.dumps({"security": security}))
        status, output = start(path)
        assert status == 2
        assert f"{path}:1: " in output
        assert told in output


def test_a_start_that_answers_everyone_says_so(tmp_path):
    files = Secured(tmp_path)
    port = free_port()
    for security, warned in (({}, True), ({"keys_file": "keys.yaml"}, False)):
        server = SecuredServer(files, files.settings(**security), "envoy", encrypted=False)
        server._command[server._command.index("--address") + 1] = f"0.0.0.0:{port}"
        server.port, server.target = port, f"127.0.0.1:{port}"
        with server:
            lines = [line for line in server.output().splitlines() if "warning" in line]
        assert [line for line in lines if "answers everyone who can reach it" in line] == lines
        assert bool(lines) == warned
