"""The floor of Python's own gRPC server: `grpc.aio` that answers every Predict with the bytes it got.

Usage: python -m bench.echo_aio PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import Any

import grpc
import grpc.aio


async def _echo(message: bytes, _context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return message


async def serve(port: int) -> None:
    """Serves until SIGTERM."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("forno.v1.Predictor", {"Predict": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(0)


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # the server uses it where it is installed, so its floor does
        import uvloop

        uvloop.install()
    asyncio.run(serve(int(sys.argv[1])))
