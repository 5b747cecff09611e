"""The calls of the conformance test, and what has to come of each.

Where grpc.aio does something else, the case says so in `on_grpc`, with the reason: such a difference is on purpose,
and both sides of it are checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc
from tests.e2e.hosts import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

ANY = "any text"
NO_ANSWER = "DEADLINE_EXCEEDED"


@dataclass(frozen=True)
class Outcome:
    """What a client sees of a call."""

    code: str = "OK"
    details: str = ""
    messages: tuple[bytes, ...] | None = ()
    initial: tuple[tuple[str, str | bytes], ...] = ()
    trailing: tuple[tuple[str, str | bytes], ...] = ()


@dataclass(frozen=True)
class Case:
    """One call and its outcome."""

    name: str
    method: str
    requests: Sequence[bytes]
    expected: Outcome
    command: dict[str, Any] = field(default_factory=dict)  # of a method whose requests stream
    on_grpc: dict[str, Any] = field(default_factory=dict)  # what differs there
    why: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def unary(
    name: str, expected: Outcome, *, why: str = "", on_grpc: dict[str, Any] | None = None, **command: Any
) -> Case:
    """A call of `Unary`."""
    return Case(name, "Unary", [json.dumps(command).encode()], expected, on_grpc=on_grpc or {}, why=why)


def stream(name: str, expected: Outcome, method: str = "ServerStream", **command: Any) -> Case:
    """A call whose responses stream."""
    return Case(name, method, [json.dumps(command).encode()], expected)


def requests(name: str, method: str, items: Sequence[bytes], expected: Outcome, **command: Any) -> Case:
    """A call whose requests stream."""
    return Case(name, method, items, expected, command)


def ok(*messages: bytes, **more: Any) -> Outcome:
    """Success with these messages."""
    return Outcome(messages=messages, **more)


def fails(code: str, details: str = "", *messages: bytes, **more: Any) -> Outcome:
    """Failure, perhaps after some messages."""
    return Outcome(code, details, messages, **more)


def unexpected(kind: str, text: str) -> str:
    """The message of a call whose handler raised."""
    return f"Unexpected <class '{kind}'>: {text}"


TOLD_AT_ONCE = "the handler is told at the call that was wrong, and the log shows where"
INVALID_METADATA = {"code": "INTERNAL", "details": "Invalid metadata"}
LARGE = b"x" * (8 << 20)
PIECES = tuple(str(index).encode() for index in range(1000))
OTHER_WORDS = "the same refusal in other words"
NEVER_ANSWERED = "grpc.aio never answers such a call"

CASES = [
    # Unary.
    unary("a unary call", ok(b"ok")),
    unary("an empty response", ok(b""), answer=""),
    Case("an empty request", "Unary", [b""], ok(b"ok")),
    unary("a response of 8 MB", ok(LARGE), size=len(LARGE)),
    Case("a request of 8 MB, echoed", "Unary", [b'{"echo":1}\n' + LARGE], ok(b'{"echo":1}\n' + LARGE)),
    # Metadata.
    unary(
        "metadata from the server",
        ok(
            b"ok",
            initial=(("x-i", "1"), ("x-i", "2"), ("x-b-bin", b"\x00\xff"), ("x-e", "")),
            trailing=(("x-t-bin", b""), ("x-t", "a, b")),
        ),
        initial=[["x-i", "1"], ["x-i", "2"], ["x-b-bin", "00ff"], ["x-e", ""]],
        trailing=[["x-t-bin", ""], ["x-t", "a, b"]],
    ),
    unary(
        "headers of the transport are not metadata", ok(b"ok"), trailing=[["grpc-status", "5"], ["content-type", "a"]]
    ),
    unary(
        "a metadata value with a line break",
        fails("UNKNOWN", ANY),
        initial=[["x-i", "a\nb"]],
        on_grpc=INVALID_METADATA,
        why=TOLD_AT_ONCE,
    ),
    unary(
        "a metadata value that is not ASCII",
        fails("UNKNOWN", ANY),
        trailing=[["x-i", "ö"]],
        on_grpc=INVALID_METADATA,
        why=TOLD_AT_ONCE,
    ),
    unary(
        "a metadata key in capitals",
        fails("UNKNOWN", ANY),
        initial=[["X-Up", "a"]],
        on_grpc=INVALID_METADATA,
        why=TOLD_AT_ONCE,
    ),
    unary(
        "a metadata key that is a pseudo header",
        fails("UNKNOWN", ANY),
        initial=[[":status", "404"]],
        on_grpc=INVALID_METADATA,
        why=TOLD_AT_ONCE,
    ),
    # Status.
    unary("abort", fails("NOT_FOUND", "gone"), abort="NOT_FOUND", details="gone"),
    unary(
        "details that need escapes", fails("ABORTED", 'ö 100% \n\x01 "x"'), abort="ABORTED", details='ö 100% \n\x01 "x"'
    ),
    unary(
        "details that are no text",
        fails("ABORTED", "?x"),
        code="ABORTED",
        details="\ud800x",
        on_grpc={"code": NO_ANSWER, "details": ANY},
        why=NEVER_ANSWERED,
    ),
    unary(
        "abort with trailing metadata",
        fails("ABORTED", trailing=(("x-b", "2"),)),
        abort="ABORTED",
        trailing=[["x-a", "1"]],
        abort_trailing=[["x-b", "2"]],
    ),
    unary(
        "abort keeps trailing metadata",
        fails("ABORTED", trailing=(("x-a", "1"),)),
        abort="ABORTED",
        trailing=[["x-a", "1"]],
    ),
    unary("abort that the handler catches", fails("NOT_FOUND", "d"), abort="NOT_FOUND", details="d", swallow=1),
    unary(
        "abort with OK",
        fails("UNKNOWN"),
        abort="OK",
        on_grpc={"code": NO_ANSWER, "details": ANY},
        why=NEVER_ANSWERED,
    ),
    unary(
        "rich error details",
        fails("DATA_LOSS", "r", trailing=(("grpc-status-details-bin", b"\x08\x05\x00\xff"),)),
        rich="DATA_LOSS",
        details="r",
    ),
    unary("a code without abort", fails("ALREADY_EXISTS", "set"), code="ALREADY_EXISTS", details="set"),
    unary("a code as a number", fails("NOT_FOUND", "set"), code=5, details="set"),
    unary("the code OK", ok(b"ok"), code="OK"),
    unary("the code 0", ok(b"ok"), code=0),
    unary("a code that does not exist", fails("UNKNOWN", "set"), code=99, details="set"),
    unary("an exception", fails("UNKNOWN", unexpected("ValueError", "boö\n")), **{"raise": "boö\n"}),
    unary(
        "a handler that returns nothing",
        fails("UNKNOWN", unexpected("TypeError", "the handler returned None")),
        none=1,
        on_grpc={"details": unexpected("TypeError", "None is no message")},
        why=OTHER_WORDS,
    ),
    unary(
        "a handler that cancels itself",
        fails("CANCELLED", "the call was cancelled by the server"),
        cancel_self=1,
        on_grpc={"code": NO_ANSWER, "details": ANY},
        why=NEVER_ANSWERED,
    ),
    Case(
        "a request that cannot be decoded",
        "BadRequest",
        [b"abc"],
        fails("INTERNAL", "the request is not a message of the type that this method takes: 3 bytes are no message"),
    ),
    Case(
        "a response that cannot be encoded",
        "BadResponse",
        [b"{}"],
        fails("UNKNOWN", unexpected("ValueError", "b'ok' cannot be encoded")),
    ),
    Case(
        "a streamed response that cannot be encoded",
        "BadStream",
        [b"{}"],
        fails("UNKNOWN", unexpected("ValueError", "b'0' cannot be encoded")),
    ),
    Case(
        "a method that the servicer leaves out",
        "LeftOut",
        [b""],
        fails("UNIMPLEMENTED", ANY),
    ),
    Case(
        "an unknown method",
        "Nope",
        [b""],
        fails("UNIMPLEMENTED", "no such method: /test.Conformance/Nope"),
        on_grpc={"details": "Method not found!"},
        why=OTHER_WORDS,
    ),
    Case(
        "a request over the limit",
        "Unary",
        [b"x" * (MAX_MESSAGE_BYTES + 1)],
        fails("RESOURCE_EXHAUSTED", "the message has 16777217 bytes, the limit is 16777216 (server.max_message_bytes)"),
        on_grpc={"details": "SERVER: Received message larger than max (16777217 vs. 16777216)"},
        why=OTHER_WORDS,
    ),
    unary(
        "a response over the limit",
        fails(
            "RESOURCE_EXHAUSTED", "the response has 16777217 bytes, the limit is 16777216 (server.max_message_bytes)"
        ),
        size=MAX_MESSAGE_BYTES + 1,
        on_grpc={"details": "SERVER: Sent message larger than max (16777217 vs. 16777216)"},
        why=OTHER_WORDS,
    ),
    # Compression.
    unary("gzip from the server", ok(b"x" * 1000), compress="Gzip", size=1000),
    unary("deflate from the server", ok(b"x" * 1000), compress="Deflate", size=1000),
    unary("compression left out once", ok(b"x" * 1000), compress="Gzip", next_plain=1, size=1000),
    unary(
        "compression set too late",
        fails(
            "UNKNOWN",
            unexpected("RuntimeError", "Compression setting must be specified before sending initial metadata"),
        ),
        initial=[],
        late_compress=1,
    ),
    stream("a compressed stream", ok(b"0..", b"1..", b"2.."), compress="Gzip", size=3, next_plain=1),
    Case(
        "gzip from the client",
        "Unary",
        [b'{"echo":1}' + b" " * 5000],
        ok(b'{"echo":1}' + b" " * 5000),
        options={"compression": grpc.Compression.Gzip},
    ),
    Case(
        "a deflated stream from the client",
        "ClientStream",
        [b"a" * 5000, b"", b"b" * 100],
        ok(b"3 5100"),
        options={"compression": grpc.Compression.Deflate},
    ),
    # Streams of responses.
    stream("no responses", ok(), count=0),
    stream("one response", ok(b"0"), count=1),
    stream("many responses", ok(*PIECES), count=1000),
    stream("many written responses", ok(*PIECES), "WriterStream", count=1000),
    stream("nothing written", ok(), "WriterStream", count=0),
    stream(
        "large responses",
        ok(*(str(index).encode().ljust(1 << 20, b".") for index in range(9))),
        count=9,
        size=1 << 20,
    ),
    stream("abort before the first response", fails("ABORTED", "a"), count=0, abort="ABORTED", details="a"),
    stream(
        "abort after responses",
        fails("ABORTED", "a", b"0", b"1", trailing=(("x-a", "1"),)),
        count=2,
        abort="ABORTED",
        details="a",
        trailing=[["x-a", "1"]],
    ),
    stream(
        "an exception after a response",
        fails("UNKNOWN", unexpected("ValueError", "x"), b"0"),
        count=1,
        **{"raise": "x"},
    ),
    stream("a code after a response", fails("ABORTED", "d", b"0"), count=1, code="ABORTED", details="d"),
    stream(
        "abort that a writer catches", fails("ABORTED", "", b"0"), "WriterStream", count=1, abort="ABORTED", swallow=1
    ),
    stream(
        "metadata around a stream",
        ok(b"0", initial=(("x-i", "1"),), trailing=(("x-t", "2"),)),
        count=1,
        initial=[["x-i", "1"]],
        trailing=[["x-t", "2"]],
    ),
    stream("a stream that yields no message", fails("UNKNOWN", unexpected("TypeError", "None is no message")), none=1),
    # Streams of requests.
    requests("no requests", "ClientStream", [], ok(b"0 0")),
    requests("empty requests", "ClientStream", [b"", b"", b""], ok(b"3 0")),
    requests("many requests", "ClientStream", PIECES, ok(b"1000 2890")),
    requests("large requests", "ClientStream", [LARGE] * 3, ok(b"3 25165824")),
    requests("requests by read()", "ReaderStream", [b"a", b"", b"c"], ok(b"a++c")),
    requests("a stream that is not read", "ClientStream", [b"x" * 100_000] * 20, ok(b"ignored"), ignore=1),
    requests("a stream that is read in part", "ClientStream", [b"stop", *[b"x" * 100_000] * 20], ok(b"1 4")),
    requests(
        "no answer to a stream",
        "ClientStream",
        [b"a"],
        fails("UNKNOWN", unexpected("TypeError", "None is no message")),
        none=1,
    ),
    requests("abort of a stream", "ClientStream", [b"a"], fails("ABORTED", "no"), abort="ABORTED", details="no"),
    replace(
        requests(
            "a streamed request over the limit",
            "ClientStream",
            [b"a", b"x" * (MAX_MESSAGE_BYTES + 1)],
            fails(
                "RESOURCE_EXHAUSTED",
                "the message has 16777217 bytes, the limit is 16777216 (server.max_message_bytes)",
            ),
        ),
        on_grpc={"details": "SERVER: Received message larger than max (16777217 vs. 16777216)"},
        why=OTHER_WORDS,
    ),
    # Both.
    requests("both streams", "BothStreams", [b"ab", b"", b"cd"], ok(b"ba", b"", b"dc")),
    requests("both streams, neither used", "BothStreams", [], ok()),
    requests("both streams by read() and write()", "ReadWriteStream", [b"ab", b"cd"], ok(b"ba", b"dc")),
    requests("abort between messages", "BothStreams", [b"ab", b"abort", b"c"], fails("DATA_LOSS", "asked to", b"ba")),
    requests(
        "an exception between messages",
        "BothStreams",
        [b"ab", b"raise"],
        fails("UNKNOWN", unexpected("ValueError", "asked to"), b"ba"),
    ),
]
