"""Ways around the lock: paths, queries and headers that mean something else than they say."""

from __future__ import annotations

import pytest
from cryptography import x509
from tests.e2e.raw_http2 import RawClient, frame
from tests.e2e.secured import ROWS, Credential, Secured, SecuredServer, keyed_server, predict

KINDS = ("envoy", "proxy")
PATHS = [
    "/v1/models/beta:predict",
    "/v1/models/beta:predict?",
    "/v1/models/beta:predict?model=alpha",
    "/v1/models/alpha:predict?model=beta",
    "/v1/models/alpha:predict?MODEL=beta",
    "/v1/models/alpha:predict?endpoint=beta/run",
    "/v1/models/alpha:predict?body.data=beta",
    "/v1/models/alpha/../beta:predict",
    "/v1/models/alpha/./../beta:predict",
    "/v1/models/alpha/%2e%2e/beta:predict",
    "/v1/models/alpha%2F..%2Fbeta:predict",
    "/v1/models/alpha%2f%2e%2e%2fbeta:predict",
    "/v1/models/alpha%5C..%5Cbeta:predict",
    "/v1/models/alpha\\..\\beta:predict",
    "/v1/models/alpha;/../beta:predict",
    "//v1//models//beta:predict",
    "/v1/models/%62eta:predict",
    "/v1/models/%2562eta:predict",
    "/v1/models/beta%3Apredict",
    "/v1/models/beta:predict%00",
    "/v1/models/beta%00:predict",
    "/v1/models/beta:predict#alpha",
    "/V1/MODELS/beta:predict",
    "/v1/models/BETA:predict",
    "/v1/models/beta/versions/1:predict",
    "/v1/models/beta/versions/..:predict",
    "/v1/models/beta/labels/..%2f1:predict",
    "/v1/beta/run",
    "/v1/alpha/run/../../beta/run",
    "/v1/alpha/%2e%2e/beta/run",
    "/v1/beta%2Frun",
    "/v1/beta//run",
    "/v1/beta/run?endpoint=alpha/run",
    "/v1/alpha/run?endpoint=beta/run",
    "/v1/predict?model=beta",
    "/forno.v1.Predictor/Predict",
    "/forno.v1.Rest/Predict",
    "/forno.v1.Rest/Predict?model=beta",
    "/metrics",
    "//metrics",
    "/metrics/",
    "/metrics?health",
    "/%6detrics",
    "/v1/../metrics",
    "/health/../metrics",
    "/health%2f..%2fmetrics",
    "/health;/../metrics",
    "http://127.0.0.1/metrics",
    "/v1/models/" + "a" * 70_000 + ":predict",
]
HEADERS = [
    {},
    {"x-envoy-original-path": "/v1/models/alpha:predict", "x-envoy-original-method": "POST"},
    {"X-Envoy-Original-Path": "/health", "X-ENVOY-INTERNAL": "true", "x-envoy-external-address": "127.0.0.1"},
    {"x-original-url": "/health", "x-rewrite-url": "/health", "x-http-method-override": "GET"},
    {
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-client-cert": "By=a;URI=spiffe://test/beta",
        "forwarded": "for=127.0.0.1",
    },
    {"x-forno-door": "admin", "X-FORNO-DOOR": "admin", "x-forno-peer": "127.0.0.1", "certificate-names": "beta"},
]


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory):
    files = Secured(tmp_path_factory.mktemp("tricks"))
    with keyed_server(files, request.param) as running:
        yield running


@pytest.fixture(scope="module")
def alpha(server):
    return server.files.key("predict:model/alpha", "predict:endpoint/alpha/run")


@pytest.mark.parametrize("headers", HEADERS, ids=lambda headers: " ".join(headers)[:40])
def test_no_path_leads_to_what_the_key_does_not_open(server, alpha, headers):
    assert server.rest("POST", "/v1/models/alpha:predict", alpha, ROWS).status == 200
    assert server.rest("POST", "/v1/alpha/run", alpha, ROWS).status == 200
    reached = {}
    for credential in (alpha, Credential()):
        for path in PATHS:
            for method in ("POST", "GET"):
                reply = server.rest(method, path, credential, ROWS if method == "POST" else None, **headers)
                ran = reply.status == 200 and "health" not in path and (b"beta" in reply.body or not credential.headers)
                if ran or b"forno_" in reply.body or reply.status >= 500:
                    reached[path, method] = (reply.status, reply.body[:200])
    assert reached == {}


