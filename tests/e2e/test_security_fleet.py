"""Locks hold for replicas behind one edge as for one server."""

from __future__ import annotations

import collections
import contextlib
import tempfile
import time

import pytest
from tests.e2e.secured import ROWS, Credential, Secured, SecuredServer, keyed_server, predict

from forno.server.security import keys

PREDICT = "/forno.v1.Predictor/Predict"


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


def test_replicas_ask_what_one_server_asks(tmp_path):
    files = Secured(tmp_path)
    alpha, pages = files.key("predict:model/alpha"), files.key("metrics", "predict")
    certificate = files.certificate("spiffe://test/alpha")
    forged = Credential({"x-forno-peer": "", "x-forwarded-client-cert": "URI=spiffe://test/alpha"})
    server = SecuredServer(files, files.settings(**files.all_locks()), "envoy")
    server._command += ["--replicas", "2"]
    with server:
        seen = [
            [server.rpc(PREDICT, predict(model), credential)[0] for model in ("alpha", "beta")]
            for credential in (alpha, pages, certificate, Credential(), forged)
        ]
        assert seen == [
            ["OK", "PERMISSION_DENIED"],
            ["OK", "OK"],
            ["OK", "PERMISSION_DENIED"],
            ["UNAUTHENTICATED", "UNAUTHENTICATED"],
            ["UNAUTHENTICATED", "UNAUTHENTICATED"],
        ]
        paths = [server.rest("POST", f"/v1/models/{model}:predict", alpha, ROWS).status for model in ("alpha", "beta")]
        assert paths == [200, 403]
        assert [server.rest("GET", "/metrics", each).status for each in (Credential(), alpha, pages)] == [401, 403, 200]
        assert server.rest("GET", "/ready", Credential()).body == b'{"ready":true,"models":{}}'
        new = files.key("predict")  # good at once, whichever replica it meets
        assert {server.rpc(PREDICT, predict("alpha"), new)[0] for _ in range(8)} == {"OK"}
        keys.remove(files.keys_file, new.headers["X-Api-Key"].split("_")[1])
        time.sleep(1.2)
        assert {server.rpc(PREDICT, predict("alpha"), new)[0] for _ in range(8)} == {"UNAUTHENTICATED"}


def test_replicas_count_a_client_together(tmp_path):
    """The burst, and from then on the rate, whichever replica each call meets; other clients have theirs."""
    files = Secured(tmp_path)
    one, other, pages = files.key("predict"), files.key("predict"), files.key("metrics")
    limit = {"calls_per_s": 20, "burst": 30}
    server = keyed_server(files, rate_limit=limit, anonymous=["health"])
    server._command += ["--replicas", "3"]
    with server, contextlib.ExitStack() as stack:
        calls = [stack.enter_context(server.connect()).unary_unary(PREDICT) for _ in range(6)]
        request = predict("alpha").SerializeToString()
        seen: collections.Counter[str] = collections.Counter()
        began_s = time.monotonic()
        while (took_s := time.monotonic() - began_s) < 2.0:
            asked = [call.future(request, metadata=one.metadata, timeout=10) for call in calls]
            seen.update(future.code().name for future in asked)
        assert set(seen) == {"OK", "RESOURCE_EXHAUSTED"}
        assert 0.95 * (30 + 20 * took_s) - 1 <= seen["OK"] <= 1.02 * (30 + 20 * (time.monotonic() - began_s)) + 1
        assert server.rpc(PREDICT, predict("alpha"), other)[0] == "OK"
        told = server.rest("GET", "/metrics", pages).body.decode()
        words = ('"RESOURCE_EXHAUSTED"', 'Predictor/Predict"', "replica=")
        refused = [line for line in told.splitlines() if all(word in line for word in words)]
        assert len(refused) == 3, told
        assert sum(float(line.rpartition(" ")[2]) for line in refused) == seen["RESOURCE_EXHAUSTED"]
