"""Envoy's configuration: one filter chain, three ends.

    client -> listener -> HTTP connection manager -> REST transcoder -> end

The end is the native module with the servicers inside (`ModuleEnd`) or a router to a plain gRPC server (`RouterEnd`).
Everything before it is the same, so that a caller cannot tell which one answers. `validate` has Envoy itself check what
is rendered.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
DESCRIPTORS = HERE / "forno.pb"
"""Descriptor set of the services below, with imports; made by `make proto`."""
MODULE = HERE / "_native.so"
REST_SERVICES = ("forno.v1.Predictor", "forno.v1.Rest")
STAT_PREFIX = "forno"

_TYPES = "type.googleapis.com/envoy"
_MAX_STREAM_S = 3600

# What a REST caller gets where Envoy itself answers: HTTP status -> the gRPC code that stands for it in the body.
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 8, 415: 3, 429: 8, 431: 8, 503: 14, 504: 4}


@dataclass(frozen=True, slots=True)
class ModuleEnd:
    """Calls are carried by the native module into the interpreter of the same process."""

    function: str  # "package.module:function", called on a thread of its own
    argument: str  # what it gets


@dataclass(frozen=True, slots=True)
class RouterEnd:
    """Calls go on to a gRPC server."""

    socket: Path  # the Unix socket it listens on


@dataclass(frozen=True, slots=True)
class Listener:
    """Where Envoy listens and what it allows."""

    host: str
    port: int
    admin_socket: Path
    max_message_bytes: int


def render(listener: Listener, end: ModuleEnd | RouterEnd) -> dict[str, Any]:
    """The bootstrap document."""
    return {
        "admin": {"address": {"pipe": {"path": str(listener.admin_socket), "mode": 0o600}}},
        "static_resources": {
            "listeners": [_listener(listener, end)],
            "clusters": [_cluster(end)] if isinstance(end, RouterEnd) else [],
        },
        # Only what the supervisor reads: thousands of unused statistics cost memory and start-up time.
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [{"prefix": f"http.{STAT_PREFIX}."}]}}},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_TYPES}.extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 100_000,
                    },
                }
            ]
        },
    }


def _listener(listener: Listener, end: ModuleEnd | RouterEnd) -> dict[str, Any]:
    return {
        "name": "public",
        "address": {"socket_address": {"address": listener.host, "port_value": listener.port}},
        "enable_reuse_port": False,  # two servers on one port would silently share its connections
        "per_connection_buffer_limit_bytes": 1024 * 1024,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": _connection_manager(listener, end),
                    }
                ]
            }
        ],
    }


def _connection_manager(listener: Listener, end: ModuleEnd | RouterEnd) -> dict[str, Any]:
    return {
        "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "codec_type": "AUTO",
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "stream_idle_timeout": f"{_MAX_STREAM_S}s",
        "request_headers_timeout": "30s",
        "http2_protocol_options": {
            "max_concurrent_streams": 10_000,
            "initial_stream_window_size": 1024 * 1024,
            "initial_connection_window_size": 16 * 1024 * 1024,
            # Streams of small messages to a client that falls behind; what waits is bounded in bytes, see above.
            "max_outbound_frames": 10_000_000,
        },
        "early_header_mutation_extensions": [
            {
                "name": "strip",  # only the transcoder may say which REST path a call came by
                "typed_config": {
                    "@type": f"{_TYPES}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [{"remove": "x-envoy-original-path"}, {"remove": "x-envoy-original-method"}],
                },
            }
        ],
        "local_reply_config": _local_replies(),
        "route_config": {
            "validate_clusters": isinstance(end, RouterEnd),  # before the module there is a route, but no cluster
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "request_body_buffer_limit": listener.max_message_bytes,
                    "routes": _routes(end),
                }
            ],
        },
        "http_filters": [_transcoder(listener), _end_filter(end)],
    }


def _routes(end: ModuleEnd | RouterEnd) -> list[dict[str, Any]]:
    call: dict[str, Any] = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "servicers",
            "timeout": "0s",
            # Envoy keeps the deadline of each call: no timer per call in Python.
            "max_stream_duration": {"grpc_timeout_header_max": f"{_MAX_STREAM_S}s"},
        },
    }
    if isinstance(end, ModuleEnd):
        return [call]
    # What is no gRPC call by now is no path that the transcoder knows; the module says so itself.
    call["match"]["headers"] = [{"name": "content-type", "string_match": {"prefix": "application/grpc"}}]
    unknown = {"status": 404, "body": {"inline_string": "no such path"}}
    return [call, {"match": {"prefix": "/"}, "direct_response": unknown}]


def _transcoder(listener: Listener) -> dict[str, Any]:
    return {
        "name": "rest",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
            "proto_descriptor": str(DESCRIPTORS),
            "services": list(REST_SERVICES),
            "convert_grpc_status": True,
            # A query parameter of a path variable's name would override the path.
            "ignored_query_parameters": ["model", "endpoint"],
            "print_options": {"always_print_primitive_fields": True, "preserve_proto_field_names": True},
            "request_validation_options": {
                "reject_unknown_query_parameters": True,
                "reject_binding_body_field_collisions": True,
            },
            "max_request_body_size": listener.max_message_bytes,
            "max_response_body_size": listener.max_message_bytes,
        },
    }


def _end_filter(end: ModuleEnd | RouterEnd) -> dict[str, Any]:
    if isinstance(end, RouterEnd):
        return {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": f"{_TYPES}.extensions.filters.http.router.v3.Router"},
        }
    return {
        "name": "forno",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter",
            "dynamic_module_config": {"module": {"local": {"filename": str(MODULE)}}, "do_not_close": True},
            "filter_name": "forno",
            "filter_config": {
                "@type": "type.googleapis.com/google.protobuf.StringValue",
                "value": f"{end.function}\n{end.argument}",
            },
            "terminal_filter": True,
        },
    }


def _cluster(end: RouterEnd) -> dict[str, Any]:
    options = f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions"
    windows = {
        "initial_stream_window_size": 1024 * 1024,
        "initial_connection_window_size": 16 * 1024 * 1024,
        "max_concurrent_streams": 10_000,
    }
    return {
        "name": "servicers",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [{"max_pending_requests": 100_000, "max_requests": 100_000}]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {"http2_protocol_options": windows},
            }
        },
        "load_assignment": {
            "cluster_name": "servicers",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(end.socket)}}}}]}],
        },
    }


def _local_replies() -> dict[str, Any]:
    """Bodies of Envoy's own answers: plain for gRPC, JSON in the form of google.rpc.Status for REST."""
    plain = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}
    grpc_call = {
        "and_filter": {
            "filters": [
                {"header_filter": {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}},
                {
                    "header_filter": {
                        "header": {"name": "x-envoy-original-path", "present_match": True, "invert_match": True}
                    }
                },
            ]
        }
    }

    def status_is(status: int) -> dict[str, Any]:
        value = {"default_value": status, "runtime_key": f"forno.local_reply.{status}"}
        return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}

    mappers: list[dict[str, Any]] = [{"filter": grpc_call, "body_format_override": plain}]
    for status, code in _CODES.items():
        body = {"json_format": {"code": code, "message": "%LOCAL_REPLY_BODY%", "details": []}}
        mapper: dict[str, Any] = {"filter": status_is(status), "body_format_override": body}
        if status == 408:
            mapper["status_code"] = 504
        mappers.append(mapper)
    return {
        "mappers": mappers,
        "body_format": {"json_format": {"code": 13, "message": "%LOCAL_REPLY_BODY%", "details": []}},
    }


def validate(binary: Path, bootstrap: Path, environment: Mapping[str, str]) -> None:
    """Has Envoy check a rendered document.

    Raises:
        ConfigError: Envoy refuses it.
    """
    result = subprocess.run(
        [str(binary), "--mode", "validate", "-c", str(bootstrap), "-l", "error", "--disable-hot-restart"],
        env={**os.environ, **environment, "FORNO_VALIDATE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[-1].split(': {"')[0] if lines else "no reason given"
        raise ConfigError(f"Envoy refuses its configuration: {reason}")
