"""What a server may take at most: connections, memory, open files."""

from __future__ import annotations

import logging
import os
import re
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.security.methods import LOOKUP, NEEDS
from forno.server.transport.envoy.ends import TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from forno.server.config import Config

log = logging.getLogger("forno")

STATISTICS = "overload."
"""What Envoy's statistics about its ceilings begin with."""
_DESCRIBING = ("/forno.v1.Predictor/GetModel", "/forno.v1.Predictor/ListModels")
_WORK = [path for path, need in NEEDS.items() if need == LOOKUP and path not in _DESCRIBING]
_REFUSED = "forno.refused_percent"  # of work; a value in Envoy's runtime, which `HeapWatch` changes
_FULL_PERCENT = 95
_LOOK_S = 0.25  # how often Envoy measures its memory, and we ask
_HEAP = "envoy.resource_monitors.fixed_heap"
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
    heap = {"@type": f"{_MONITORS}.fixed_heap.v3.FixedHeapConfig", "max_heap_size_bytes": max_heap_bytes}
    return {
        "refresh_interval": f"{_LOOK_S}s",
        "resource_monitors": [*monitors, {"name": _HEAP, "typed_config": heap}],
        # Not Envoy's own `stop_accepting_requests`, which refuses health checks too: whoever looks after a full server
        # would take it for a dead one.
        "actions": [
            {"name": "envoy.overload_actions.shrink_heap", "triggers": [{"name": _HEAP, "threshold": {"value": 0.9}}]}
        ],
    }


def refuser() -> dict[str, Any]:
    """The HTTP filter that refuses work, and nothing else, when `HeapWatch` says so: before a body is taken in."""
    work = "|".join(["/v1/.*", *map(re.escape, _WORK)])
    return {
        "name": "refuser",
        "typed_config": {
            "@type": f"{TYPES}.extensions.filters.http.fault.v3.HTTPFault",
            "abort": {"http_status": 503, "percentage": {"numerator": 0}},
            "abort_percent_runtime": _REFUSED,
            "headers": [
                {"name": ":method", "string_match": {"exact": "POST"}},
                {"name": ":path", "string_match": {"safe_regex": {"regex": f"({work})"}}},
            ],
            "disable_downstream_cluster_stats": True,
        },
    }


class HeapWatch:
    """Has an Envoy refuse work while its memory is near the ceiling. On a thread of its own; ends with `close`.

    Args:
        ask: Asks Envoy's administration: method and path.
        max_heap_bytes: The ceiling, for the log.
    """

    def __init__(self, ask: Callable[[str, str], str], max_heap_bytes: int) -> None:
        self._ask = ask
        self._max_heap_bytes = max_heap_bytes
        self._full = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Begins to look."""
        threading.Thread(target=self._run, name="heap-watch", daemon=True).start()

    def close(self) -> None:
        """Ends that."""
        self._ended.set()

    def look(self) -> None:
        """Looks once."""
        _, _, percent = self._ask("GET", f"/stats?filter=^{STATISTICS}{_HEAP}.pressure$").partition(":")
        if not percent.strip().isdigit():
            return  # it has just ended, or has only begun
        full, before = int(percent) >= _FULL_PERCENT, self._full
        if full or before:  # told again and again while it is full: an Envoy that was started anew knows nothing
            self._ask("POST", f"/runtime_modify?{_REFUSED}={100 * full}")
            self._full = full
        if full and not before:
            log.warning("Envoy's memory is at %s %% of %d bytes; refusing work", percent.strip(), self._max_heap_bytes)
        elif before and not full:
            log.warning("Envoy's memory is below its ceiling again; refusing no more")

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.look()
