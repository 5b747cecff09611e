"""Every way a call can go, the same on both transports: status, message, metadata both ways, and messages."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tests.e2e import hosts
from tests.e2e.conformance_cases import ANY, CASES, NO_ANSWER, Case, Outcome
from tests.e2e.hosts import SERVICE, WITH_EDGE, Host

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDED_BY_ENVOY = frozenset(("date", "server"))


@pytest.fixture(scope="module", params=WITH_EDGE)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with hosts.serve(request.param) as host:
        yield host


@pytest.fixture(scope="module")
def channel(host: Host) -> Iterator[grpc.Channel]:
    with host.channel() as channel:
        yield channel


def outcome(channel: grpc.Channel, case: Case, timeout_s: float) -> Outcome:
    """Makes the call."""
    request_streaming = case.method in {"ClientStream", "ReaderStream", "BothStreams", "ReadWriteStream"}
    response_streaming = case.method in {"ServerStream", "WriterStream", "BadStream", "BothStreams", "ReadWriteStream"}
    kind = f"{'stream' if request_streaming else 'unary'}_{'stream' if response_streaming else 'unary'}"
    method = getattr(channel, kind)(f"/{SERVICE}/{case.method}")
    given = iter(case.requests) if request_streaming else case.requests[0]
    options = {"timeout": timeout_s, "metadata": [("x-command", json.dumps(case.command))], **case.options}
    messages: list[bytes] = []
    call: Any = None
    try:
        if response_streaming:
            call = method(given, **options)
            messages.extend(call)
        else:
            message, call = method.with_call(given, **options)
            messages.append(message)
    except grpc.RpcError as error:
        call = error
    return Outcome(
        call.code().name,
        call.details() or "",
        tuple(messages),
        tuple((key, value) for key, value in call.initial_metadata() or () if key not in ADDED_BY_ENVOY),
        # An answer that is nothing but a status has one block of headers: Envoy's own are then among the trailers.
        tuple((key, value) for key, value in call.trailing_metadata() or () if key not in ADDED_BY_ENVOY),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_ends_as_expected(host, channel, case):
    expected = replace(case.expected, **case.on_grpc) if host.transport == "grpc" else case.expected
    assert bool(case.on_grpc) == bool(case.why), "a difference needs a reason"
    found = outcome(channel, case, 0.5 if expected.code == NO_ANSWER else 10)
    if expected.details is ANY:
        expected = replace(expected, details=found.details)
    assert _short(found) == _short(expected)
    assert found == expected


def test_no_handler_is_left_over(host):
    hosts.eventually(lambda: not host.ask("running"))


def _short(outcome: Outcome) -> Outcome:
    """With messages that a person can read in a failure."""
    return replace(outcome, messages=tuple(message[:40] for message in (outcome.messages or ())[:20]))


def test_the_client_s_metadata_arrives(host):
    with host.channel() as channel:
        metadata = [("x-r", "1"), ("x-r", "2"), ("x-b-bin", b"\0\xff"), ("x-b-bin", b""), ("x-s", "a, b"), ("x-e", "")]
        call = channel.unary_unary(f"/{SERVICE}/Unary")
        seen = json.loads(call(b'{"report": "metadata"}', metadata=metadata, timeout=5))
    ours = {key: values for key, values in seen.items() if key[:2] == "x-" and len(key) < 8}
    assert ours == {"x-r": ["1", "2"], "x-b-bin": ["00ff", ""], "x-s": ["a, b"], "x-e": [""]}
    assert seen["user-agent"][0].startswith("grpc-python/")
    assert not {"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding"} & set(seen)


def test_the_peer_is_an_address(host):
    assert host.ask("peer") == "ipv4"


def test_a_call_without_a_deadline_has_no_time_to_remain(host, channel):
    assert channel.unary_unary(f"/{SERVICE}/Unary")(b'{"report": "time"}') == b"null"


def test_the_handler_sees_the_time_that_remains(host, channel):
    remaining_s = json.loads(channel.unary_unary(f"/{SERVICE}/Unary")(b'{"report": "time"}', timeout=7))
    assert 5 < remaining_s <= 7.1  # grpc-timeout is rounded up


def test_done_callbacks_run_once_however_a_call_ends(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")
    call(b'{"callback": "success"}')
    with pytest.raises(grpc.RpcError):
        call(b'{"callback": "abort", "abort": "ABORTED"}')
    with pytest.raises(grpc.RpcError):
        call(b'{"callback": "raise", "raise": "x"}')
    with pytest.raises(grpc.RpcError):
        call(b'{"callback": "deadline", "sleep": 10}', timeout=0.1)
    list(channel.unary_stream(f"/{SERVICE}/ServerStream")(b'{"callback": "stream"}'))
    for name in ("success", "abort", "raise", "deadline", "stream"):
        hosts.eventually(lambda name=name: host.count(f"callback {name}") == 1)


def test_a_write_after_the_end_is_refused(host, channel):
    assert list(channel.unary_stream(f"/{SERVICE}/WriterStream")(b'{"write_later": "w", "count": 1}')) == [b"0"]
    hosts.eventually(lambda: host.count("write refused w") == 1)
    assert host.count("write worked w") == 0
