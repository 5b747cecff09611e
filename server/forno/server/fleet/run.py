"""Starts janitor and edge, which need no gRPC, then the supervisor proper; cleans up after all of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from forno.server import logs, processes, scratch
from forno.server.fleet import control_socket
from forno.server.fleet import edge as edges
from forno.server.fleet.janitor import Janitor
from forno.server.transport.envoy import supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from forno.server.address import Address
    from forno.server.config import Config
    from forno.server.repository import ModelSpec


def serve(
    config: Config, specs: Sequence[ModelSpec], address: Address, read: Callable[[], tuple[Config, Sequence[ModelSpec]]]
) -> int:
    """Serves with replicas until SIGINT or SIGTERM, then drains; SIGHUP reads the settings again.

    Args:
        config: All settings.
        specs: The models.
        address: Where to listen.
        read: Reads both again.

    Returns:
        Exit status.

    Raises:
        ConfigError: It cannot be served as asked.
    """
    reason = supervisor.why_not_inside() if config.server.transport == "envoy" else ""
    if reason:
        print(f"forno: {reason}; replicas serve with --transport grpc instead, which is slower", file=sys.stderr)  # noqa: T201

    def able(config: Config) -> Config:
        server = config.server.model_copy(update={"transport": "grpc"})
        return config.model_copy(update={"server": server}) if reason else config

    def read_again() -> tuple[Config, Sequence[ModelSpec]]:
        config, specs = read()
        return able(config), specs

    config = able(config)
    folder, lock = scratch.make()
    control = control_socket.path_of(str(address))
    janitor = Janitor([folder, control])
    try:
        return _run(config, specs, address, folder, control, janitor.group, read_again)
    finally:
        scratch.remove(folder, lock)
        control.unlink(missing_ok=True)
        janitor.close()


def _run(
    config: Config,
    specs: Sequence[ModelSpec],
    address: Address,
    folder: Path,
    control: Path,
    group: int,
    read: Callable[[], tuple[Config, Sequence[ModelSpec]]],
) -> int:
    (folder / edges.XDS_FOLDER).mkdir()
    edges.publish(folder, 0, ())
    end = edges.EdgeEnd(folder, config.fleet.affinity_header, config.server.transport == "envoy")
    edge = supervisor.Envoy(
        config, address, lambda _folder: end, logs.EnvoyLog().line, title="forno: edge", folder=folder / "edge"
    )
    processes.call_itself("forno: supervisor")
    try:
        edge.start({}, dies_with_us=True, group=group)

        from forno.server.fleet.main import Supervisor  # noqa: PLC0415  (gRPC: the edge opens meanwhile)

        return Supervisor(config, specs, str(address), folder, control, edge, group, read).run()
    finally:
        edge.close()
