"""What a server takes at most: connections, memory and open files. At its ceiling it refuses, and goes on."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import FLEET, FornoServer
from tests.e2e.hosts import eventually

from forno.client import Client
from forno.v1 import predictor_pb2, predictor_pb2_grpc

BEHIND_ENVOY = ("envoy", "proxy", FLEET)
X = np.ones((1, 2), np.float32)


def settings(folder: Path, **server: int) -> Path:
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
