"""`forno serve`: serves models until it is told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.cli import arguments as common
from forno.server.plain import begin_apart, plain

if TYPE_CHECKING:
    import argparse

    from forno.server.config import Config
    from forno.server.repository import ModelSpec

DESCRIPTION = """\
Serves models over gRPC and REST on one port until SIGINT or SIGTERM, then finishes the calls it holds. SIGHUP has it
read its models and settings again."""
EPILOG = """\
examples:
  forno serve model.onnx
  forno serve models/ --address 0.0.0.0:8080
  forno serve forno.yaml --set server.drain_s=30
  forno serve models/ --replicas 4

exit status: 0 after a stop that was asked for, 2 where it cannot serve as asked (nothing has been served
then)"""
_FLAGS = ("server.address", "server.transport", "fleet.replicas", "server.log_level")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    common.add(parser)
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="where to listen, for gRPC and REST alike; port 0 = any free one; unix:PATH = a Unix socket "
        "(default 127.0.0.1:8080)",
    )
    parser.add_argument(
        "--transport",
        metavar="envoy|proxy|grpc",
        help="envoy: inside Envoy, the fastest; proxy: behind a separate Envoy; grpc: gRPC alone, no REST "
        "(default envoy)",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="so many server processes behind one Envoy, which loses no call when one of them ends; see forno fleet "
        "(default 0: one server, nothing before it)",
    )
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")


def run(arguments: argparse.Namespace) -> int:
    """Serves.

    Raises:
        ConfigError: It cannot be served as asked.
    """
    settled = begin_apart(lambda: _settle(arguments))

    from forno.server.launch import serve  # noqa: PLC0415  (while the settings are read)

    return serve(*settled(), lambda: _settle(arguments))


def _settle(arguments: argparse.Namespace) -> tuple[Config, list[ModelSpec]]:
    from forno.server.repository import find  # noqa: PLC0415  (`--help` needs none of it)

    config, paths = common.resolve(arguments, _FLAGS)
    return plain((config, find(paths, config)))
