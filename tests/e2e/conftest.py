"""One running server a transport, shared by all tests that leave it as they found it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from tests.e2e.forno_server import FLEET, ROOT, TRANSPORTS, FornoServer
from tests.e2e.models import make_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# Servers inherit what is ignored: they would not hear of a hangup under nohup, nor of ^C in the background of a script.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def servers(repository: Path) -> Iterator[dict[str, FornoServer]]:
    """Started when first asked for, by transport."""
    running: dict[str, FornoServer] = {}
    try:
        yield running
    finally:
        for server in running.values():
            server.__exit__(None, None, None)


def _server(running: dict[str, FornoServer], repository: Path, transport: str) -> FornoServer:
    if transport not in running:
        limit = "server.max_message_bytes=8388608"
        server = FornoServer(ROOT / "examples" / "forno.yaml", repository, "--set", limit, transport=transport)
        running[transport] = server.__enter__()
    return running[transport]


@pytest.fixture(params=[*TRANSPORTS, FLEET])
def server(request: pytest.FixtureRequest, servers: dict[str, FornoServer], repository: Path) -> FornoServer:
    """The demo models and those of models.py, on each transport."""
    return _server(servers, repository, request.param)


@pytest.fixture(params=[*(name for name in TRANSPORTS if name != "grpc"), FLEET])
def rest_server(request: pytest.FixtureRequest, servers: dict[str, FornoServer], repository: Path) -> FornoServer:
    """As `server`, on the transports that speak REST."""
    return _server(servers, repository, request.param)
