"""What is measured: how each server is started, called, and checked for right answers."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from google.api import httpbody_pb2

from bench import h2load, limit, models
from forno.v1 import predictor_pb2, rest_pb2, tensors

if TYPE_CHECKING:
    from bench.process import ServerProcess

    Array = np.ndarray[Any, np.dtype[Any]]

ROOT = Path(__file__).parents[1]
SOURCES = ("", "proto", "server", "kernels", "clients/python")
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
PREDICT = "/forno.v1.Predictor/Predict"
METRICS = "/forno.v1.Rest/Metrics"
FIRST_ANSWER_LIMIT_S = 60.0
CALL_LIMIT_S = 30.0
CHECKED_CALLS = 8


class WrongAnswerError(Exception):
    """A server's answer differs from what ONNX Runtime gives in process."""


@dataclass(frozen=True)
class Subject:
    """One server under measurement.

    `serves` is the name of a model of `bench.models`, "null" for Forno's engine that answers its input, or
    "echo" for a server that answers the very bytes it got.
    """

    name: str
    serves: str
    transport: str = ""  # of Forno; empty: the `grpc.aio` echo
    rest: bool = False
    settings: tuple[str, ...] = ()  # of the model, such as "instances=2"

    def command(self, port: int, folder: Path, extra: tuple[str, ...] = ()) -> list[str]:
        """The command line that starts it.

        Args:
            port: Where it shall listen.
            folder: Where it may leave files.
            extra: Further arguments of `forno serve`.
        """
        if not self.transport:
            return [sys.executable, "-m", "bench.echo_aio", str(port)]
        settings = [part for setting in self.settings for part in ("--set", f"models.{self.serves}.{setting}")]
        return serving(self._served_path(folder), port, "--transport", self.transport, *settings, *extra)

    def target(self, port: int, folder: Path) -> h2load.Target:
        """What the generator calls; its body is one row."""
        row = self._row(0)
        body = folder / f"{self.name}.body"
        if self.rest:
            body.write_bytes(_json_body(row))
            url = f"http://127.0.0.1:{port}/v1/models/{self.serves}:predict"
            return h2load.Target(url, body, ("content-type: application/json",), http1=True)
        body.write_bytes(h2load.frame(self._message(row)))
        return h2load.Target(f"http://127.0.0.1:{port}{PREDICT}", body, GRPC_HEADERS)

    def first_answer_s(self, port: int, server: ServerProcess) -> float:
        """Waits for the first answer, which has to be right.

        Returns:
            Seconds since the server's start.

        Raises:
            RuntimeError: The server ended, or gave no answer in time.
            WrongAnswerError: It answered something else.
        """
        row = self._row(0)
        problem = "nothing listens"
        while time.perf_counter() < server.started_s + FIRST_ANSWER_LIMIT_S:
            server.check_alive()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()  # cheaper than a channel
                answer = self._ask(port, row)
            except (grpc.RpcError, OSError) as error:
                problem = str(error)
                time.sleep(0.005)
                continue
            first_s = time.perf_counter() - server.started_s
            self._compare(row, answer)
            return first_s
        raise RuntimeError(f"no answer in {FIRST_ANSWER_LIMIT_S:.0f} s: {problem}\n{server.log_end()}")

    def check_answers(self, port: int) -> None:
        """Asks a few different questions and compares the answers with ONNX Runtime's.

        Raises:
            WrongAnswerError: One differs.
        """
        for seed in range(CHECKED_CALLS):
            row = self._row(seed)
            self._compare(row, self._ask(port, row))

    def failed_calls(self, port: int) -> int | None:
        """How many calls the server says it answered with an error, which HTTP 200 hides; None if unknown."""
        if not self.transport:
            return None
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=_CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(
                METRICS,
                request_serializer=rest_pb2.MetricsRequest.SerializeToString,
                response_deserializer=httpbody_pb2.HttpBody.FromString,
            )
            text = call(rest_pb2.MetricsRequest(), timeout=CALL_LIMIT_S).data.decode()
        counts = re.findall(r"^forno_rpcs_total\{([^}]*)\} (\S+)", text, re.MULTILINE)
        if not counts:
            return None
        return sum(int(float(count)) for labels, count in counts if 'code="OK"' not in labels)

    def _served_path(self, folder: Path) -> Path:
        if self.serves != "null":
            return models.path_of(self.serves)
        path = folder / "forno.yaml"
        path.write_text(json.dumps({"models": {"null": {"engine": "null", "null": {"shape": [-1, 64]}}}}))
        return path

    def _row(self, seed: int) -> Array:
        return models.rows_of(self.serves if self.serves in models.ROW_SHAPES else "tiny", 1, seed)

    def _message(self, row: Array) -> bytes:
        request = predictor_pb2.PredictRequest(model=self.serves, inputs=[tensors.encode("x", row)])
        return request.SerializeToString()

    def _ask(self, port: int, row: Array) -> Array:
        if self.rest:
            url = f"http://127.0.0.1:{port}/v1/models/{self.serves}:predict"
            request = urllib.request.Request(url, _json_body(row), {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=CALL_LIMIT_S) as reply:
                return np.array(json.load(reply)["predictions"], np.float32)
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=_CHANNEL_OPTIONS) as channel:
            data = channel.unary_unary(PREDICT, bytes, bytes)(self._message(row), timeout=CALL_LIMIT_S)
        if self.serves == "echo":
            return tensors.decode(predictor_pb2.PredictRequest.FromString(data).inputs[0])
        return tensors.decode(predictor_pb2.PredictResponse.FromString(data).outputs[0])

    def _compare(self, row: Array, answer: Array) -> None:
        wanted = row if self.serves in ("echo", "null") else _expected(self.serves, row)
        if answer.shape != wanted.shape or not np.allclose(answer, wanted, rtol=1e-3, atol=1e-4):
            raise WrongAnswerError(f"{self.name} answered {answer!r}, expected {wanted!r}")


_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20))
_SESSIONS: dict[str, Any] = {}


def _expected(model: str, row: Array) -> Array:
    if model not in _SESSIONS:
        _SESSIONS[model] = limit.session_of(models.path_of(model), 1)
    return np.asarray(_SESSIONS[model].run(None, {"x": row})[0])


def _json_body(row: Array) -> bytes:
    return json.dumps({"instances": [[round(float(value), 6) for value in one.ravel()] for one in row]}).encode()


def serving(path: Path, port: int, *words: str) -> list[str]:
    """The command line of a Forno server.

    Args:
        path: What it serves: a settings file or a model.
        port: Where it listens.
        words: More flags.
    """
    return [sys.executable, "-m", "forno.server", "serve", str(path), "--address", f"127.0.0.1:{port}", *words]


def environment(root: Path = ROOT) -> dict[str, str]:
    """The environment of every server: the sources of a checkout, this one if not said, before whatever is installed.

    What is installed has been compiled. So that these are as well, after a first start, Python may keep its bytecode.
    """
    folders = [str(root / source) for source in SOURCES]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONDONTWRITEBYTECODE": "",
    }


SUBJECTS = (
    Subject("aio-echo", "echo"),
    Subject("forno-null", "null", "envoy"),
    Subject("forno", "tiny", "envoy"),
    Subject("forno-grpc", "tiny", "grpc"),
    Subject("forno-rest", "tiny", "envoy", rest=True),
    Subject("forno-resnet50", "resnet50", "envoy"),
    Subject("forno-2-resnet50", "resnet50", "envoy", settings=("instances=2", "onnx.intra_op_threads=1")),
    Subject("forno-grpc-resnet50", "resnet50", "grpc"),
)
