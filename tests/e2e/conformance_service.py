"""A service that does everything a handler can do, mounted on either transport by the conformance tests.

Messages are plain bytes. Unary calls and streams of responses carry their command, JSON, as the request; where the
client streams, the command is the metadata `x-command`. `main` runs the service inside Envoy; as a script it runs on
grpc.aio.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import zlib
from typing import TYPE_CHECKING, Any

import grpc

from forno.v1 import predictor_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SERVICE = "test.Conformance"
COUNTS: dict[str, int] = {}
"""How often what has happened, by a name that the caller has chosen: `ended NAME`, `cancelled NAME`, ..."""
RUNNING: dict[str, int] = {"": 0}  # handlers by method


def _count(what: str) -> None:
    COUNTS[what] = COUNTS.get(what, 0) + 1


@contextlib.contextmanager
def _running(method: str, command: dict[str, Any]) -> Iterator[None]:
    """Counts a handler while it runs, and how it has ended."""
    name = command.get("name", "")
    RUNNING[method] = RUNNING.get(method, 0) + 1
    _count(f"begun {name}")
    try:
        yield
    except asyncio.CancelledError:
        _count(f"cancelled {name}")
        raise
    except GeneratorExit:
        _count(f"closed {name}")
        raise
    finally:
        RUNNING[method] -= 1
        _count(f"ended {name}")


async def _begin(command: dict[str, Any], context: Any) -> None:
    """Does what comes before the first message."""
    if "callback" in command:
        context.add_done_callback(lambda _: _count(f"callback {command['callback']}"))
    if "compress" in command:
        context.set_compression(getattr(grpc.Compression, command["compress"]))
    if "initial" in command:
        await context.send_initial_metadata(tuple(map(_pair, command["initial"])))
    if "trailing" in command:
        context.set_trailing_metadata(tuple(map(_pair, command["trailing"])))
    if command.get("late_compress"):
        context.set_compression(grpc.Compression.Gzip)
    if command.get("next_plain"):
        context.disable_next_message_compression()


async def _end(command: dict[str, Any], context: Any) -> None:
    """Does what comes after the last message."""
    if "sleep" in command:
        await asyncio.sleep(command["sleep"])
    if "cancel_self" in command:
        raise asyncio.CancelledError
    if "raise" in command:
        raise ValueError(command["raise"])
    if "code" in command:
        context.set_code(command["code"] if isinstance(command["code"], int) else _code(command["code"]))
        context.set_details(command.get("details", ""))
    if "abort" in command:
        trailing = tuple(map(_pair, command.get("abort_trailing", ())))
        try:
            await context.abort(_code(command["abort"]), command.get("details", ""), trailing)
        except grpc.aio.AbortError:
            if not command.get("swallow"):
                raise
    if "rich" in command:
        await context.abort_with_status(_Rich(_code(command["rich"]), command["details"]))


class _Rich(grpc.Status):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = (("grpc-status-details-bin", b"\x08\x05\x00\xff"),)


def _code(name: str) -> grpc.StatusCode:
    return grpc.StatusCode[name]


def _pair(pair: list[str]) -> tuple[str, str | bytes]:
    key, value = pair
    return key, (bytes.fromhex(value) if key.endswith("-bin") else value)


def _metadata(context: Any) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for key, value in context.invocation_metadata():
        out.setdefault(key, []).append(value.hex() if isinstance(value, bytes) else value)
    return out


def _from_metadata(context: Any) -> dict[str, Any]:
    found = _metadata(context).get("x-command")
    return json.loads(found[0]) if found else {}


def _report(command: dict[str, Any], context: Any) -> Any:
    match command["report"]:
        case "metadata":
            return _metadata(context)
        case "time":
            return context.time_remaining()
        case "peer":
            return context.peer().partition(":")[0]
        case "count":
            return COUNTS.get(command["of"], 0)
        case "running":
            return {method: count for method, count in RUNNING.items() if count}
        case "tasks":
            return len(asyncio.all_tasks())
        case "pid":
            return os.getpid()
        case other:
            raise ValueError(other)


def _answer(command: dict[str, Any], request: bytes = b"") -> Any:
    if command.get("none"):
        return None
    if command.get("echo"):
        return request
    return b"x" * command["size"] if "size" in command else command.get("answer", "ok").encode()


async def unary(request: bytes, context: Any) -> Any:
    # A large request is a command, a newline, and ballast.
    command = json.loads(request.partition(b"\n")[0] or b"{}")
    if "report" in command:
        return json.dumps(_report(command, context)).encode()
    with _running("unary", command):
        await _begin(command, context)
        try:
            await _end(command, context)
        except asyncio.CancelledError:
            if "stubborn" not in command:
                raise
            _count(f"stubborn {command['stubborn']}")
        if command.get("crc"):
            return str(zlib.crc32(request)).encode()
        return _answer(command, request)


async def server_stream(request: bytes, context: Any) -> AsyncIterator[Any]:
    command = json.loads(request)
    with _running("server_stream", command):
        await _begin(command, context)
        for index in range(command.get("count", 3)):
            yield None if command.get("none") else str(index).encode().ljust(command.get("size", 1), b".")
            _count(f"sent {command.get('name', '')}")
            if "pause" in command:
                await asyncio.sleep(command["pause"])
        await _end(command, context)


async def writer_stream(request: bytes, context: Any) -> None:
    command = json.loads(request)
    with _running("writer_stream", command):
        await _begin(command, context)
        for index in range(command.get("count", 3)):
            await context.write(str(index).encode().ljust(command.get("size", 1), b"."))
            _count(f"sent {command.get('name', '')}")
            if "pause" in command:
                await asyncio.sleep(command["pause"])
        await _end(command, context)
    if command.get("write_later"):
        asyncio.get_running_loop().create_task(_write_later(context, command["write_later"]))


async def _write_later(context: Any, name: str) -> None:
    await asyncio.sleep(0.1)
    try:
        await context.write(b"too late")
        _count(f"write worked {name}")
    except Exception:  # noqa: BLE001  (each transport has its own)
        _count(f"write refused {name}")


async def client_stream(requests: Any, context: Any) -> Any:
    command = _from_metadata(context)
    with _running("client_stream", command):
        await _begin(command, context)
        if command.get("ignore"):
            return b"ignored"
        await asyncio.sleep(command.get("wait", 0))
        count = total = 0
        async for request in requests:
            count += 1
            total += len(request)
            if "pause" in command:
                await asyncio.sleep(command["pause"])
            if request == b"stop":
                break
        await _end(command, context)
        return None if command.get("none") else f"{count} {total}".encode()


async def reader_stream(requests: Any, context: Any) -> bytes:
    command = _from_metadata(context)
    with _running("reader_stream", command):
        await _begin(command, context)
        parts = []
        while (request := await context.read()) is not grpc.aio.EOF:
            parts.append(request)
        await _end(command, context)
        return b"+".join(parts)


async def both_streams(requests: Any, context: Any) -> AsyncIterator[bytes]:
    command = _from_metadata(context)
    with _running("both_streams", command):
        await _begin(command, context)
        async for request in requests:
            if request == b"abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "asked to")
            if request == b"raise":
                raise ValueError("asked to")
            yield request[::-1]
        await _end(command, context)


async def read_write_stream(requests: Any, context: Any) -> None:
    command = _from_metadata(context)
    with _running("read_write_stream", command):
        await _begin(command, context)
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request[::-1])
        await _end(command, context)


def _not_decodable(data: bytes) -> Any:
    raise ValueError(f"{len(data)} bytes are no message")


def _not_encodable(message: Any) -> bytes:
    raise ValueError(f"{message!r} cannot be encoded")


def _encode(message: Any) -> bytes:
    """As a generated serializer: nothing but a message will do."""
    if not isinstance(message, bytes):
        raise TypeError(f"{message!r} is no message")
    return message


HANDLERS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary, response_serializer=_encode),
    "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream, response_serializer=_encode),
    "WriterStream": grpc.unary_stream_rpc_method_handler(writer_stream),
    "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream, response_serializer=_encode),
    "ReaderStream": grpc.stream_unary_rpc_method_handler(reader_stream),
    "BothStreams": grpc.stream_stream_rpc_method_handler(both_streams),
    "ReadWriteStream": grpc.stream_stream_rpc_method_handler(read_write_stream),
    "BadRequest": grpc.unary_unary_rpc_method_handler(unary, request_deserializer=_not_decodable),
    "BadResponse": grpc.unary_unary_rpc_method_handler(unary, response_serializer=_not_encodable),
    "LeftOut": grpc.unary_unary_rpc_method_handler(predictor_pb2_grpc.PredictorServicer().Predict),
    "BadStream": grpc.unary_stream_rpc_method_handler(server_stream, response_serializer=_not_encodable),
}


async def serving(request: bytes, context: Any) -> bytes:
    """Health/Check: SERVING, in the wire format."""
    return b"\x08\x01"


HEALTH = {"Check": grpc.unary_unary_rpc_method_handler(serving)}


def main(argument: str) -> None:
    """Inside Envoy; `argument` is JSON with `control`, a descriptor whose end ends the server."""
    import uvloop

    from forno.server.config import Config
    from forno.server.transport.envoy.host import EnvoyHost

    given = json.loads(argument)

    async def run() -> None:
        host = EnvoyHost(given["max_message_bytes"], lambda *_: None, max_call_s=Config().server.max_call_s)
        host.add_registered_method_handlers(SERVICE, HANDLERS)
        host.add_registered_method_handlers("grpc.health.v1.Health", HEALTH)
        host.start()
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=given["control"]))
        writer.write(f"ready {given.get('port', 0)}\n".encode())
        await asyncio.wait(
            [asyncio.create_task(host.stopped.wait()), asyncio.create_task(reader.readline())],
            return_when=asyncio.FIRST_COMPLETED,
        )

    uvloop.run(run())
    os.kill(os.getpid(), signal.SIGTERM)


async def aio_main(target: str, max_message_bytes: int) -> None:
    """On grpc.aio, until standard input ends."""
    from forno.server.address import Address
    from forno.server.transport.aio import AioHost

    host = AioHost(Address.parse(target), max_message_bytes, lambda *_: None)
    host.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, HANDLERS),))
    host.grpc.add_registered_method_handlers(SERVICE, HANDLERS)
    port = await host.start()
    print("ready", port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await host.stop(0)


if __name__ == "__main__":
    asyncio.run(aio_main(sys.argv[1], int(sys.argv[2])))
