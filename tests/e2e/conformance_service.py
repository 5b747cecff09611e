"""A service that does everything a handler can do, mounted on either transport by the conformance tests.

Messages are plain bytes. `main` runs it inside Envoy; `aio_main` on grpc.aio.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import grpc

SERVICE = "test.Conformance"
ENDED: dict[str, int] = {}  # how handlers have ended, by what was asked of them


def _count(what: str) -> None:
    ENDED[what] = ENDED.get(what, 0) + 1


async def _obey(command: dict[str, Any], context: Any) -> None:
    """Does to the context what the command says."""
    if command.get("initial"):
        await context.send_initial_metadata(tuple(map(_pair, command["initial"])))
    if command.get("trailing"):
        context.set_trailing_metadata(tuple(map(_pair, command["trailing"])))
    if command.get("gzip"):
        context.set_compression(grpc.Compression.Gzip)
    if "code" in command:
        context.set_code(getattr(grpc.StatusCode, command["code"]))
        context.set_details(command.get("details", ""))
    if "sleep" in command:
        try:
            await asyncio.sleep(command["sleep"])
        except asyncio.CancelledError:
            _count(f"cancelled {command.get('name', '')}")
            raise
    if "raise" in command:
        raise ValueError(command["raise"])
    if "abort" in command:
        await context.abort(getattr(grpc.StatusCode, command["abort"]), command.get("details", ""))


def _pair(pair: list[str]) -> tuple[str, str | bytes]:
    key, value = pair
    return key, (bytes.fromhex(value) if key.endswith("-bin") else value)


async def unary(request: bytes, context: Any) -> bytes:
    command = json.loads(request)
    await _obey(command, context)
    if command.get("report") == "metadata":
        pairs = [
            (key, value.hex() if isinstance(value, bytes) else value)
            for key, value in context.invocation_metadata()
        ]
        return json.dumps(sorted(pair for pair in pairs if pair[0].startswith("x-test"))).encode()
    if command.get("report") == "time":
        remaining = context.time_remaining()
        return json.dumps(remaining).encode()
    if command.get("report") == "ended":
        return json.dumps(ENDED.get(command["name"], 0)).encode()
    if command.get("report") == "peer":
        return context.peer().partition(":")[0].encode()
    if command.get("none"):
        return None  # type: ignore[return-value]
    return b"x" * command["size"] if "size" in command else command.get("answer", "ok").encode()


async def server_stream(request: bytes, context: Any) -> Any:
    command = json.loads(request)
    await _obey(
        {key: value for key, value in command.items() if key in ("initial", "trailing", "gzip")}, context
    )
    for index in range(command.get("count", 3)):
        yield str(index).encode().ljust(command.get("size", 1), b".")
        if "pause" in command:
            try:
                await asyncio.sleep(command["pause"])
            except asyncio.CancelledError:
                _count(f"cancelled {command.get('name', '')}")
                raise
    await _obey(
        {key: value for key, value in command.items() if key not in ("initial", "trailing", "gzip")}, context
    )


async def writer_stream(request: bytes, context: Any) -> None:
    for index in range(int(request)):
        await context.write(str(index).encode())


async def client_stream(requests: Any, context: Any) -> bytes:
    count = total = 0
    async for request in requests:
        count += 1
        total += len(request)
        if request == b"stop":
            break
    return f"{count} {total}".encode()


async def reader_stream(requests: Any, context: Any) -> bytes:
    parts = []
    while (request := await context.read()) is not grpc.aio.EOF:
        parts.append(request)
    return b"+".join(parts)


async def both_streams(requests: Any, context: Any) -> Any:
    async for request in requests:
        if request == b"abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "asked to")
        if request == b"raise":
            raise ValueError("asked to")
        yield request[::-1]


def add_to(server: Any) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
        "WriterStream": grpc.unary_stream_rpc_method_handler(writer_stream),
        "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
        "ReaderStream": grpc.stream_unary_rpc_method_handler(reader_stream),
        "BothStreams": grpc.stream_stream_rpc_method_handler(both_streams),
    }
    server.add_registered_method_handlers(SERVICE, handlers)
    if isinstance(server, grpc.aio.Server):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def main(argument: str) -> None:
    """Inside Envoy; `argument` is JSON with `control`, a descriptor on which a line asks it to end."""
    import uvloop

    from forno.server.transport.envoy.host import EnvoyHost

    given = json.loads(argument)

    async def run() -> None:
        host = EnvoyHost(given["max_message_bytes"], lambda *_: None)
        add_to(host)
        host.start()
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=given["control"]))
        writer.write(b"ready\n")
        await asyncio.wait(
            [asyncio.create_task(host.stopped.wait()), asyncio.create_task(reader.readline())],
            return_when=asyncio.FIRST_COMPLETED,
        )

    uvloop.run(run())


async def aio_main(target: str, max_message_bytes: int) -> None:
    from forno.server.transport.aio import AioHost

    host = AioHost(target, max_message_bytes, lambda *_: None)
    add_to(host.grpc)
    await host.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(aio_main(sys.argv[1], int(sys.argv[2])))
