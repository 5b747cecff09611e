"""What no proper client sends: each wrong request ends its own call with a clear status, and harms no other."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h2.exceptions
import pytest
from tests.e2e import hosts
from tests.e2e.hosts import MAX_MESSAGE_BYTES, Host
from tests.e2e.raw_http2 import RawClient, frame

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERNAL, EXHAUSTED, UNIMPLEMENTED, DEADLINE = "13", "8", "12", "4"
GZIP = [("grpc-encoding", "gzip")]
BOMB = gzip.compress(bytes(MAX_MESSAGE_BYTES * 4))

# name: (method, body, headers, status and message inside Envoy, status on grpc.aio; None = any, or no answer ever)
REQUESTS = {
    "no message": ("Unary", b"", [], INTERNAL, "is not one whole gRPC message", None),
    "half a prefix": ("Unary", b"\0\0\0", [], INTERNAL, "is not one whole gRPC message", None),
    "a message cut short": ("Unary", frame(b"{}")[:-1], [], INTERNAL, "is not one whole gRPC message", None),
    "two messages": ("Unary", frame(b"{}") * 2, [], INTERNAL, "goes on after its one gRPC message", "0"),
    "a byte too many": ("Unary", frame(b"{}") + b"x", [], INTERNAL, "goes on after its one gRPC message", "0"),
    "no message for a stream": ("ServerStream", b"", [], INTERNAL, "is not one whole gRPC message", None),
    "a stream that ends in a message": ("ClientStream", frame(b"{}")[:-1], [], INTERNAL, "ends inside a message", "0"),
    "a stream that ends in a prefix": ("ClientStream", frame(b"") + b"\0", [], INTERNAL, "ends inside a message", "0"),
    "an unknown flag": ("Unary", frame(b"{}", 2), [], INTERNAL, "has the flag 2", None),
    "an unknown flag in a stream": ("ClientStream", frame(b"{}", 255), [], INTERNAL, "has the flag 255", "0"),
    "compressed, nobody says how": ("Unary", frame(b"{}", 1), [], INTERNAL, "flagged as compressed", None),
    "an unknown encoding": (
        *("Unary", frame(b"{}", 1), [("grpc-encoding", "br")]),
        *(UNIMPLEMENTED, "'br' is not supported; supported: identity, deflate, gzip", INTERNAL),
    ),
    "broken gzip": ("Unary", frame(b"junk", 1), GZIP, INTERNAL, "not valid gzip", INTERNAL),
    "broken gzip in a stream": ("ClientStream", frame(b"junk", 1), GZIP, INTERNAL, "not valid gzip", INTERNAL),
    "gzip cut short": ("Unary", frame(gzip.compress(b"{}")[:-4], 1), GZIP, INTERNAL, "ends too early", INTERNAL),
    "gzip and more": ("Unary", frame(gzip.compress(b"{}") + b"z", 1), GZIP, INTERNAL, "after its end", INTERNAL),
    "a decompression bomb": ("Unary", frame(BOMB, 1), GZIP, EXHAUSTED, "holds more than 16777216", EXHAUSTED),
    "a timeout without a unit": (
        "Unary",
        frame(b"{}"),
        [("grpc-timeout", "1")],
        INTERNAL,
        "grpc-timeout is '1'",
        INTERNAL,
    ),
    "a negative timeout": ("Unary", frame(b"{}"), [("grpc-timeout", "-1S")], INTERNAL, "grpc-timeout is", INTERNAL),
    "a timeout of nothing": ("Unary", frame(b'{"sleep": 5}'), [("grpc-timeout", "0S")], DEADLINE, "", DEADLINE),
}


@pytest.fixture(scope="module")
def envoy() -> Iterator[Host]:
    with hosts.serve("envoy") as host:
        yield host


@pytest.fixture(scope="module", params=hosts.TRANSPORTS)
def host(request: pytest.FixtureRequest, envoy: Host) -> Iterator[Host]:
    if request.param == "envoy":
        yield envoy
        return
    with hosts.serve(request.param) as host:
        yield host


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_is_refused(host, name):
    method, body, headers, status, message, status_on_grpc = REQUESTS[name]
    expected = status if host.transport == "envoy" else status_on_grpc
    with RawClient(host.port) as client:
        wrong = client.open(method, headers)
        client.send(wrong, body, end=True)
        answer = client.answer(wrong, 5 if expected else 0.1)
        assert expected in {answer.status, None}
        if host.transport == "envoy":
            assert message in answer.message
        good = client.open("Unary")
        client.send(good, frame(b"{}"), end=True)
        assert client.answer(good).body == frame(b"ok")


def test_no_handler_is_left_over(host):
    hosts.eventually(lambda: not host.ask("running"))


@pytest.mark.parametrize("piece_bytes", [1, 3, 5, 7])
def test_a_message_may_come_in_any_pieces(host, piece_bytes):
    with RawClient(host.port) as client:
        unary = client.open("Unary")
        client.send(unary, frame(b'{"answer": "whole"}'), end=True, piece_bytes=piece_bytes)
        stream = client.open("ReaderStream")
        client.send(stream, frame(b"a") + frame(b"") + frame(b"bcdefg"), end=True, piece_bytes=piece_bytes)
        assert client.answer(unary).body == frame(b"whole")
        assert client.answer(stream).body == frame(b"a++bcdefg")


def test_calls_may_end_with_request_trailers(host):
    with RawClient(host.port) as client:
        for method, body, expected in (("Unary", b"{}", b"ok"), ("ClientStream", b"abc", b"1 3")):
            stream = client.open(method)
            client.send(stream, frame(body))
            client.h2.send_headers(stream, [("x-trailer", "1")], end_stream=True)
            client.flush()
            assert client.answer(stream).body == frame(expected)


def test_a_message_over_the_limit_is_refused_by_its_prefix(envoy):
    with RawClient(envoy.port) as client:
        stream = client.open("Unary")
        client.send(stream, struct.pack(">BI", 0, MAX_MESSAGE_BYTES + 1))
        assert client.answer(stream).status == EXHAUSTED
        stream = client.open("Unary")
        client.send(stream, b"\0\xff\xff\xff\xff")
        assert client.answer(stream).status == EXHAUSTED


def test_a_prefix_alone_reserves_no_memory(envoy):
    before_bytes = _virtual_bytes(envoy)
    with RawClient(envoy.port) as client:
        for _ in range(200):
            client.send(client.open("Unary"), struct.pack(">BI", 0, MAX_MESSAGE_BYTES) + b"x")
        assert envoy.ask("running") == {}
        assert _virtual_bytes(envoy) - before_bytes < 10 * MAX_MESSAGE_BYTES


def test_a_unary_body_without_end_is_not_kept(envoy):
    before_bytes = envoy.resident_bytes()
    with RawClient(envoy.port) as client:
        stream = client.open("Unary")
        client.send(stream, frame(b"{}"))
        with contextlib.suppress(h2.exceptions.ProtocolError):  # the stream is reset under the sender
            for _ in range(200):
                client.send(stream, bytes(1 << 20))
        assert client.answers[stream].status == INTERNAL
    assert envoy.resident_bytes() - before_bytes < 50 << 20


def test_content_types_of_grpc(host):
    with RawClient(host.port) as client:
        for content_type in ("application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"):
            stream = client.open("Unary", content_type=content_type)
            client.send(stream, frame(b"{}"), end=True)
            assert client.answer(stream).status == "0"


@pytest.mark.parametrize(
    "changed",
    [{"content_type": "application/json"}, {"content_type": "application/grpcx"}],
    ids=["JSON", "nearly gRPC"],
)
def test_what_is_not_grpc_gets_http_status_404(envoy, changed):
    with RawClient(envoy.port) as client:
        stream = client.open("Unary", **changed)
        client.send(stream, frame(b"{}"), end=True)
        answer = client.answer(stream)
        assert answer.headers[":status"] == "404"
        assert b"no such path: " in answer.body


def test_no_http_method_but_post_makes_a_call(envoy):
    with RawClient(envoy.port) as client:
        for method in ("GET", "PUT", "DELETE"):
            answer = client.answer(client.open("Unary", method=method, end=True))
            assert (answer.status, answer.message) == (UNIMPLEMENTED, f"a gRPC call is a POST, this is a {method}")


def test_binary_metadata_in_all_its_forms(envoy):
    with RawClient(envoy.port) as client:
        headers = [
            ("x-p-bin", "AP8="),
            ("x-u-bin", "AP8"),
            ("x-j-bin", "AP8,AQ=="),
            ("x-bad-bin", "%"),
            ("x-one-bin", "A"),
        ]
        stream = client.open("Unary", headers)
        client.send(stream, frame(b'{"report": "metadata"}'), end=True)
        seen = json.loads(client.answer(stream).body[5:])
    assert {key: values for key, values in seen.items() if key.endswith("-bin")} == {
        "x-p-bin": ["00ff"],
        "x-u-bin": ["00ff"],
        "x-j-bin": ["00ff", "01"],
    }


def test_a_deadline_is_kept_for_clients_that_do_not(host):
    with RawClient(host.port) as client:
        unary = client.open("Unary", [("grpc-timeout", "100m")])
        client.send(unary, frame(b'{"sleep": 30, "name": "late unary"}'), end=True)
        stream = client.open("ServerStream", [("grpc-timeout", "100m")])
        client.send(stream, frame(b'{"sleep": 30, "count": 1, "name": "late stream"}'), end=True)
        assert client.answer(unary).status == DEADLINE
        assert client.answer(stream).status == DEADLINE
    for name in ("late unary", "late stream"):
        hosts.eventually(lambda name=name: host.count(f"cancelled {name}") == 1)


def test_the_end_of_a_stream_may_come_with_its_last_message(host):
    """... also after the transport had to leave some of it unread, and has caught up since."""
    with RawClient(host.port) as client:
        stream = client.open("ClientStream", [("x-command", '{"wait": 0.2}')])
        client.send(stream, frame(b"x" * 65536) * 100)
        client.receive(0.5)
        time.sleep(0.5)
        client.send(stream, frame(b"last"), end=True)
        assert client.answer(stream, 20).body == frame(b"101 6553604")


@pytest.mark.parametrize("count", [63, 64, 65, 66, 100, *range(316, 326), 400])
def test_a_stream_of_any_length_survives_a_late_handler(envoy, count):
    """The end may come at any level of the buffers before the handler, of 4 and 16 MiB here."""
    with RawClient(envoy.port) as client:
        stream = client.open("ClientStream", [("x-command", '{"wait": 0.3}')])
        client.send(stream, frame(b"x" * 65536) * (count - 1))
        client.send(stream, frame(b"x" * 65536), end=True)
        answer = client.answer(stream, 20)
        assert (answer.status, answer.body, answer.message) == ("0", frame(f"{count} {count * 65536}".encode()), "")


def _virtual_bytes(host: Host) -> int:
    return int(Path(f"/proc/{host.pid}/statm").read_text().split()[0]) * 4096
