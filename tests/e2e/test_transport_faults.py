"""Processes that die and connections that break, at the worst moment: the server goes on, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from tests.e2e import hosts
from tests.e2e.forno_server import TRANSPORTS, FornoServer, forno
from tests.e2e.hosts import Host, eventually

from forno.server.transport.envoy import supervisor
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW_S = 0.25
SETTINGS = """
models:
  slow: {{engine: 'null', 'null': {{delay_us: {delay_us}, shape: [-1, 2]}}, batching: {{max_rows: 64}}}}
"""

# Every kind of call at once, without end. Run as a program of its own, so that it can be killed.
CLIENT = """
import asyncio, json, sys
import grpc

async def main(target):
    channel = grpc.aio.insecure_channel(target)
    method = lambda kind, name: getattr(channel, kind)("/test.Conformance/" + name)
    async def endless():
        while True:
            yield b"x" * 10000
    async def again(call):
        while True:
            await call()
    async def both():
        async for _ in method("stream_stream", "BothStreams")(endless()):
            pass
    async def download():
        async for _ in method("unary_stream", "ServerStream")(b'{"count": 100000, "size": 10000}'):
            pass
    unary = method("unary_unary", "Unary")
    work = [again(lambda: unary(b'{"sleep": 0.01}')) for _ in range(50)]
    work += [again(lambda: unary(b"{}" + b" " * 20000)) for _ in range(10)]
    work += [unary(b'{"sleep": 3600}') for _ in range(50)]
    work += [method("stream_unary", "ClientStream")(endless()) for _ in range(5)]
    work += [both() for _ in range(5)] + [download() for _ in range(5)]
    await asyncio.gather(*work)

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module", params=hosts.TRANSPORTS)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with hosts.serve(request.param) as host:
        yield host


def test_clients_killed_under_load_leave_no_handler_and_no_memory(host):
    memory_bytes: list[int] = []
    for delay_s in (0.3, 0.3, 0.15, 0.05, 0.0):
        client = subprocess.Popen([sys.executable, "-c", CLIENT, host.target])
        try:
            eventually(lambda: host.ask("running").get("unary", 0) >= 50, 20)
            time.sleep(delay_s)
        finally:
            client.kill()
            client.wait()
        eventually(lambda: not host.ask("running"), 20)
        memory_bytes.append(host.resident_bytes())
    if host.transport == "envoy":  # grpc.aio keeps tasks of its own
        assert host.ask("tasks") < 10
    # The first clients fill the buffers that the process then keeps (30 to 80 MB), how far is a matter of timing.
    assert memory_bytes[-1] < memory_bytes[1] + (50 << 20)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of a server with a slow model, whose temporary files lie where a test can look for them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    path = tmp_path / "forno.yaml"
    path.write_text(SETTINGS.format(delay_us=int(SLOW_S * 1e6)))
    return path


@pytest.fixture
def quick(settings: Path) -> Path:
    """The same where nothing has to be in flight: slow runs are slow to warm up."""
    settings.write_text(SETTINGS.format(delay_us=0))
    return settings


def predict(channel: grpc.Channel, wait_for_ready: bool = False) -> predictor_pb2.PredictResponse:
    """One call of the slow model."""
    request = predictor_pb2.PredictRequest(model="slow")
    request.inputs.append(tensors.encode("x", np.ones((1, 2), np.float32)))
    return predictor_pb2_grpc.PredictorStub(channel).Predict(request, timeout=10, wait_for_ready=wait_for_ready)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that these have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(path.parent.name)
                found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] != "Z" or fields[17] not in ("0", "1")  # its first thread may end before the others
    return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_is_stopped_finishes_its_calls_and_leaves_nothing(settings, tmp_path, transport):
    outcomes: list[str] = []

    def call() -> None:
        with grpc.insecure_channel(server.target) as channel:
            try:
                predict(channel)
                outcomes.append("OK")
            except grpc.RpcError as error:
                outcomes.append(str(error))

    with FornoServer(settings, transport=transport) as server:
        started = [server.process.pid, *children(server.process.pid)]
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(SLOW_S / 2)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(10) == 0, server.output()
        assert outcomes == ["OK"] * 8
        with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as refusal:
            predict(channel)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not [pid for pid in started if alive(pid)]
        assert list((tmp_path / "temporary").iterdir()) == []
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_is_stopped_under_load_ends_in_time(settings, transport):
    """Callers that never stop calling are refused or served, and do not keep the server alive."""
    stop = threading.Event()
    codes: dict[str, int] = {}

    def call() -> None:
        with grpc.insecure_channel(server.target) as channel:
            while not stop.is_set():
                try:
                    predict(channel)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                codes[code] = codes.get(code, 0) + 1

    with FornoServer(settings, transport=transport) as server:
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(SLOW_S * 1.5)
            server.process.send_signal(signal.SIGTERM)
            begun_s = time.monotonic()
            assert server.process.wait(20) == 0, server.output()
            assert time.monotonic() - begun_s < 6  # not the 10 s that draining may take
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert codes.pop("OK") >= 8
        assert set(codes) <= {"UNAVAILABLE"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_outlives_a_server_that_is_killed(quick, transport):
    with FornoServer(quick, transport=transport) as server:
        started = children(server.process.pid)
        assert bool(started) == (transport != "grpc")
        server.process.kill()
        server.process.wait()
        try:
            eventually(lambda: not [pid for pid in started if alive(pid)])
        finally:
            for pid in filter(alive, started):
                os.kill(pid, signal.SIGKILL)


def test_a_server_whose_envoy_dies_says_so_and_ends(quick):
    with FornoServer(quick) as server:
        (envoy, *_) = children(server.process.pid)
        os.kill(envoy, signal.SIGKILL)
        assert server.process.wait(10) == 1
        assert "the server ended unexpectedly" in server.output()


@pytest.mark.parametrize("transport", ["envoy", "grpc"])
def test_a_second_server_on_the_same_port_says_so(quick, transport):
    with FornoServer(quick, transport=transport) as server:
        second = forno("serve", quick, "--address", server.target, "--transport", transport)
        assert second.returncode == 2
        assert f"cannot listen on {server.target}: address already in use" in second.stderr
        assert "Traceback" not in second.stderr
        predict(server.channel)


def test_envoy_does_not_share_a_port_that_was_taken_after_the_check(monkeypatch):
    def read_late(envoy: supervisor.Envoy, descriptor: int) -> None:
        time.sleep(0.2)  # as where the machine is busy: its last words are told nevertheless
        read(envoy, descriptor)

    read = supervisor.Envoy._read_log
    with hosts.serve("envoy") as first:
        monkeypatch.setattr(hosts, "free_port", lambda: first.port)
        monkeypatch.setattr(supervisor.Envoy, "_read_log", read_late)
        with pytest.raises(AssertionError, match="Address already in use"), hosts.serve("envoy") as second:
            eventually(lambda: not alive(second.pid), 20)
        assert first.ask("pid") == first.pid
