"""What a server may take at most: connections, memory, open files."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.transport.envoy.ends import TYPES

if TYPE_CHECKING:
    from forno.server.config import Config

_MONITORS = f"{TYPES}.extensions.resource_monitors"
_OTHER_FILES = 256  # what is open beside connections: models, logs, sockets of our own
_UNBOUNDED = 1_000_000  # connections of an edge of ours; without any bound Envoy warns
_SHARE_OF_EDGE = 4  # its part of the memory is one in so many; replicas and their models get the rest


def heap_bytes(config: Config) -> int:
    """The ceiling of the Envoy that listens on the public address; 0 = none."""
    set_bytes = config.server.max_heap_bytes
    if set_bytes is not None:
        return set_bytes
    return memory_bytes() // _SHARE_OF_EDGE if config.fleet.replicas else 0


def memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The machine's memory, or what a container may use of it (`limit`, of cgroups version 2)."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(limit.read_text()))
    except (OSError, ValueError):  # there is none, or it is "max"
        return machine


def raise_open_files(max_connections: int) -> str:
    """Allows this process, and those that it starts, as many open files as it may allow itself.

    Returns:
        What to warn of; empty where there is room for `max_connections`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS: less than the hard limit that it names
            hard = soft
    if hard == resource.RLIM_INFINITY or hard >= max_connections + _OTHER_FILES:
        return ""
    return (
        f"only {hard} files may be open at once (ulimit -n), too few for the {max_connections} connections of "
        f"`server.max_connections`; allow {max_connections + _OTHER_FILES}, or set it lower"
    )


def render(max_connections: int, max_heap_bytes: int) -> dict[str, Any]:
    """The `overload_manager` of Envoy's configuration.

    Args:
        max_connections: Most connections; 0 = no bound.
        max_heap_bytes: Most memory; 0 = no bound.
    """
    connections = {
        "@type": f"{_MONITORS}.downstream_connections.v3.DownstreamConnectionsConfig",
        "max_active_downstream_connections": max_connections or _UNBOUNDED,
    }
    monitors = [
        {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": connections},
    ]
    if not max_heap_bytes:
        return {"resource_monitors": monitors}
    name = "envoy.resource_monitors.fixed_heap"
    heap = {"@type": f"{_MONITORS}.fixed_heap.v3.FixedHeapConfig", "max_heap_size_bytes": max_heap_bytes}
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [*monitors, {"name": name, "typed_config": heap}],
        "actions": [
            {"name": f"envoy.overload_actions.{action}", "triggers": [{"name": name, "threshold": {"value": value}}]}
            for action, value in (("shrink_heap", 0.9), ("stop_accepting_requests", 0.95))
        ],
    }
