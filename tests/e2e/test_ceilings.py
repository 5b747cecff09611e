"""What a server takes at most: connections, memory and open files. At its ceiling it refuses, and goes on."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import FLEET, FornoServer
from tests.e2e.hosts import eventually
from tests.e2e.raw_http2 import RawClient

from forno.client import Client
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def test_calls_above_the_ceiling_of_memory_are_refused(tmp_path, transport):
    path = settings(tmp_path, max_heap_bytes=1 << 20)  # less than it takes to start
    with FornoServer(path, transport=transport, ready=False) as server:
        eventually(lambda: str(server.port) in server.output(), 30)
        stub = predictor_pb2_grpc.PredictorStub(server.channel)

        def refused() -> bool:
            try:
                stub.ListModels(predictor_pb2.ListModelsRequest(), timeout=5, wait_for_ready=True)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        eventually(refused)
        reply = server.http("GET", "/v1/models")
        assert (reply.status, json.loads(reply.body)["code"]) == (503, 14)
    with (
        FornoServer(settings(tmp_path, max_heap_bytes=4 << 30), transport=transport) as server,
        Client(server.target) as client,
    ):
        assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()


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
HALF = (
    b"POST /v1/models/echo:predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
)


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
        FornoServer(settings(tmp_path, idle_call_s=IDLE_S), transport=transport) as server,
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
            one.sendall(HALF)
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
