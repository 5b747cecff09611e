"""What a server takes at most: connections, memory and open files. At its ceiling it refuses, and goes on."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from bench.process import free_port
from tests.e2e.forno_server import FLEET, FornoServer
from tests.e2e.hosts import eventually
from tests.e2e.raw_http2 import RawClient, frame

from forno.client import Client
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEHIND_ENVOY = ("envoy", "proxy", FLEET)
X = np.ones((1, 2), np.float32)


def settings(folder: Path, **server: float) -> Path:
    path = folder / "forno.yaml"
    model = {"engine": "null", "null": {"shape": [-1, 2]}}
    path.write_text(json.dumps({"server": server, "models": {"echo": model}}))
    return path


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed it, within a moment."""
    connection.settimeout(0.02)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("transport", BEHIND_ENVOY)
def test_connections_above_the_ceiling_are_closed_and_those_below_it_served(tmp_path, transport):
    with (
        FornoServer(settings(tmp_path, max_connections=20), transport=transport) as server,
        Client(server.target) as client,
    ):
        client.predict("echo", {"x": X})
        with contextlib.ExitStack() as opened:
            idle = [opened.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(30)]
            eventually(lambda: sum(map(closed, idle)) >= 10)
            assert sum(map(closed, idle)) <= 13  # the clients of this test have connections too
            assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()

        def admitted() -> bool:
            with contextlib.suppress(OSError):
                return server.http("GET", "/health").status == 200
            return False

        eventually(admitted)


@pytest.mark.parametrize("transport", BEHIND_ENVOY)
def test_work_above_the_ceiling_of_memory_is_refused_and_who_looks_after_the_server_is_answered(tmp_path, transport):
    path = settings(tmp_path, max_heap_bytes=1 << 20)  # less than it takes to start
    admin = f"127.0.0.1:{free_port()}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"security": {"admin_address": admin}}))
    request = predictor_pb2.PredictRequest(model="echo", inputs=[tensors.encode("x", X)])
    with FornoServer(path, transport=transport) as server:  # it says SERVING, as its health check goes on answering
        stub = predictor_pb2_grpc.PredictorStub(server.channel)
        eventually(lambda: _status(stub.Predict, request) == "UNAVAILABLE")
        calls = {"Predict": request, "Invoke": predictor_pb2.InvokeRequest(endpoint="a/b")}
        for name, message in calls.items():
            with pytest.raises(grpc.RpcError) as caught:
                getattr(stub, name)(message, timeout=5)
            assert "server.max_heap_bytes" in caught.value.details()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        items = iter([predictor_pb2.PredictStreamRequest(request=request)])
        assert _status(lambda of, timeout: [*stub.PredictStream(of, timeout=timeout)], items) == "UNAVAILABLE"
        for work in ("/v1/models/echo:predict", "/v1/predict", "/v1/some/endpoint"):
            reply = server.http("POST", work, b'{"instances": [[1, 1]]}')
            body = json.loads(reply.body)
            assert (reply.status, body["code"], reply.headers["retry-after"]) == (503, 14, "1")
            assert "server.max_heap_bytes" in body["message"]
        server.wait_ready()
        assert server.http("GET", "/ready").status == server.http("GET", "/health").status == 200
        assert server.http("GET", "/v1/models").status == 200
        assert "echo" in [one.name for one in stub.ListModels(predictor_pb2.ListModelsRequest(), timeout=5).models]
        with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as metrics:
            assert b"forno_rpcs_total" in metrics.read()
        assert "refusing work" in server.output()
    with (
        FornoServer(settings(tmp_path, max_heap_bytes=4 << 30), transport=transport) as server,
        Client(server.target) as client,
    ):
        assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()


def _status(call: Callable[..., object], request: object) -> str:
    try:
        call(request, timeout=5)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize(("hard", "warned"), [(4096, True), (18_000, False)])
def test_as_many_files_may_be_open_as_the_machine_allows(tmp_path, hard, warned):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 18_000:
        pytest.skip(f"the hard limit here is {before[1]}")
    server = FornoServer(settings(tmp_path))
    server._command[:0] = ["bash", "-c", f'ulimit -n {hard}; ulimit -Sn 512; exec "$@"', "-"]
    with server:
        [line] = [
            line for line in Path(f"/proc/{server.process.pid}/limits").read_text().splitlines() if "open" in line
        ]
        assert line.split()[3:5] == [str(hard)] * 2
        warnings = [line for line in server.output().splitlines() if "server.max_connections" in line]
        assert len(warnings) == warned
        assert all(f"only {hard} files" in line for line in warnings)


IDLE_S = 1.0


def head(path: str, more: str = "content-length: 99") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{more}\r\n\r\n".encode()


