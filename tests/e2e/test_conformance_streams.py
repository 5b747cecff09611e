"""Calls over time: cancellation, back-pressure, and many calls at once, the same on both transports."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tests.e2e import hosts
from tests.e2e.hosts import SERVICE, TRANSPORTS, Host, eventually
from tests.e2e.raw_http2 import RawClient, frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MIB = 1 << 20


@pytest.fixture(scope="module", params=[*TRANSPORTS, pytest.param("edge", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with hosts.serve(request.param) as host:
        yield host


@pytest.fixture
async def channel(host: Host) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(host.target, options=hosts.CHANNEL_OPTIONS) as channel:
        yield channel


async def occurs(host: Host, what: str, times: int = 1) -> None:
    """Waits until the service has counted something."""
    await asyncio.to_thread(eventually, lambda: host.count(what) == times)


def start(channel: grpc.aio.Channel, method: str, name: str, **options: Any) -> Any:
    """A call whose handler waits; the requests of a stream never end."""
    kinds = {"Unary": "unary_unary", "ServerStream": "unary_stream", "ClientStream": "stream_unary"}
    call = getattr(channel, kinds.get(method, "stream_stream"))(f"/{SERVICE}/{method}")
    command = json.dumps({"sleep": 30, "count": 0, "name": name})
    if method in {"Unary", "ServerStream"}:
        return call(command.encode(), **options)
    return call(_endless(), metadata=[("x-command", command)], **options)


async def _endless() -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.sleep(60)


METHODS = ("Unary", "ServerStream", "ClientStream", "BothStreams", "ReadWriteStream")


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_call_s_handler_is_cancelled(host, channel, method):
    call = start(channel, method, f"by cancel {method}")
    await occurs(host, f"begun by cancel {method}")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await _drain(call)
    await occurs(host, f"cancelled by cancel {method}")
    await occurs(host, f"ended by cancel {method}")


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_s_handler_is_cancelled_at_its_deadline(host, channel, method):
    call = start(channel, method, f"by deadline {method}", timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await _drain(call)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await occurs(host, f"cancelled by deadline {method}")


@pytest.mark.parametrize("method", METHODS)
def test_a_handler_is_cancelled_when_its_connection_is_closed(host, method):
    command = json.dumps({"sleep": 30, "count": 0, "name": f"by disconnect {method}"})
    unary_request = method in {"Unary", "ServerStream"}
    with RawClient(host.port) as client:
        stream = client.open(method, () if unary_request else [("x-command", command)])
        client.send(stream, frame(command.encode()), end=unary_request)
        eventually(lambda: host.count(f"begun by disconnect {method}") == 1)
    eventually(lambda: host.count(f"cancelled by disconnect {method}") == 1)


async def _drain(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def test_a_deadline_of_a_millisecond(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")
    for _ in range(50):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call(b'{"sleep": 5}', timeout=0.001)
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.to_thread(eventually, lambda: not host.ask("running"))


async def test_a_reset_stream_s_handler_is_cancelled_and_the_connection_goes_on(host):
    def reset() -> None:
        with RawClient(host.port) as client:
            unary = client.open("Unary")
            client.send(unary, frame(b'{"sleep": 30, "name": "by reset"}'), end=True)
            eventually(lambda: host.count("begun by reset") == 1)
            client.reset(unary)
            eventually(lambda: host.count("cancelled by reset") == 1)
            after = client.open("Unary")
            client.send(after, frame(b"{}"), end=True)
            assert client.answer(after).status == "0"

    await asyncio.to_thread(reset)


async def test_a_handler_may_finish_its_work_after_its_caller_has_gone(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")(b'{"sleep": 30, "stubborn": "s", "name": "stubborn"}')
    await occurs(host, "begun stubborn")
    call.cancel()
    await occurs(host, "stubborn s")
    await occurs(host, "ended stubborn")


async def test_a_writer_that_waits_for_its_client_is_cancelled(host, channel):
    for method in ("ServerStream", "WriterStream"):
        name = f"blocked {method}"
        command = json.dumps({"count": 1000, "size": MIB, "name": name})
        call = channel.unary_stream(f"/{SERVICE}/{method}")(command.encode())
        await call.read()
        await asyncio.sleep(0.3)
        call.cancel()
        await occurs(host, f"ended {name}")


async def test_cancelling_before_the_handler_begins_leaves_nothing(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")
    for delay_s in (0, 0.0002, 0.0005, 0.001, 0.002):
        calls = [call(b'{"sleep": 30}') for _ in range(20)]
        await asyncio.sleep(delay_s)
        for each in calls:
            each.cancel()
    await asyncio.to_thread(eventually, lambda: not host.ask("running"))


async def test_a_slow_reader_holds_up_its_writer_alone(host):
    """1 GiB is asked for and not read: memory stays bounded, the writer waits, other calls are served."""

    def refuse_to_read() -> None:
        before_bytes = host.resident_bytes()
        with RawClient(host.port, window_bytes=MIB) as client:
            client.acknowledge = False
            for method in ("ServerStream", "WriterStream"):
                name = f"unread {method}"
                stream = client.open(method)
                client.send(stream, frame(json.dumps({"count": 1024, "size": MIB, "name": name}).encode()), end=True)
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    client.receive(0.1)
                sent = host.count(f"sent {name}")
                assert sent < 40
                time.sleep(0.2)
                assert host.count(f"sent {name}") == sent
            assert host.resident_bytes() - before_bytes < 150 * MIB
        for method in ("ServerStream", "WriterStream"):
            eventually(lambda method=method: host.count(f"ended unread {method}") == 1)

    await asyncio.to_thread(refuse_to_read)


async def test_a_slow_reader_gets_everything_in_the_end(host, channel):
    command = b'{"count": 60, "size": 1048576}'
    call = channel.unary_stream(f"/{SERVICE}/ServerStream")(command)
    count = 0
    async for message in call:
        assert len(message) == MIB
        count += 1
        await asyncio.sleep(0.005)
    assert count == 60


def test_a_reader_that_falls_behind_with_small_messages_keeps_its_connection(host):
    """Its windows are open, and it is the socket that is full: with small frames, of which there may be very many."""
    name = "behind"
    with RawClient(host.port, window_bytes=64 * MIB) as client:
        client.h2.increment_flow_control_window(64 * MIB)
        stream = client.open("ServerStream")
        client.send(stream, frame(json.dumps({"count": 10**9, "pause": 0, "name": name}).encode()), end=True)
        time.sleep(1.5)
        received_bytes, end = 0, time.monotonic() + 2
        while received_bytes < 8 * MIB and time.monotonic() < end:  # more than the kernel holds
            piece = client.socket.recv(MIB)
            assert piece, f"the connection was closed after {received_bytes} bytes"
            received_bytes += len(piece)
    eventually(lambda: host.count(f"ended {name}") == 1)


@pytest.mark.parametrize("size", [0, 65536], ids=["empty messages", "large messages"])
async def test_a_slow_handler_holds_up_its_client_alone(host, size):
    """A client that writes without end is stopped: what waits for the handler stays bounded."""
    name = f"flooded {size}"
    limit_bytes = 200 * MIB

    def flood() -> int:
        before_bytes = host.resident_bytes()
        sent = 0
        with RawClient(host.port) as client:
            stream = client.open("ClientStream", [("x-command", json.dumps({"wait": 60, "name": name}))])
            batch = frame(b"x" * size) * (3000 if not size else 1)
            end = time.monotonic() + 3
            while time.monotonic() < end and sent < 4 * limit_bytes:
                if client.h2.local_flow_control_window(stream) < len(batch):
                    if not client.receive(0.5):
                        break
                    continue
                client.send(stream, batch)
                sent += len(batch)
            assert host.ask("pid")
            assert host.resident_bytes() - before_bytes < limit_bytes
        return sent

    sent_bytes = await asyncio.to_thread(flood)
    if size:
        assert sent_bytes < limit_bytes
    await occurs(host, f"ended {name}")


async def test_a_stream_without_pause_lets_other_calls_run(host, channel):
    """Tiny messages, as fast as they come: neither writing nor reading may keep the event loop to itself."""
    endless = channel.unary_stream(f"/{SERVICE}/ServerStream")(b'{"count": 1000000000, "name": "endless"}')

    async def read() -> None:
        async for _ in endless:
            pass

    reading = asyncio.create_task(read())
    await occurs(host, "begun endless")
    call = channel.unary_unary(f"/{SERVICE}/Unary")
    slowest_s = 0.0
    for _ in range(20):
        begun_s = time.monotonic()
        await call(b"{}", timeout=10)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
    endless.cancel()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert slowest_s < 2
    await occurs(host, "ended endless")


async def test_two_hundred_streams_on_one_connection(host, channel):
    async def one(number: int) -> bool:
        call = channel.stream_stream(f"/{SERVICE}/BothStreams")()
        for turn in range(5):
            text = f"{number}:{turn}".encode()
            await call.write(text)
            if await call.read() != text[::-1]:
                return False
        await call.done_writing()
        return await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK

    assert all(await asyncio.gather(*map(one, range(200))))


async def test_two_hundred_waiting_calls_do_not_hold_up_another(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")
    waiting = [call(b'{"sleep": 1}') for _ in range(200)]
    await call(b"{}", timeout=5)
    assert await asyncio.gather(*waiting) == [b"ok"] * 200


async def test_answers_reach_the_calls_they_belong_to(host, channel):
    call = channel.unary_unary(f"/{SERVICE}/Unary")

    async def one(number: int) -> bool:
        body = json.dumps({"echo": 1}).encode() + b"\n" + bytes(str(number), "ascii") * (number % 50)
        return bool(await call(body) == body)

    for first in range(0, 2000, 250):
        assert all(await asyncio.gather(*map(one, range(first, first + 250))))


def test_messages_larger_than_all_windows_both_ways_at_once(host):
    big = b'{"echo": 1}\n' + bytes(8 * MIB)
    failures: list[int] = []

    def one(number: int) -> None:
        with host.channel() as channel:
            body = big + bytes([number])
            if channel.unary_unary(f"/{SERVICE}/Unary")(body, timeout=30) != body:
                failures.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_handler_is_left_over(host):
    eventually(lambda: not host.ask("running"))
    if host.transport == "envoy":  # grpc.aio keeps tasks of its own
        assert host.ask("tasks") < 10
