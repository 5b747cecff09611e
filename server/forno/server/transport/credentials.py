"""TLS for the plain gRPC server: certificates that change while it serves."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import grpc

from forno.server.errors import ConfigError
from forno.server.security import tls

if TYPE_CHECKING:
    from forno.server.config import TlsSettings


def of_settings(settings: TlsSettings) -> grpc.ServerCredentials:
    """Credentials that look at their files once a second, when a client connects.

    Raises:
        ConfigError: The files cannot be used, or gRPC's server cannot do what is asked for.
    """
    if settings.client_ca_file and not settings.require_client_certificate:
        raise ConfigError(
            "security.tls.require_client_certificate is false beside client_ca_file; with transport grpc it must be "
            "true, because gRPC's own server asks every client for a certificate or none"
        )
    if settings.min_version != "1.2":
        raise ConfigError(f"security.tls.min_version is {settings.min_version}; with transport grpc it must be 1.2")
    watched = tls.watch(settings)
    lock = threading.Lock()
    look_at_s = 0.0

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """What handshakes use from now on; None = what they use now. Called by gRPC's threads before each of them."""
        nonlocal look_at_s
        with lock:
            now_s = time.monotonic()
            if now_s < look_at_s:
                return None
            look_at_s = now_s + tls.LOOK_S
            return _configuration(watched.value) if watched.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(watched.value),
        changed,  # type: ignore[arg-type]  # its stubs forget None
        require_client_authentication=settings.require_client_certificate,
    )


def _configuration(material: tls.Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_ca or None
    )