@pytest.mark.parametrize("transport", BEHIND_ENVOY)
def test_bodies_that_do_not_come_end_their_calls_and_lasting_streams_may_be_silent(tmp_path, transport):
    def item() -> predictor_pb2.PredictStreamRequest:
        request = predictor_pb2.PredictRequest(model="echo", inputs=[tensors.encode("x", X)])
        return predictor_pb2.PredictStreamRequest(request=request)

    def items() -> Iterator[predictor_pb2.PredictStreamRequest]:
        yield item()
        time.sleep(2.5 * IDLE_S)
        yield item()

    with (
        FornoServer(settings(tmp_path, max_call_s=IDLE_S), transport=transport) as server,
        Client(server.target) as client,
        RawClient(server.port) as raw,
        contextlib.ExitStack() as opened,
    ):
        stub = predictor_pb2_grpc.PredictorStub(server.channel)
        answers = stub.PredictStream(items(), timeout=20)
        next(answers)
        begun_s = time.monotonic()
        slow = [opened.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(50)]
        for one in slow:
            one.settimeout(10)
            one.sendall(head("/v1/models/echo:predict") + b"{")
        streams = [raw.open("", path="/forno.v1.Predictor/Predict") for _ in range(50)]
        for stream in streams:
            raw.send(stream, b"\0\0\0\0\x63half")
        while time.monotonic() < begun_s + IDLE_S / 2:
            assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        for one in slow:
            assert one.recv(4096).startswith(b"HTTP/1.1 504 ")
        for stream in streams:
            answer = raw.answer(stream)
            assert answer.ended or answer.reset is not None
            assert answer.status != "0"
        assert IDLE_S * 0.9 < time.monotonic() - begun_s < IDLE_S + 1.5
        assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        next(answers)  # its second item comes after more silence than others may keep
        assert time.monotonic() - begun_s > 2 * IDLE_S
        assert [*answers] == []


@pytest.mark.parametrize("transport", BEHIND_ENVOY)
def test_bodies_that_trickle_end_their_calls_however_often_a_byte_comes(tmp_path, transport):
    heads = (
        head("/v1/models/echo:predict"),
        head("/v1/some/endpoint"),
        head("/v1/some/endpoint", "content-length: 99\r\ngrpc-timeout: 1H"),
        head("/no/such/path"),
    )
    stream_path = "/forno.v1.Predictor/PredictStream"
    paths = ["/forno.v1.Predictor/Predict", "/forno.v1.Predictor/Invoke", "/no.such/Method"]
    paths += [stream_path] * (transport != "proxy")  # there, nobody looks at how messages come
    with (
        FornoServer(settings(tmp_path, max_call_s=IDLE_S), transport=transport) as server,
        RawClient(server.port) as raw,
        contextlib.ExitStack() as opened,
    ):
        begun_s = time.monotonic()
        slow = [opened.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in heads]
        for one, text in zip(slow, heads, strict=True):
            one.sendall(text)
        streams = [raw.open("", [("grpc-timeout", "1H")], path=path) for path in paths]
        for stream in streams:
            raw.send(stream, b"\0\0\0\0\x63")
        answered: dict[int, bytes] = {}
        while time.monotonic() < begun_s + 3 * IDLE_S and not (
            len(answered) == len(slow) and all(raw.answers[stream].ended for stream in streams)
        ):
            for index, one in enumerate(slow):
                if index not in answered:
                    with contextlib.suppress(OSError):
                        one.sendall(b" ")
                    one.settimeout(0.01)
                    with contextlib.suppress(TimeoutError):
                        answered[index] = one.recv(4096)
            for stream in streams:
                if not (raw.answers[stream].ended or raw.answers[stream].reset):
                    raw.send(stream, b"x")
            raw.receive(0.05)
        assert [answered[index].split(b" ")[1] for index in range(len(slow))] == [b"504"] * 3 + [b"404"]
        for path, stream in zip(paths, streams, strict=True):
            assert raw.answers[stream].status == ("12" if path.startswith("/no") else "4"), (path, raw.answers[stream])


@pytest.mark.parametrize("transport", ["envoy", FLEET])
def test_a_stream_lasts_longer_than_a_call_may_take_where_its_messages_come_whole(tmp_path, transport):
    request = predictor_pb2.PredictRequest(model="echo", inputs=[tensors.encode("x", X)])
    data = frame(predictor_pb2.PredictStreamRequest(request=request).SerializeToString())
    with (
        FornoServer(settings(tmp_path, max_call_s=IDLE_S), transport=transport) as server,
        RawClient(server.port) as raw,
    ):
        stream = raw.open("", path="/forno.v1.Predictor/PredictStream")
        begun_s = time.monotonic()
        sent = b""
        while time.monotonic() < begun_s + 2 * IDLE_S:
            sent = sent or data * 2  # never a moment without a part of a message
            piece, sent = sent[: len(data) - 3], sent[len(data) - 3 :] + data
            raw.send(stream, piece)
            raw.receive(IDLE_S / 5)
        answer = raw.answers[stream]
        assert not answer.ended
        assert answer.reset is None
        assert answer.body.count(b"echo") > 3