def test_the_name_of_a_header_is_the_same_in_any_case(server, alpha):
    made = alpha.headers["X-Api-Key"]
    path = "/v1/models/alpha:predict"
    for name in ("x-api-key", "X-API-KEY", "X-Api-Key"):
        assert server.rest("POST", path, Credential({name: made}), ROWS).status == 200
    for headers in (
        {"X_Api_Key": made},
        {"x-api-key": made + ",x"},
        {"x-api-key": f"x,{made}"},
        {"x-api-key": made.upper()},
        {"x-api-key": made, "authorization": "Bearer forno_x"},
        {"authorization": made},
        {"cookie": f"x-api-key={made}"},
        {"proxy-authorization": f"Bearer {made}"},
    ):
        assert server.rest("POST", path, Credential(headers), ROWS).status == 401, headers
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert server.rest("POST", path, Credential({"authorization": f"{scheme} {made}"}), ROWS).status == 200
    assert server.rest("POST", f"{path}?x-api-key={made}", Credential(), ROWS).status in {400, 401}


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/forno.v1.Predictor/Predict", ()),
        ("//forno.v1.Predictor/Predict", ()),
        ("/forno.v1.Predictor/Predict/", ()),
        ("/forno.v1.Predictor/./Predict", ()),
        ("/grpc.health.v1.Health/../forno.v1.Predictor/Predict", ()),
        ("/forno.v1.predictor/predict", ()),
        ("/forno.v1.Predictor/Predict?x-api-key=1", ()),
        ("/forno.v1.Predictor/Predict", (("x-envoy-original-path", "/health"),)),
        ("/forno.v1.Predictor/Predict", (("x-forno-door", "admin"), ("x-forno-peer", "127.0.0.1"))),
        ("/forno.v1.Predictor/Predict", (("x-api-key", ""), ("x-api-key", "forno_"), ("authorization", "Bearer"))),
        ("/forno.v1.Predictor/Predict", (("authorization", "Bearer " + "x" * 50_000),)),
    ],
)
def test_no_frame_leads_there_either(server, path, extra):
    with RawClient(server.port) as client:
        stream = client.open("", extra, path=path)
        client.send(stream, frame(predict("beta").SerializeToString()), end=True)
        answer = client.answer(stream)
        assert answer.body == b""
        assert (
            answer.status in {"8", "12", "16"}
            or answer.reset is not None
            or answer.headers.get(":status", "")[:1] == "4"
        )


@pytest.mark.parametrize("transport", ["envoy", "proxy", "grpc", "fleet"])
def test_a_name_in_a_certificate_does_not_pass_for_two(tmp_path, transport):
    """Names hold commas and semicolons, which separate them where they are listed."""
    files = Secured(tmp_path)
    locks = files.all_locks()
    locks["tls"]["require_client_certificate"] = True
    locks["certificates"]["admin"] = ["*"]
    alpha = files.certificate("spiffe://test/alpha", "predict:model/alpha")
    tricks = [
        (files.certificate("spiffe://test/x;URI=spiffe://test/alpha"), "PERMISSION_DENIED"),
        (files.certificate("spiffe://test/x,spiffe://test/alpha"), "PERMISSION_DENIED"),
        (
            Credential(certificate=files.authority.issue("x", x509.DNSName("a;URI=spiffe://test/alpha"))),
            "PERMISSION_DENIED",
        ),
        (Credential(certificate=files.authority.issue("x,CN=admin")), "PERMISSION_DENIED"),
        (Credential(certificate=files.authority.issue('x";URI="admin')), "PERMISSION_DENIED"),
        (Credential(certificate=files.authority.issue("admin")), "OK"),
        (alpha, "OK"),
    ]
    path = "/forno.v1.Predictor/Predict"
    with SecuredServer(files, files.settings(**locks), transport, certificate=alpha.certificate) as server:
        assert [server.rpc(path, predict("alpha"), who)[0] for who, _ in tricks] == [code for _, code in tricks]


def test_what_envoy_and_python_are_is_not_told(server):
    for path in ("/health", "/nowhere", "/v1/models/none", "/v1/%2f", "/metrics"):
        reply = server.rest("GET", path, Credential())
        told = str(reply.headers) + reply.body.decode()
        for word in ("envoy", "python", "grpcio", "Traceback", "/tmp", ".py", ".sock"):
            assert word.lower() not in told.lower(), (path, told)
