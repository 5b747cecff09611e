"""The conformance service as a real process on either transport, on a free port, cleaned up in any case."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
from bench.process import free_port
from tests.e2e.forno_server import ROOTS

from forno.server.address import Address
from forno.server.config import Config, ServerSettings
from forno.server.fleet import edge as edges
from forno.server.transport.envoy import ends, supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
TRANSPORTS = ("envoy", "grpc")
WITH_EDGE = (*TRANSPORTS, "edge")  # inside Envoy again, as a replica behind the edge of a fleet
SERVICE = "test.Conformance"
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, which no other test has broken
]


@dataclass
class Host:
    """A running conformance service."""

    transport: str
    port: int
    pid: int
    log: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS)

    def ask(self, report: str, **more: object) -> Any:
        """What the service reports about itself."""
        with self.channel() as channel:
            call = channel.unary_unary(f"/{SERVICE}/Unary")
            return json.loads(call(json.dumps({"report": report, **more}).encode(), timeout=10))

    def count(self, what: str) -> int:
        return int(self.ask("count", of=what))

    def resident_bytes(self) -> int:
        """Memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def eventually(happened: Callable[[], Any], limit_s: float = 5.0) -> Any:
    """The first true value of `happened()`.

    Raises:
        AssertionError: There was none in `limit_s` seconds.
    """
    end = time.monotonic() + limit_s
    while not (value := happened()):
        assert time.monotonic() < end, f"it did not happen within {limit_s} s"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def serve(transport: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Iterator[Host]:
    """The service on `transport`, for as long as the context lasts."""
    start = {"envoy": _inside_envoy, "grpc": _on_grpc, "edge": _behind_edge}[transport]
    with start(max_message_bytes) as host:
        yield host


@contextlib.contextmanager
def _behind_edge(max_message_bytes: int) -> Iterator[Host]:
    config = Config(server=ServerSettings(max_message_bytes=max_message_bytes))
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="forno-") as name:
        folder, replica = Path(name), SimpleNamespace(index=0, socket=Path(name, "replica.sock"))
        (folder / edges.XDS_FOLDER).mkdir()
        edges.publish(folder, 1, [(replica, True)])
        with _inside_envoy(max_message_bytes, Address(path=str(replica.socket))) as host:
            end = edges.EdgeEnd(folder, "", rest=True)
            edge = supervisor.Envoy(config, Address("127.0.0.1", port), lambda _: end, host.log.append)
            try:
                edge.start({})
                eventually(lambda: any(v.takes_calls for v in edges.views(_hosts(edge)).values()), 20)
                yield replace(host, transport="edge", port=port)
                assert edge.returncode() is None, f"the edge has ended: {_last_words(edge, host.log)}"
            finally:
                edge.close()


def _hosts(edge: supervisor.Envoy) -> str:
    return edge.ask("GET", "/clusters?format=json")


@contextlib.contextmanager
def _inside_envoy(max_message_bytes: int, inner: Address | None = None) -> Iterator[Host]:
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    ours.settimeout(20)
    port = free_port()
    log: list[str] = []
    argument = {"control": theirs.fileno(), "max_message_bytes": max_message_bytes, "port": port}
    config = Config(server=ServerSettings(max_message_bytes=max_message_bytes))
    end = ends.ModuleEnd("conformance_service:main", json.dumps(argument))
    address = inner or Address("127.0.0.1", port)
    envoy = supervisor.Envoy(config, address, lambda _: end, log.append, inner=inner is not None)
    try:
        envoy.start(
            {
                "LD_PRELOAD": ":".join(filter(None, (supervisor.libpython(), os.environ.get("LD_PRELOAD")))),
                "FORNO_PYTHON": sys.executable,
                "PYTHONPATH": os.pathsep.join([*ROOTS, str(HERE)]),
            },
            keep=[theirs.fileno()],
        )
        theirs.close()
        assert ours.recv(100).startswith(b"ready"), f"the service did not start: {_last_words(envoy, log)}"
        eventually(lambda: inner or _answers(port), 20)
        yield Host("envoy", port, envoy.pid, log)
        assert envoy.returncode() is None, f"Envoy has ended: {_last_words(envoy, log)}"
    finally:
        ours.close()
        envoy.close()


@contextlib.contextmanager
def _on_grpc(max_message_bytes: int) -> Iterator[Host]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "conformance_service.py"), "127.0.0.1:0", str(max_message_bytes)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # its handlers raise on purpose
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("ready"), f"the service did not start: {line!r}"
            yield Host("grpc", int(line.split()[1]), process.pid)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _last_words(envoy: supervisor.Envoy, log: list[str]) -> str:
    """Its status and all that it has logged, which is complete once it is closed."""
    status = envoy.returncode()
    envoy.close()
    return f"status {status}: {log}"


def _answers(port: int) -> bool:
    """Whether the port is open: Envoy opens it a little after its modules have started."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
