"""The ends of a server: who watches its health is told and let go, and what a killed one leaves is cleaned away."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e.forno_server import FLEET, TRANSPORTS, FornoServer, environment
from tests.e2e.hosts import eventually

from forno.server.config import Config
from forno.server.repository import find
from forno.server.transport.envoy import supervisor
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

SETTINGS = "models: {echo: {engine: 'null', 'null': {shape: [-1, 2]}}}\n"
STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "forno.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The servers' folder for temporary files, theirs alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_watches_is_told_of_the_end_and_does_not_delay_it(settings, transport):
    with FornoServer(settings, transport=transport) as server:
        health = health_pb2_grpc.HealthStub(server.channel)

        def watch_of(name: str) -> Any:
            return health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30)

        watches, unknown = [watch_of(name) for name in ("", "echo", "echo")], watch_of("echoes")
        assert [next(watch).status for watch in watches] == [STATUS.SERVING] * 3
        assert next(unknown).status == STATUS.SERVICE_UNKNOWN
        watches.pop().cancel()  # the other who watches this model is still told
        server.process.send_signal(signal.SIGTERM)
        begun_s = time.monotonic()
        assert [next(watch).status for watch in watches] == [STATUS.NOT_SERVING] * 2
        for watch in (*watches, unknown):
            with pytest.raises(grpc.RpcError) as ending:
                next(watch)
            assert ending.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(20) == 0, server.output()
        assert time.monotonic() - begun_s < 5  # not the 10 s that draining may take
        assert "cut off" not in server.output()


def test_what_a_killed_server_leaves_is_removed_by_the_next_and_what_lives_is_not(settings, temporary):
    with FornoServer(settings) as killed:
        [left] = temporary.iterdir()
        killed.process.kill()
        killed.process.wait()
        assert eventually(lambda: not (left / "admin.sock").exists() or not _admin_answers(left))
    with FornoServer(settings) as living:
        folders = {path for path in temporary.iterdir() if path != left}
        for folder in (left, *folders):
            os.utime(folder, (0, 0))  # neither is new
        with FornoServer(settings):
            assert eventually(lambda: not left.exists())
            assert all(folder.exists() for folder in folders)
        assert living.process.poll() is None
    assert list(temporary.iterdir()) == []


def _admin_answers(folder: Path) -> bool:
    from forno.server.transport.envoy import admin

    return bool(admin.ask(folder / "admin.sock", "GET", "/ready"))


@pytest.mark.parametrize("transport", [*TRANSPORTS, FLEET])
def test_a_server_that_is_told_to_end_accepts_nobody_and_answers_what_it_has(tmp_path, transport):
    path = tmp_path / "forno.yaml"
    path.write_text(
        "models: {slow: {engine: 'null', 'null': {shape: [-1, 2], delay_us: 100000}, batching: {max_rows: 1}}}\n"
    )
    with FornoServer(path, transport=transport) as server:
        stub = predictor_pb2_grpc.PredictorStub(server.channel)
        request = predictor_pb2.PredictRequest(model="slow", inputs=[tensors.encode("x", np.ones((1, 2), np.float32))])
        calls = [stub.Predict.future(request, timeout=20) for _ in range(8)]
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        if transport != "grpc":
            kept.request("GET", "/health")
            assert kept.getresponse().read()
        eventually(calls[0].done)
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", server.port), 1).close()
            except OSError:
                return True
            return False

        eventually(refused, 0.5)
        assert server.process.poll() is None
        if transport != "grpc":
            kept.request("GET", "/health")
            assert kept.getresponse().headers["connection"] == "close"
        for call in calls:
            assert call.result().model == "slow"
        assert server.process.wait(20) == 0, server.output()
        assert "cut off" not in server.output()


@pytest.mark.parametrize(
    ("heard", "said"),
    [(True, b""), (False, b""), (True, b"reload 1000\nthe first bytes")],
    ids=["between messages", "before it has heard all", "in the middle of a message"],
)
def test_a_server_ends_with_whoever_has_started_it_whenever_that_goes(tmp_path, heard, said):
    config = Config.model_validate({"models": {"echo": {"engine": "null", "null": {"shape": [-1, 2]}}}})
    errand = {"config": config, "specs": find([], config), "address": "", "rest": False, "replica": 0}
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "forno.server.fleet.grpc_replica", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            command, env=environment(), pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True
        ) as replica,
    ):
        theirs.close()
        try:
            ours.sendall(supervisor.packed({**errand, "socket": str(tmp_path / "replica.sock")}))
            ours.settimeout(20)
            assert ours.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL) == b"ready "
            if heard:
                ours.recv(1 << 16)
            ours.sendall(said)
            ours.close()
            assert replica.wait(10) == 0
            assert "Traceback" not in replica.communicate()[1]
        finally:
            replica.kill()
