"""A server on a Unix socket: who may connect, what is left of dead servers, and what is refused."""

from __future__ import annotations

import contextlib
import signal
import socket
import stat
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.e2e.forno_server import TRANSPORTS, FornoServer, forno
from tests.e2e.hosts import eventually

from forno.client import Client
from forno.server.transport.envoy import admin

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = "models: {echo: {engine: 'null', 'null': {shape: [-1, 2]}}}\n"
X = np.ones((1, 2), np.float32)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "forno.yaml"
    path.write_text(SETTINGS)
    return path


def refused(settings: Path, transport: str, target: str) -> str:
    """What `serve` says where it does not start."""
    done = forno("serve", settings, "--transport", transport, "--address", target)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_listens_on_a_socket_of_its_owner(settings, tmp_path, transport):
    path = tmp_path / "forno.sock"
    target = f"unix:{path}"
    with FornoServer(settings, transport=transport, target=target) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with Client(target) as client:
            assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        if transport != "grpc":
            assert admin.ask(path, "GET", "/health") == '{"status":"ok"}'
        assert f"cannot listen on {target}: address already in use" in refused(settings, transport, target)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    assert not path.exists()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_socket_of_a_dead_server_is_taken_over_and_access_can_be_widened(settings, tmp_path, transport):
    path = tmp_path / "forno.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    access = ("--set", "server.socket_access=group")
    with FornoServer(settings, *access, transport=transport, target=f"unix:{path}"):
        assert eventually(lambda: stat.S_IMODE(path.stat().st_mode)) == 0o660


def test_what_is_no_socket_is_left_alone(settings, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert f"cannot listen on unix:{path}: a file is there that is no socket" in refused(
        settings, "grpc", f"unix:{path}"
    )
    assert path.read_text() == "mine"
    assert "no such file or directory" in refused(settings, "grpc", f"unix:{tmp_path}/none/a.sock")
