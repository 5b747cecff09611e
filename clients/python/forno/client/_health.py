"""`forno health`: whether a server is ready, as an exit status, for health checks of containers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import grpc

from forno.client._errors import NotFound, RequestError, from_rpc

if TYPE_CHECKING:
    import argparse

DESCRIPTION = "Asks a running server, by grpc.health.v1, whether it is ready; every transport answers."
EPILOG = """\
examples:
  forno health
  forno health spam --address 127.0.0.1:8080

exit status: 0 ready, 1 not ready or not there"""
_FAILED = 1
_METHOD = "/grpc.health.v1.Health/Check"
_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_SERVING = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="one model (default: all of them)")
    parser.add_argument(
        "--address", default="127.0.0.1:8080", metavar="HOST:PORT", help="the server (default 127.0.0.1:8080)"
    )
    parser.add_argument("--timeout-s", type=float, default=3.0, metavar="S", help="seconds to wait (3)")


def run(arguments: argparse.Namespace) -> int:
    """Asks, and prints the answer in one line."""
    try:
        state = _state(arguments.address, arguments.model, arguments.timeout_s)
    except NotFound:  # that is all the protocol says of it
        return _fail(f"{arguments.address} has no model {arguments.model!r}")
    except RequestError as error:
        return _fail(error)
    sys.stdout.write(f"{_STATES[state] if state < len(_STATES) else state}\n")
    return 0 if state == _SERVING else _FAILED


def _fail(message: object) -> int:
    sys.stderr.write(f"forno: {message}\n")
    return _FAILED


def _state(address: str, service: str, timeout_s: float) -> int:
    """Field 1 of HealthCheckResponse.

    Both messages have one field, so they are written by hand: the base install has no grpcio-health-checking.

    Raises:
        RequestError: There was no answer.
    """
    name = service.encode()
    if len(name) > 127:  # its length would take more than one byte, and no model has such a name
        raise RequestError(f"no model has a name of {len(name)} bytes")
    request = bytes((0x0A, len(name))) + name if name else b""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(_METHOD, lambda message: message, lambda message: message)
        try:
            response = check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc(error, address) from error
    return response[1] if len(response) >= 2 and response[0] == 0x08 else 0
