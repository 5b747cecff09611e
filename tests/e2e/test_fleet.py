"""A fleet as its user meets it: started, looked at, scaled, reloaded, killed, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.forno_server import FornoServer, forno
from tests.e2e.hosts import eventually

from forno.client import Client, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = """
models:
  echo: {{engine: 'null', 'null': {{shape: [-1, 4], delay_us: {delay_us}}}}}
"""
X = np.arange(4, dtype=np.float32)[None]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where all files of a fleet lie, so that a test can see what is left; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "temporary").mkdir()
        monkeypatch.setenv("TMPDIR", str(path / "temporary"))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        (path / "forno.yaml").write_text(SETTINGS.format(delay_us=1000))
        yield path


@contextlib.contextmanager
def fleet(
    folder: Path, replicas: int = 2, *args: str, transport: str = "envoy", ready: bool = True
) -> Iterator[FornoServer]:
    more = ("--replicas", str(replicas), *args)
    with FornoServer(folder / "forno.yaml", *more, transport=transport, ready=ready) as server:
        if ready:
            eventually(lambda: "forno fleet status" in server.output(), 30)
        yield server


def family(pid: int) -> dict[int, str]:
    """Processes that `pid` has started, and their titles."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                title = (path.parent / "cmdline").read_bytes().split(b"\0")[0].decode()
                found[int(path.parent.name)] = title
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def left(folder: Path) -> list[str]:
    """Files and sockets of fleets that have ended; the empty folder of control sockets stays."""
    temporary = folder / "temporary"
    return [str(path.relative_to(temporary)) for path in temporary.rglob("forno*") if "forno-control" not in path.name]


@pytest.mark.parametrize("transport", ["envoy", "grpc"])
def test_a_fleet_serves_grpc_and_rest_and_its_owner_controls_it(folder, transport):
    with fleet(folder, 2, transport=transport) as server:
        with Client(server.target) as client:
            assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        reply = server.http("POST", "/v1/models/echo:predict", b'{"instances": [[1, 2, 3, 4]]}')
        assert (reply.status, reply.body) == (200, b'{"predictions":[[1.0,2.0,3.0,4.0]]}')
        assert server.http("GET", "/ready").body == b'{"ready":true,"models":{"echo":{"1":"ready"}}}'
        health = health_pb2_grpc.HealthStub(server.channel)
        for name in ("", "echo", "forno.v1.Predictor"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        titles = sorted(family(server.process.pid).values())
        assert titles[0] == "forno: edge"
        assert "forno: janitor" in titles
        assert any(title.startswith("forno: replica 1") for title in titles)

        done = forno("fleet", "scale", "3")
        assert done.returncode == 0, done.stderr
        assert f"{server.target}: 3 of 3 replicas ready" in done.stdout
        assert forno("fleet", "scale", "1").stdout.count(" ready ") == 1
        before = family(server.process.pid)
        assert forno("fleet", "restart", "--address", server.target).returncode == 0
        after = family(server.process.pid)
        assert len(after) == len(before)
        assert len(after.keys() & before.keys()) == 2  # edge and janitor
        assert "replicas is 0, expected a whole number from 1 to 256" in forno("fleet", "scale", "0").stderr
        assert forno("fleet", "status", "--address", "h:1").returncode == 2

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.output()
        assert "Traceback" not in server.output()
    assert not left(folder)


def test_metrics_have_every_replica_and_sums_that_survive_it(folder):
    def samples() -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        for one in text_string_to_metric_families(server.http("GET", "/metrics").body.decode()):
            for sample in one.samples:
                if sample.labels.get("outcome", "ok") == "ok":
                    key = sample.name, sample.labels.get("replica", "")
                    found[key] = found.get(key, 0.0) + sample.value
        return found

    with fleet(folder, 2) as server:
        with Client(server.target) as client:
            for _ in range(20):
                client.predict("echo", {"x": X})
        seen = samples()
        counts = [seen["forno_requests_total", index] for index in "01"]
        assert sum(counts) == seen["forno_fleet_requests_total", ""] >= 20
        assert min(counts) > 0
        assert seen["forno_replicas", ""] == 4.0  # two wanted, two serving
        assert forno("fleet", "restart").returncode == 0
        again = samples()
        assert again["forno_fleet_requests_total", ""] >= seen["forno_fleet_requests_total", ""]


def test_a_session_stays_on_one_replica_and_outlives_its_restart(folder):
    def calls() -> list[int]:
        """Of each replica, so far."""
        return [int(line.split()[7]) for line in forno("fleet", "status").stdout.splitlines()[2:]]

    def place_of(session: str) -> int:
        before = calls()
        for _ in range(5):
            body = b'{"instances": [[1, 2, 3, 4]]}'
            assert server.http("POST", "/v1/models/echo:predict", body, {"x-session": session}).status == 200
        gained = [after - was for after, was in zip(calls(), before, strict=True)]
        assert sorted(gained) == [0, 5]
        return gained.index(5)

    with fleet(folder, 2, "--set", "fleet.affinity_header=x-session") as server:
        places = {session: place_of(session) for session in ("a", "b")}
        assert forno("fleet", "restart").returncode == 0
        assert {session: place_of(session) for session in ("a", "b")} == places


def test_settings_are_read_again_and_wrong_ones_change_nothing(folder):
    def took_s() -> float:
        began_s = time.perf_counter()
        with Client(server.target) as client:
            client.predict("echo", {"x": X})
        return time.perf_counter() - began_s

    settings = folder / "forno.yaml"
    with fleet(folder, 2) as server:
        assert took_s() < 0.3
        settings.write_text(SETTINGS.format(delay_us=400_000))
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: took_s() >= 0.4, 20)
        eventually(lambda: '"reloaded"' in server.output(), 20)
        settings.write_text("models: {echo: {engin: 'null'}}")
        done = forno("fleet", "reload")
        assert done.returncode == 1
        assert "models.echo.engin is not a setting; did you mean `engine`?" in done.stderr
        settings.write_text(SETTINGS.format(delay_us=0) + "server: {max_message_bytes: 2048}\n")
        assert "the server is started again: server.max_message_bytes\n" in forno("fleet", "reload").stderr
        assert took_s() < 0.3  # the rest has changed
        (folder / "broken.onnx").write_bytes(b"no model")
        settings.write_text("models: {echo: {path: broken.onnx}}")
        assert forno("fleet", "reload").returncode == 1
        assert took_s() < 0.3
        assert "2 of 2 replicas ready" in forno("fleet", "status").stdout


