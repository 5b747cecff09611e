"""Settings of the process, of its replicas, and of what it tells about itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from forno.server.address import Address
from forno.server.config.base import Bytes, Settings


class ServerSettings(Settings):
    """The process: where it listens and what it allows."""

    address: str = "127.0.0.1:8080"
    """HOST:PORT for gRPC and REST alike, port 0 = any free one; or unix:PATH, a Unix socket."""
    socket_access: Literal["owner", "group", "all"] = "owner"
    """Who may connect where `address` is a Unix socket: its owner, its group too, or everybody."""
    transport: Literal["envoy", "proxy", "grpc"] = "envoy"
    """`envoy`: servicers inside Envoy. `proxy`: plain gRPC behind a separate Envoy. `grpc`: plain gRPC
    without REST."""
    max_message_bytes: Bytes = 64 * 1024 * 1024
    """Largest request or response message."""
    max_connections: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 16_384
    """Most connections at once, of all clients; one more is closed at once. Not with the transport `grpc`."""
    max_heap_bytes: Annotated[int, Field(strict=True, ge=0, le=2**50)] | None = None
    """Most memory of the Envoy on `address`, in bytes: near it, new calls are refused with UNAVAILABLE; 0 = no ceiling.
    Unset = a quarter of the machine's with replicas, whose edge holds calls alone; none where models share the heap."""
    max_call_s: Annotated[float, Field(strict=True, gt=0, le=3600)] = 600.0
    """Longest time from the beginning of a call to its answer, in seconds, however slowly its body comes; then it ends
    with DEADLINE_EXCEEDED. Of a gRPC call with the transport `envoy`, longest time for its body, and again for its
    answer. A stream may last; this is how long one of its messages may take to come. It may be silent for an hour. Not
    with the transport `grpc`."""
    drain_s: Annotated[float, Field(strict=True, ge=0, le=3600)] = 10.0
    """Longest wait for calls in flight at shutdown, in seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What the log shows."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """`auto`: text on a terminal, JSON lines otherwise."""
    envoy_threads: Annotated[int, Field(strict=True, ge=1, le=256)] = 1
    """Envoy worker threads."""

    @property
    def socket_mode(self) -> int:
        """Permissions of a Unix socket that `address` names."""
        return {"owner": 0o600, "group": 0o660, "all": 0o666}[self.socket_access]

    @field_validator("address")
    @classmethod
    def _listenable(cls, address: str) -> str:
        Address.parse(address)
        return address


class FleetSettings(Settings):
    """Replicas: server processes behind one Envoy, the edge, on one machine."""

    replicas: Annotated[int, Field(strict=True, ge=0, le=256)] = 0
    """How many there are at the start; 0 = one server, without an edge. `forno fleet scale` changes it at run time."""
    affinity_header: Annotated[str, Field(pattern=r"^[a-z0-9_-]*$")] = ""
    """Header, in lower case, whose value chooses the replica; empty = the one with the fewest calls in flight."""
    pin_cpus: bool = True
    """Whether each replica gets cores of its own, where there are at least as many cores as replicas."""
    gpus: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of the replicas in turn, such as ["0", "1"]; empty = as it is in the environment."""
    hung_after_s: Annotated[float, Field(strict=True, ge=0, le=3600)] = 10.0
    """Seconds without an answer to a health check after which a replica is killed and started again; 0 = never."""


class TelemetrySettings(Settings):
    """OpenTelemetry; all of it off by default."""

    otlp_endpoint: str = ""
    """Where traces and metrics go, such as http://127.0.0.1:4317 (OTLP over gRPC); empty = nowhere."""
    traces: bool = True
    """Whether spans of sampled calls are sent when `otlp_endpoint` is set."""
    sample_ratio: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    """Share of calls without a `traceparent` of their own that are traced."""
    metrics_interval_s: Annotated[float, Field(strict=True, ge=0, le=3600)] = 0.0
    """Seconds between metric exports by OTLP; 0 = metrics are not exported that way."""
