"""Who calls is asked before a message is taken in: strangers are told at once, and cannot fill the memory."""

from __future__ import annotations

import contextlib
import socket
import time

import numpy as np
import pytest
from tests.e2e.hosts import eventually
from tests.e2e.raw_http2 import RawClient, frame
from tests.e2e.secured import Credential, Secured, SecuredServer, keyed_server, predict

from forno.v1 import predictor_pb2, tensors

PREDICT = "/forno.v1.Predictor/Predict"
TRANSPORTS = ("envoy", "proxy", "grpc", "fleet")
PATHS = ("/v1/models/alpha:predict", "/v1/alpha/run", "/v1/predict")  # past the transcoder, and through it
AT_ONCE_S = 3.0
LARGE = predictor_pb2.PredictRequest(model="alpha", inputs=[tensors.encode("x", np.ones((300, 1000), np.float32))])


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request, tmp_path_factory):
    files = Secured(tmp_path_factory.mktemp("early"))
    with keyed_server(files, request.param) as running:
        yield running


def strangers(server: SecuredServer) -> list[Credential]:
    return [Credential(), Credential({"x-api-key": "forno_00000000_AAAA"}), server.files.key("metrics")]


def test_a_stranger_hears_so_before_its_message(server):
    for credential in strangers(server):
        code = "7" if credential.known and credential.rights else "16"
        with RawClient(server.port) as client:
            for sent in (b"", frame(b"x" * 100_000)[:50_000]):
                stream = client.open("", credential.metadata, path=PREDICT)
                client.send(stream, sent)
                answer = client.answer(stream, AT_ONCE_S)
                assert (answer.status, answer.body) == (code, b"")


def upload(port: int, path: str, credential: Credential, sent: bytes, most: int = 0) -> tuple[str, int]:
    """The status told while most of a large body has not been sent, and how much more of it the server takes."""
    with socket.create_connection(("127.0.0.1", port), AT_ONCE_S) as connection:
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", "content-length: 60000000"]
        lines += [f"{name}: {value}" for name, value in credential.headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
        reply = b""
        while b"\r\n\r\n" not in reply:
            reply += connection.recv(65536)
        more = 0
        with contextlib.suppress(OSError):
            while more < most:
                more += connection.send(b" " * 65536)
        return reply.split()[1].decode(), more


def test_a_stranger_cannot_upload(server):
    if server.transport == "grpc":
        return
    for path in PATHS:
        for credential in strangers(server):
            for sent in (b"", b" " * 30_000):
                status, _ = upload(server.port, path, credential, sent)
                assert status == ("403" if credential.rights else "401")
    assert upload(server.port, PATHS[0], Credential(), b"", 60_000_000)[1] < 20_000_000


def test_who_is_known_is_taken_in_at_any_pace(server):
    """The first calls of a key, whatever comes of their bodies before it is known, and those after them."""
    body = frame(LARGE.SerializeToString())
    for pieces in (1, 3):
        for end_apart in (False, True) if server.transport in {"envoy", "fleet"} else (False,):
            credential = server.files.key("predict")
            with RawClient(server.port) as client:
                for _ in range(2):
                    stream = client.open("", credential.metadata, path=PREDICT)
                    for number in range(pieces):
                        part = body[number * len(body) // pieces : (number + 1) * len(body) // pieces]
                        client.send(stream, part, end=number + 1 == pieces and not end_apart)
                        time.sleep(0.02 * (pieces > 1))
                    if end_apart:
                        client.send(stream, b"", end=True)
                    answer = client.answer(stream)
                    assert (answer.status, len(answer.body) > 1_000_000) == ("0", True)
    if server.transport != "grpc":
        rows = b'{"inputs": {"x": [' + b",".join([b"[1.5, 2.5]"] * 3000) + b"]}}"
        for path in PATHS[:2]:
            credential = server.files.key("predict")
            for _ in range(2):
                reply = server.rest("POST", path, credential, rows)
                assert (reply.status, reply.body.count(b"2.5")) == (200, 3000)


def test_a_key_that_is_taken_back_is_a_stranger_again(server):
    credential = server.files.key("predict")
    assert server.rpc(PREDICT, predict("alpha"), credential)[0] == "OK"
    text = server.files.keys_file.read_text()
    key_id = credential.headers["X-Api-Key"].split("_")[1]
    lines = [line for line in text.splitlines(keepends=True) if key_id not in line]
    server.files.keys_file.write_text("".join(lines))
    eventually(lambda: server.rpc(PREDICT, predict("alpha"), credential)[0] != "OK", 8)
    with RawClient(server.port) as client:
        stream = client.open("", credential.metadata, path=PREDICT)
        assert client.answer(stream, AT_ONCE_S).status == "16"
