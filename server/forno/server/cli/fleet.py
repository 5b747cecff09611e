"""`forno fleet`: looks at the replicas of a running server, changes their number, replaces them."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from forno.v1 import fleet_pb2

DESCRIPTION = """\
Controls a server that was started with `forno serve ... --replicas N`, over a socket that only its owner may open.
No call is lost while replicas come and go."""
EPILOG = """\
actions:
  status    which replicas there are, and how they are
  scale N   have N replicas
  restart   replace one replica after the other; each new one is ready before the old one leaves
  reload    read the settings again, and replace the replicas by some that have them; the signal SIGHUP does the same

exit status: 0 done, 1 it could not be done (what was there before goes on), 2 no such server"""
ACTIONS = ("status", "scale", "restart", "reload")
_HEADINGS = ("REPLICA", "STATE", "PID", "UP", "RESTARTS", "ACTIVE", "CALLS", "CPUS", "GPUS")
_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument("count", nargs="?", type=int, metavar="N", help="how many replicas, for scale")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the server, as it was started; not needed where one runs"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, metavar="S", help="longest wait, in seconds (default 600)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Does it.

    Raises:
        ConfigError: There is no such server, or a number is missing or too many.
    """
    if (arguments.count is not None) != (arguments.action == "scale"):
        raise ConfigError(
            "scale needs how many replicas there should be, such as: forno fleet scale 3"
            if arguments.action == "scale"
            else f"{arguments.action} takes no number; to have so many replicas: forno fleet scale {arguments.count}"
        )

    from forno.server.fleet import control_socket  # noqa: PLC0415  (`--help` needs none of it)

    path = control_socket.find(arguments.address)

    import grpc  # noqa: PLC0415  (heavy)

    from forno.v1 import fleet_pb2, fleet_pb2_grpc  # noqa: PLC0415  (heavy)

    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        try:
            match arguments.action:
                case "scale":
                    request = fleet_pb2.ScaleFleetRequest(replicas=arguments.count)
                    status = stub.ScaleFleet(request, timeout=arguments.timeout_s)
                case "restart":
                    status = stub.RestartFleet(fleet_pb2.RestartFleetRequest(), timeout=arguments.timeout_s)
                case "reload":
                    status = stub.ReloadFleet(fleet_pb2.ReloadFleetRequest(), timeout=arguments.timeout_s)
                case _:
                    status = stub.GetFleet(fleet_pb2.GetFleetRequest(), timeout=arguments.timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ConfigError(f"no fleet answers at {path}: {error.details()}") from None
            for line in str(error.details()).splitlines():
                print(f"forno: {line}", file=sys.stderr)
            return _FAILED
    if status.kept_settings:
        from forno.server import fixed  # noqa: PLC0415  (only here)

        print(f"forno: {fixed.told([*status.kept_settings])}", file=sys.stderr)
    print(*_lines(status, time.time()), sep="\n")
    return 0


def _lines(status: fleet_pb2.FleetStatus, now_s: float) -> Iterator[str]:
    from forno.v1 import fleet_pb2  # noqa: PLC0415  (heavy)

    ready = sum(one.state == fleet_pb2.REPLICA_STATE_READY for one in status.replicas)
    yield f"{status.address}: {ready} of {status.replicas_wanted} replicas ready"
    rows = [_HEADINGS]
    for one in status.replicas:
        state = fleet_pb2.ReplicaState.Name(one.state).removeprefix("REPLICA_STATE_").lower()
        up = f"{now_s - one.start_time.ToMilliseconds() / 1000:.0f} s" if one.pid else "-"
        rows.append((
            *(str(one.index), state, str(one.pid or "-"), up, str(one.restarts)),
            *(str(one.active_calls), str(one.total_calls), _ranges(one.cpus), one.gpus or "-"),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    for one in status.replicas:
        if one.trouble:
            yield f"replica {one.index}: {one.trouble}"


def _ranges(numbers: object) -> str:
    """Cores as people write them, such as 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):  # type: ignore[call-overload]  # a repeated field
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts) or "-"