def test_a_fleet_that_cannot_serve_says_why_and_leaves_nothing(folder):
    (folder / "broken.onnx").write_bytes(b"no model")
    (folder / "forno.yaml").write_text("models: {echo: {path: broken.onnx}}")
    with fleet(folder, 2, ready=False) as server:
        assert server.process.wait(30) == 2, server.output()
        assert "broken.onnx" in server.output()
        assert "Traceback" not in server.output()
    assert not left(folder)


def test_a_second_fleet_on_the_same_port_says_so(folder):
    with fleet(folder, 1) as server:
        done = forno("serve", folder / "forno.yaml", "--replicas", "2", "--address", server.target)
        assert done.returncode == 2
        assert f"cannot listen on {server.target}: address already in use" in done.stderr
        assert "1 of 1 replicas ready" in forno("fleet", "status").stdout


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_is_left_of_a_fleet_whose_supervisor_is_killed(folder, stopped):
    with fleet(folder, 2) as server:
        started = family(server.process.pid)
        assert len(started) == 4
        if stopped:
            os.kill(next(pid for pid, title in started.items() if "replica" in title), signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        try:
            eventually(lambda: not [pid for pid in started if alive(pid)])
        finally:
            for pid in filter(alive, started):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not left(folder))


def test_an_edge_that_dies_is_started_again(folder):
    with fleet(folder, 1) as server:
        (edge,) = [pid for pid, title in family(server.process.pid).items() if title == "forno: edge"]
        os.kill(edge, signal.SIGKILL)

        def serves() -> bool:
            with contextlib.suppress(RequestError), Client(server.target, timeout_s=1) as client:
                return bool(client.predict("echo", {"x": X}).outputs)
            return False

        eventually(serves, 10)
        assert "the edge ended with status -9; starting it again" in server.output()


def test_a_fleet_that_is_stopped_finishes_its_calls(folder):
    (folder / "forno.yaml").write_text(SETTINGS.format(delay_us=300_000))
    outcomes: list[bool] = []

    def call() -> None:
        with Client(server.target) as client:
            outcomes.append(client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist())

    with fleet(folder, 2) as server:
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(15) == 0, server.output()
        assert outcomes == [True] * 8
