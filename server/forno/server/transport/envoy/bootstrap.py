"""Envoy's configuration: one filter chain, whatever its end.

    client -> listener -> HTTP connection manager -> REST transcoder -> end

The ends are in `ends.py`: the native module with the servicers inside, a router to a plain gRPC server, or the edge
before several replicas. Everything before them is the same, so that a caller cannot tell which one answers. `validate`
has Envoy itself check what is rendered.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.address import Address
from forno.server.errors import ConfigError
from forno.server.transport.envoy import ceilings, doors, replies
from forno.server.transport.envoy.ends import MAX_STREAM_S, TYPES, bounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forno.server.config import SecuritySettings
    from forno.server.transport.envoy.ends import Door, End

DESCRIPTORS = Path(__file__).parent / "forno.pb"
"""Descriptor set of the services below, with imports; made by `make proto`."""
REST_SERVICES = ("forno.v1.Predictor", "forno.v1.Rest")
STAT_PREFIX = "forno"
_STATISTICS = (f"http.{STAT_PREFIX}.", ceilings.STATISTICS)

STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES = 8 * 1024 * 1024, 32 * 1024 * 1024
"""What a client may send of one request, and of all on its connection, before it hears that it was read. A tensor of
some megabytes then comes without a pause: with 1 MiB, its sender waited for Envoy several times while others' requests
were read. Unary requests are taken in as they come, up to the message limit whatever the windows are. Of a stream that
is not read, this is what a client can leave in Envoy beyond the host's own limit."""
CONNECTION_BUFFER_BYTES = 1024 * 1024
"""What Envoy reads from a connection before it looks at it, and what answers may fill before streams are told to wait.
With 4 MiB, four senders of 4 MiB get a tenth more done, and small calls beside them wait twice as long."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where Envoy listens and what it allows."""

    address: Address
    admin_socket: Path
    max_message_bytes: int
    socket_mode: int = 0o600  # permissions, where the address is a Unix socket
    inner: bool = False
    """Whether only an edge of ours calls it: that has checked and transcoded each call, and is believed."""
    max_connections: int = 16_384  # not of an inner one
    max_heap_bytes: int = 0  # 0 = no ceiling
    max_call_s: float = MAX_STREAM_S  # not of lasting calls
    security: SecuritySettings | None = None  # what its doors ask; not of an inner one
    secrets: Path | None = None  # where `doors.Secrets` writes; None = no encryption

    @property
    def admin_address(self) -> Address | None:
        """Where the administration is served; None where that is not apart."""
        text = self.security.admin_address if self.security and not self.inner else ""
        return Address.parse(text) if text else None


def render(listener: Listener, end: End) -> dict[str, Any]:
    """The bootstrap document."""
    listeners = [_listener(listener, end, "inner" if listener.inner else "public")]
    if listener.admin_address:
        listeners.append(_listener(listener, end, "admin"))
    return {
        "node": doors.NODE,
        "admin": {"address": {"pipe": {"path": str(listener.admin_socket), "mode": 0o600}}},
        "static_resources": {"listeners": listeners, "clusters": end.clusters()},
        # Only what the supervisor reads: thousands of unused statistics cost memory and start-up time.
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [{"prefix": one} for one in _STATISTICS]}}},
        "layered_runtime": {"layers": [{"name": "admin", "admin_layer": {}}]},
        "overload_manager": ceilings.render(0 if listener.inner else listener.max_connections, listener.max_heap_bytes),
    }


def _listener(listener: Listener, end: End, door: Door) -> dict[str, Any]:
    admin = door == "admin"
    return {
        "name": door,
        "ignore_global_conn_limit": admin,  # who looks after a full server gets in
        "address": _address(listener, listener.admin_address if admin else None),
        "enable_reuse_port": False,  # two servers on one port would silently share its connections
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER_BYTES,
        "filter_chains": [_filter_chain(listener, end, door)],
    }


def _address(listener: Listener, other: Address | None) -> dict[str, Any]:
    address = other or listener.address
    if address.path:
        return {"pipe": {"path": address.path, "mode": listener.socket_mode}}
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _filter_chain(listener: Listener, end: End, door: Door) -> dict[str, Any]:
    manager = _connection_manager(listener, end, door)
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    if listener.security and listener.secrets and door != "admin":
        chain["transport_socket_connect_timeout"] = "30s"  # as long as headers may take
        chain["transport_socket"] = doors.transport_socket(listener.security.tls, listener.secrets)
    return chain


def _connection_manager(listener: Listener, end: End, door: Door) -> dict[str, Any]:
    security, admin = listener.security, door == "admin"
    mutual = bool(security and security.tls.client_ca_file and listener.secrets and not admin)
    cors = security.cors if security and security.cors.origins and not admin else None
    host: dict[str, Any] = {
        "name": "all",
        "domains": ["*"],
        "request_body_buffer_limit": listener.max_message_bytes,
        "routes": bounded(end.routes(), listener.max_call_s),
    }
    if cors:
        if end.clusters():
            host["routes"].insert(-1, doors.cors_route())
        host["typed_per_filter_config"] = doors.cors_policy(cors)
    if end.clusters() and door != "inner":
        host["request_headers_to_add"] = doors.peer()
    # Of calls whose route is not known before their body is whole, and of answers that nobody takes. Not before the
    # module: see its routes.
    longest = {"common_http_protocol_options": {"max_stream_duration": f"{listener.max_call_s:.3f}s"}}
    return {
        **doors.believed(door, mutual=mutual, forwarded=bool(end.clusters())),
        **(longest if end.clusters() else {}),
        "@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "codec_type": "AUTO",
        "server_name": "forno",
        "generate_request_id": False,  # nobody asks for it, and what a caller sends comes as it is
        # No path is normalised: what a proxy before this one refuses is not reached by dots or more slashes.
        "stream_idle_timeout": f"{listener.max_call_s:.3f}s",
        "request_headers_timeout": "30s",
        "http2_protocol_options": {
            "max_concurrent_streams": 10_000,
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
            # Streams of small messages to a client that falls behind; what waits is bounded in bytes, see above.
            "max_outbound_frames": 10_000_000,
        },
        "local_reply_config": replies.render(),
        "route_config": {
            "validate_clusters": bool(end.clusters()),  # before the module there is a route, but no cluster
            "virtual_hosts": [host],
        },
        "http_filters": [
            *([doors.cors_filter()] if cors else []),  # first: its questions carry no credential
            *([ceilings.refuser()] if listener.max_heap_bytes and not admin else []),
            *([] if door == "inner" else [_transcoder(listener)]),
            end.filter(door),
        ],
    }


def _transcoder(listener: Listener) -> dict[str, Any]:
    return {
        "name": "rest",
        "typed_config": {
            "@type": f"{TYPES}.extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
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
