"""Malformed HTTP/2, HTTP/1.1, gRPC and JSON, in any number, against a real server.

    python -m tests.e2e.fuzz INPUTS [RESULT.json] [SEED]

Callers show no credential, a wrong one, or that of model alpha. Whatever they send, the server must go on serving, must
never answer from model beta, and must not fail in a way that nobody expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h2.exceptions
import hpack
from tests.e2e.raw_http2 import RawClient, frame
from tests.e2e.secured import ROWS, Secured, SecuredServer, keyed_server, predict

from forno.v1 import predictor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = [
    *(f"/forno.v1.Predictor/{name}" for name in ("Predict", "PredictStream", "Invoke", "GetModel", "ListModels")),
    *(f"/forno.v1.Rest/{name}" for name in ("Predict", "Invoke", "Health", "Ready", "Metrics")),
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
REST_PATHS = [
    "/v1/models/alpha:predict", "/v1/models/beta:predict", "/v1/predict", "/v1/alpha/run", "/v1/beta/run",
    "/v1/models/beta", "/v1/models", "/health", "/ready", "/metrics", "/v1/models/alpha/versions/1:predict",
]  # fmt: skip
POSTED = [path for path in REST_PATHS if "predict" in path or "run" in path]
ODD = [
    b"\0",
    b"\r\n",
    b"%00",
    b"%2f",
    b"..",
    b"\xff\xfe",
    b"{" * 300,
    b"[" * 300,
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"-",
    b"\x7f",
]
CHECK_EVERY = 2000
"""Inputs between two looks at whether a proper caller is still served."""


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def add(self, kind: str, count: int = 1) -> None:
        self.inputs[kind] = self.inputs.get(kind, 0) + count

    def answered(self, what: str) -> None:
        self.answers[what] = self.answers.get(what, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.inputs.values())


class Fuzzer:
    """Sends rounds of bad input. Its choices follow from the seed."""

    def __init__(self, server: SecuredServer, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.tally = Tally()
        self.alpha = server.files.key("predict:model/alpha", "predict:endpoint/alpha/run").headers["X-Api-Key"]
        self.all = server.files.key("*")

    def run(self, inputs: int) -> Tally:
        """Sends at least so many."""
        rounds: list[Callable[[], None]] = [self.frames, self.grpc, self.json, self.http1]
        checked = 0
        while self.tally.total < inputs:
            self.random.choice(rounds)()
            if self.tally.total - checked >= CHECK_EVERY:
                self.check()
                checked = self.tally.total
        self.check()
        return self.tally

    def check(self) -> None:
        """A proper caller is served."""
        got = self.server.rpc("/forno.v1.Predictor/Predict", predict("beta"), self.all)
        reply = self.server.rest("POST", "/v1/models/beta:predict", self.all, ROWS)
        if got[0] != "OK" or reply.status != 200:
            self.tally.violations.append(f"after {self.tally.total}: {got[0]}, {reply.status}")

    def frames(self) -> None:
        """A connection of random HTTP/2 frames, some of them close to right."""
        data = bytearray(PREFACE if self.random.random() < 0.95 else self.bytes(24))
        if self.random.random() < 0.9:
            data += struct.pack(">HBBBI", 0, 0, 4, 0, 0)
        encoder, count = hpack.Encoder(), self.random.randint(4, 40)
        for _ in range(count):
            kind = self.random.choice((0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, self.random.randrange(256)))
            payload = self.bytes(self.random.choice((0, 1, 4, 5, 8, 9, self.random.randrange(200))))
            if kind == 1 and self.random.random() < 0.8:
                payload = encoder.encode(self.headers())
                if self.random.random() < 0.3:
                    payload = self.damaged(payload)
            length = len(payload) if self.random.random() < 0.95 else self.random.randrange(1 << 20)
            stream = self.random.choice((0, 1, 3, 5, 7, 2, self.random.randrange(1 << 32)))
            flags = self.random.choice((0, 1, 4, 5, 0x25, self.random.randrange(256)))
            data += struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        self.tally.add("http2 frames", count)
        self.exchange(bytes(data), "http2")

    def grpc(self) -> None:
        """A connection of calls with damaged framing, messages or headers."""
        count = self.random.randint(20, 60)
        self.tally.add("grpc calls", count)
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError), RawClient(self.server.port) as client:
            streams = []
            for _ in range(count):
                extra = [(name, value) for name, value in self.credential()]
                if self.random.random() < 0.3:
                    timeout = self.random.choice(("1n", "99999999H", "", "-1S", "1x", "0m", "1" * 40))
                    extra.append(("grpc-timeout", timeout))
                if self.random.random() < 0.2:
                    extra.append(("grpc-encoding", self.random.choice(("gzip", "deflate", "identity", "br", ""))))
                kind = self.random.choice(
                    ("application/grpc", "application/grpc+proto", "application/grpc+json", "text/x")
                )
                stream = client.open("", extra, path=self.random.choice(METHODS), content_type=kind)
                client.h2.send_data(stream, self.grpc_body()[:16000], end_stream=self.random.random() < 0.97)
                streams.append(stream)
            client.flush()
            end = time.monotonic() + 0.5
            while time.monotonic() < end and not all(self._over(client, stream) for stream in streams):
                if not client.receive(0.2):
                    break
            for stream in streams:
                answer = client.answers[stream]
                self.tally.answered(f"grpc {answer.status or answer.headers.get(':status', 'none')}")
                self.judge(answer.status == "0", answer.body)

    def json(self) -> None:
        """A connection of REST calls with damaged bodies."""
        count = self.random.randint(20, 60)
        data = bytearray()
        for _ in range(count):
            body = self.json_body()
            head = [f"POST {self.random.choice(POSTED)} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
            head.append(
                "content-type: " + self.random.choice(("application/json",) * 6 + ("text/plain", "", "image/png"))
            )
            head += [f"{name}: {value}" for name, value in self.credential()]
            data += "\r\n".join(head).encode() + b"\r\n\r\n" + body
        self.tally.add("json bodies", self.exchange(bytes(data), "json", replies=count))

    def http1(self) -> None:
        """A connection that begins with something like a request."""
        self.tally.add("http1 requests")
        method = self.random.choice(("GET", "POST", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PRI", "", "G\0T"))
        path = self.random.choice(REST_PATHS)
        if self.random.random() < 0.7:
            at = self.random.randrange(len(path))
            odd = self.random.choice(ODD).decode("latin-1")
            path = path[:at] + odd + path[at + self.random.randrange(3) :]
        lines = [f"{method} {path} {self.random.choice(('HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', ''))}"]
        lines += [f"{name}: {value}" for name, value in [*self.credential(), ("host", "x")]]
        for _ in range(self.random.randrange(6)):
            lines.append(
                self.random.choice(
                    (
                        "content-length: 5", "content-length: -1", "content-length: 99999999999999999999",
                        "transfer-encoding: chunked", "transfer-encoding: chunked, identity", "expect: 100-continue",
                        "upgrade: h2c", "connection: upgrade, http2-settings", "x: " + "a" * 9000, ": x", "x\0: y",
                        " folded", "te: trailers", "content-type: application/grpc", "x-forno-door: admin",
                    )
                )
            )  # fmt: skip
        ending = self.random.choice(("\r\n\r\n", "\n\n", "\r\n", ""))
        data = self.random.choice(("\r\n", "\n")).join(lines) + ending
        self.exchange(data.encode("latin-1") + self.json_body()[: self.random.randrange(200)], "http1")

    def exchange(self, data: bytes, kind: str, replies: int = 1) -> int:
        """Sends bytes, and looks at what comes back; the number of HTTP/1.1 replies."""
        received = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port), 5) as connection:
            connection.settimeout(0.25 if replies > 1 else 0.02)
            connection.sendall(data)
            if kind != "json":
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            while received.count(b"HTTP/1.1 ") < replies or kind == "http2":
                piece = connection.recv(1 << 16)
                received += piece
                if not piece or b"\r\nconnection: close\r\n" in piece:
                    break
        self.tally.answered(f"{kind} {'answered' if received else 'closed'}")
        self.judge(True, received)
        return received.count(b"HTTP/1.1 ")

    def judge(self, success: bool, body: bytes) -> None:
        """Notes an answer that this caller must not get."""
        if success and (b"\x12\x04beta" in body or b'"model":"beta"' in body):  # PredictResponse.model, and in JSON
            self.tally.violations.append(f"an answer of beta: {body[:300]!r}")

    @staticmethod
    def _over(client: RawClient, stream: int) -> bool:
        answer = client.answers[stream]
        return answer.ended or answer.reset is not None

    def credential(self) -> list[tuple[str, str]]:
        return self.random.choice(
            (
                *([("x-api-key", self.alpha)],) * 6,
                [("authorization", f"Bearer {self.alpha}")],
                [],
                [("x-api-key", "forno_00000000_" + "x" * self.random.randrange(60))],
                [
                    (
                        "authorization",
                        self.random.choice(("Bearer", "Basic x", "", "Bearer a.b.c", "Bearer " + "e" * 2000)),
                    )
                ],
                [("x-forno-door", "admin"), ("x-forwarded-client-cert", "URI=beta"), ("x-forno-peer", "::1")],
            )
        )

    def headers(self) -> list[tuple[str, str]]:
        chosen = [
            (":method", self.random.choice(("POST", "GET", "", "post"))),
            (":path", self.random.choice((*METHODS, *REST_PATHS, "", "*", "/" * 200))),
            (":scheme", self.random.choice(("http", "https", "x"))),
            (":authority", "x"),
            ("content-type", self.random.choice(("application/grpc", "application/json", ""))),
            *self.credential(),
        ]
        if self.random.random() < 0.4:
            self.random.shuffle(chosen)
        if self.random.random() < 0.3:
            chosen.append(self.random.choice(chosen))
        if self.random.random() < 0.2:
            chosen.append((self.random.choice(("", "A", "x y", "connection", ":odd")), "v\r\n"))
        return chosen

    def grpc_body(self) -> bytes:
        if self.random.random() < 0.15:
            return self.bytes(self.random.randrange(60))
        model = self.random.choice(("alpha", "alpha", "beta"))
        message = predict(model)
        if self.random.random() < 0.3:
            message.inputs[0].shape[:] = [
                self.random.randrange(-(1 << 31), 1 << 31) for _ in range(self.random.randrange(5))
            ]
        if self.random.random() < 0.2:
            message.inputs[0].data_type = self.random.randrange(20)
        if self.random.random() < 0.2:
            message.parameters.queue_timeout.seconds = self.random.randrange(-(1 << 40), 1 << 40)
        data = message.SerializeToString()
        if self.random.random() < 0.1:
            data = pb.PredictStreamRequest(request=message).SerializeToString()
        if self.random.random() < 0.5:
            data = self.damaged(data)
        body = frame(data, flag=self.random.choice((*(0,) * 12, 1, 2, 255)))
        if self.random.random() < 0.1:
            body = struct.pack(">BI", 0, self.random.randrange(1 << 32)) + data
        return body * self.random.choice((1, 1, 1, 1, 1, 1, 1, 2))

    def json_body(self) -> bytes:
        valid: Any = self.random.choice(
            (
                {"inputs": {"x": [[1, 1]]}},
                {"instances": [[1, 1]]},
                {"instances": [{"x": [1, 1]}]},
                {"model": "beta", "inputs": {"x": [[1, 1]]}},
                {"model": "alpha", "inputs": [{"name": "x", "shape": [1, 2], "floats": {"values": [1, 1]}}]},
            )
        )
        return self.damaged(json.dumps(valid).encode())

    def damaged(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(out) + 1)
            match self.random.randrange(5):
                case 0:
                    out[at : at + 1] = bytes((self.random.randrange(256),))
                case 1:
                    del out[at : at + self.random.randrange(8)]
                case 2:
                    out[at:at] = self.random.choice(ODD)
                case 3:
                    out[at:at] = out[: self.random.randrange(len(out) + 1)]
                case _:
                    out[at : at + 4] = self.bytes(4)
        return bytes(out)

    def bytes(self, count: int) -> bytes:
        return self.random.randbytes(count)


def resident_bytes(pid: int) -> int:
    """Memory of a process and those it has started."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    for process in [pid, *_children(pid)]:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * page
    return total


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [each for child in map(int, listed) for each in (child, *_children(child))]
    return []


