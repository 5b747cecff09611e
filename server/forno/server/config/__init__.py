"""Every setting of the server, typed, with its unit in its name. Read at the start and at each reload, kept as read."""

from __future__ import annotations

from forno.server.config.base import Settings
from forno.server.config.models import (
    BatchingSettings,
    CacheSettings,
    CudaSettings,
    EndpointSettings,
    ModelSettings,
    NullSettings,
    OnnxSettings,
    PaddingSettings,
    PostprocessSettings,
    PreprocessSettings,
    TensorrtSettings,
    TensorrtShapes,
)
from forno.server.config.process import FleetSettings, ServerSettings, TelemetrySettings
from forno.server.config.security import CorsSettings, JwtSettings, RateLimitSettings, SecuritySettings, TlsSettings

__all__ = [
    "BatchingSettings",
    "CacheSettings",
    "Config",
    "CorsSettings",
    "CudaSettings",
    "EndpointSettings",
    "FleetSettings",
    "JwtSettings",
    "ModelSettings",
    "NullSettings",
    "OnnxSettings",
    "PaddingSettings",
    "PostprocessSettings",
    "PreprocessSettings",
    "RateLimitSettings",
    "SecuritySettings",
    "ServerSettings",
    "Settings",
    "TelemetrySettings",
    "TensorrtSettings",
    "TensorrtShapes",
    "TlsSettings",
]


class Config(Settings):
    """All of it: what forno.yaml holds."""

    server: ServerSettings = ServerSettings()
    """The process."""
    models: dict[str, ModelSettings] = {}
    """Models by name."""
    endpoints: dict[str, EndpointSettings] = {}
    """Named endpoints by path, such as `spam/detect`."""
    fleet: FleetSettings = FleetSettings()
    """Replicas."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Traces and exported metrics."""
    security: SecuritySettings = SecuritySettings()
    """Who may call, and what."""
