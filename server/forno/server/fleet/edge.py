"""The edge: one Envoy on the public address, which spreads calls over the replicas and hides their comings and goings.

What is here was found to lose no call when replicas are killed, stopped and replaced; each setting that had to be so
says why. docs/decisions/0008-replicas-behind-an-edge.md has the measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.transport.envoy import ends

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from forno.server.fleet.replica import Replica

CLUSTER = "replicas"
PAGES = "pages"
XDS_FOLDER = "xds"
PAGES_SOCKET = "pages.sock"

IDEMPOTENT = (
    "/forno.v1.Predictor/Predict",
    "/forno.v1.Predictor/Invoke",
    "/forno.v1.Predictor/GetModel",
    "/forno.v1.Predictor/ListModels",
    "/forno.v1.Rest/Predict",
    "/forno.v1.Rest/Invoke",
)
"""Calls that may be made again where it is not known whether a replica had begun with them: they change nothing."""

OWN = (
    "/forno.v1.Rest/Health",
    "/forno.v1.Rest/Ready",
    "/forno.v1.Rest/Metrics",
    "/grpc.health.v1.Health/",
)
"""Calls about the whole, which the supervisor answers; a prefix where it ends with a slash."""

_NEVER_BEGUN = "connect-failure,refused-stream"  # safe for any call: no replica has seen it
_PERHAPS_BEGUN = f"{_NEVER_BEGUN},unavailable,reset"
_PERHAPS_BEGUN_HTTP = f"{_NEVER_BEGUN},retriable-status-codes,reset"
_UNAVAILABLE_HTTP = 503  # what UNAVAILABLE becomes


@dataclass(frozen=True, slots=True)
class EdgeEnd:
    """The end of the edge's filter chain: a router to the replicas."""

    folder: Path
    affinity_header: str
    rest: bool
    """Whether replicas take REST calls as they come, where they need no transcoder: those inside Envoy do."""

    def filter(self, door: ends.Door) -> dict[str, Any]:
        """A router."""
        return ends.router()

    def routes(self) -> list[dict[str, Any]]:
        """Calls about the whole, calls that may be repeated, all others."""
        past = ends.HTTP_ROUTES.values() if self.rest else ()
        return [
            *({"match": _match(path), "route": ends.route(PAGES)} for path in OWN),
            *(ends.http_route(path, self._route(_PERHAPS_BEGUN_HTTP)) for path in past),
            *({"match": _match(path), "route": self._route(_PERHAPS_BEGUN)} for path in IDEMPOTENT),
            {"match": _match("/"), "route": self._route(_NEVER_BEGUN)},
            ends.unknown_path(),
        ]

    def _route(self, retry_on: str) -> dict[str, Any]:
        route = {
            **ends.route(CLUSTER),
            "retry_policy": {
                "retry_on": retry_on,
                "retriable_status_codes": [_UNAVAILABLE_HTTP],
                "num_retries": 4,
                "retry_host_predicate": [
                    {
                        "name": "another",
                        "typed_config": {
                            "@type": f"{ends.TYPES}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                        },
                    }
                ],
                "host_selection_retry_max_attempts": 5,
                "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
            },
        }
        if self.affinity_header:
            route["hash_policy"] = [{"header": {"header_name": self.affinity_header}}]
        return route

    def clusters(self) -> list[dict[str, Any]]:
        """The replicas, which a file names, and the supervisor."""
        return [self._replicas(), ends.socket_cluster(PAGES, self.folder / PAGES_SOCKET)]

    def _replicas(self) -> dict[str, Any]:
        folder = self.folder / XDS_FOLDER
        watched = {"path": str(folder / f"{CLUSTER}.json"), "watched_directory": {"path": str(folder)}}
        balance: dict[str, Any] = {
            "lb_policy": "LEAST_REQUEST",
            "least_request_lb_config": {"choice_count": 5},  # a stopped one, whose calls pile up, gets few
        }
        common: dict[str, Any] = {
            "healthy_panic_threshold": {"value": 0},  # never to one known to be bad
            "update_merge_window": "0s",  # by default workers hear of a change up to a second later than we are told
        }
        if self.affinity_header:
            balance = {"lb_policy": "RING_HASH"}
        return {
            "name": CLUSTER,
            "type": "EDS",
            "eds_cluster_config": {
                "service_name": CLUSTER,
                "eds_config": {"resource_api_version": "V3", "path_config_source": watched},
            },
            "connect_timeout": "1s",
            **balance,
            "common_lb_config": common,
            "ignore_health_on_host_removal": True,
            # No bound but the replicas' own queues, which refuse with RESOURCE_EXHAUSTED and when to come again. All
            # calls of a replica that dies are made again, and those of several.
            "circuit_breakers": {
                "thresholds": [
                    {
                        "max_connections": 10_000,
                        "max_pending_requests": 1_000_000,
                        "max_requests": 1_000_000,
                        "retry_budget": {"budget_percent": {"value": 100.0}, "min_retry_concurrency": 1000},
                    }
                ]
            },
            "health_checks": [
                {
                    "timeout": "1s",
                    "interval": "0.5s",
                    "no_traffic_interval": "0.5s",
                    "unhealthy_interval": "0.25s",
                    "unhealthy_threshold": 2,
                    "healthy_threshold": 1,
                    "grpc_health_check": {},
                }
            ],
            # Only what shows that nobody is there. An answer, whatever its status, is no reason: a replica that
            # refuses because it is busy is not ill.
            "outlier_detection": {
                "split_external_local_origin_errors": True,
                "consecutive_local_origin_failure": 2,
                "enforcing_consecutive_local_origin_failure": 100,
                "enforcing_local_origin_success_rate": 0,
                "enforcing_consecutive_gateway_failure": 0,
                "enforcing_consecutive_5xx": 0,
                "enforcing_success_rate": 0,
                "interval": "0.5s",
                "base_ejection_time": "1s",
                "max_ejection_time": "2s",
                "max_ejection_percent": 50,
            },
            # A stopped process answers no ping: its connection is closed, and the calls on it are made again.
            "typed_extension_protocol_options": ends.http2_upstream(
                connection_keepalive={"interval": "0.5s", "timeout": "1s", "interval_jitter": {"value": 0}}
            ),
        }


def _match(path: str) -> dict[str, Any]:
    kind = "prefix" if path.endswith("/") else "path"
    return {kind: path, "headers": [ends.is_grpc()]}


def publish(folder: Path, version: int, replicas: Iterable[tuple[Replica, bool]]) -> None:
    """Tells the edge which replicas there are. It sees the new file at once, and never a part of one.

    Args:
        folder: The fleet's.
        version: Greater than all before.
        replicas: Each with whether it takes new calls; one that does not keeps those it has.
    """
    endpoints = [
        {
            "endpoint": {"address": {"pipe": {"path": str(replica.socket)}}},
            # What the ring of sessions goes by: a successor gets the calls of the one before it.
            "metadata": {"filter_metadata": {"envoy.lb": {"hash_key": f"replica-{replica.index}"}}},
            "health_status": "UNKNOWN" if takes else "DRAINING",
        }
        for replica, takes in replicas
    ]
    document = {
        "version_info": str(version),
        "resources": [
            {
                "@type": f"{ends.TYPES}.config.endpoint.v3.ClusterLoadAssignment",
                "cluster_name": CLUSTER,
                "endpoints": [{"lb_endpoints": endpoints}],
            }
        ],
    }
    written = folder / f"{CLUSTER}.new"
    written.write_text(json.dumps(document))
    written.rename(folder / XDS_FOLDER / f"{CLUSTER}.json")


@dataclass(frozen=True, slots=True)
class HostView:
    """A replica as the edge sees it."""

    takes_calls: bool
    active: int  # calls in flight
    total: int  # calls so far, health checks not counted


def views(clusters: str) -> dict[str, HostView]:
    """The replicas as the edge sees them, by socket; from the answer of its administration to /clusters?format=json."""
    found = {}
    for cluster in json.loads(clusters or "{}").get("cluster_statuses", ()):
        if cluster["name"] != CLUSTER:
            continue
        for host in cluster.get("host_statuses", ()):
            health = dict(host["health_status"])
            eds = health.pop("eds_health_status", "UNKNOWN")
            numbers = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
            found[host["address"]["pipe"]["path"]] = HostView(
                not any(health.values()) and eds in {"UNKNOWN", "HEALTHY"},
                numbers.get("rq_active", 0),
                numbers.get("rq_total", 0),
            )
    return found