def fuzz(folder: Path, inputs: int, seed: int, transport: str = "envoy") -> dict[str, Any]:
    """Starts a server, sends the inputs, and says what became of them and of the server."""
    files = Secured(folder)
    with keyed_server(files, transport) as server:
        fuzzer = Fuzzer(server, seed)
        fuzzer.run(min(500, inputs // 4))  # what a first use allocates is no leak
        before, began = resident_bytes(server.process.pid), time.monotonic()
        tally = fuzzer.run(inputs)
        took_s, after = time.monotonic() - began, resident_bytes(server.process.pid)
        ended = server.process.poll()
        log = server.output()
    # grpc.aio tells of a caller that went away in the middle of a refusal as of an error.
    faults = [line for line in log.splitlines() if "Traceback" in line or "unexpected error" in line]
    faults = [line for line in faults if "ExecuteBatchError" not in line]
    return {
        "command": "make fuzz",
        "transport": transport,
        "seed": seed,
        "inputs": tally.total,
        "by_kind": tally.inputs,
        "answers": dict(sorted(tally.answers.items())),
        "violations": tally.violations,
        "unexpected_errors": len(faults),
        "served_to_the_end": ended is None and not tally.violations,
        "resident_mib": [before >> 20, after >> 20],
        "took_s": round(took_s, 1),
        "first_error": faults[0] if faults else "",
    }


def main() -> int:
    inputs, seed = int(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder), inputs, seed)
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")
    return 0 if result["served_to_the_end"] and not result["unexpected_errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
