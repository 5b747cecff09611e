"""A real `forno serve` process for the tests, on any transport."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from bench.process import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

ROOT = Path(__file__).parents[2]
ROOTS = [str(ROOT / name) for name in ("proto", "server", "kernels", "clients/python")]
TRANSPORTS = ("envoy", "proxy", "grpc")
FORNO = (sys.executable, "-m", "forno.server")
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),  # a server that starts is tried again soon, not after a second
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", 1 << 28),
    ("grpc.max_send_message_length", 1 << 28),
]
FLEET = "fleet"
"""One replica inside Envoy behind an edge, as if that were a transport of its own."""


def environment() -> dict[str, str]:
    """The environment of a child process that imports Forno from this checkout, compiled once for hundreds of them."""
    path = os.pathsep.join([*ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}


def forno(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`forno WORDS`, a command that ends by itself, with more variables in its environment."""
    return subprocess.run(
        [*FORNO, *map(str, words)],
        env={**environment(), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@dataclass
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class FornoServer:
    """`forno serve ARGS`, from start to a clean end.

    Args:
        args: What to serve, and flags.
        transport: One of TRANSPORTS, or FLEET.
        ready: Whether to wait until every model is ready.
        target: Where to listen; empty = on a free port.
    """

    def __init__(self, *args: str | Path, transport: str = "envoy", ready: bool = True, target: str = "") -> None:
        self.transport = transport
        self.port = free_port()
        self.target = target or f"127.0.0.1:{self.port}"
        self._ready = ready
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        self._command = [
            *(*FORNO, "serve", *map(str, args)),
            *("--address", self.target),
            *(("--replicas", "1") if transport == FLEET else ("--transport", transport)),
        ]
        self.process: subprocess.Popen[str]
        self.channel: grpc.Channel

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, env=environment(), stdout=self._log, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        self.channel = grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        if self._ready:
            try:
                self.wait_ready()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if kind is not None:
            print(self.output())
        self._log.close()

    def wait_ready(self, limit_s: float = 30.0) -> None:
        """Returns once grpc.health.v1 says SERVING."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.output()}")
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready after {limit_s} s:\n{self.output()}")

    def output(self) -> str:
        """What the server has printed so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def http(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 15,
    ) -> Reply:
        """One REST call."""
        request = urllib.request.Request(f"http://{self.target}{path}", body, headers or {}, method=method)
        if body is not None and not any(key.lower() == "content-type" for key in headers or {}):
            request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return Reply(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())
