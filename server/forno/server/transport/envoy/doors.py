"""The outside of Envoy's listeners: encryption, what of a caller's headers is believed, and calls from web pages."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from forno.server.security.headers import ADMIN, DOOR, PEER
from forno.server.transport.envoy.ends import TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from forno.server.config import CorsSettings, TlsSettings
    from forno.server.transport.envoy.ends import Door

NODE = {"id": "forno", "cluster": "forno"}
"""Envoy wants a name for itself where it watches files."""

_SECRET = f"{TYPES}.extensions.transport_sockets.tls.v3.Secret"
_NOWHERE = "x-forno-nowhere"  # a header that no call has
_SERVER, _CLIENTS = "server", "clients"  # names of the secrets, and of the files that hold them


class Secrets:
    """The files by which Envoy gets what a handshake needs, kept as the settings' files are. Any thread.

    Envoy's own way of watching certificates sees only files that are moved, and believes them unread. So the files are
    looked at here, once a second; what makes a working pair goes to Envoy whole, by a file moved into its folder.

    Args:
        settings: Which files; of the settings for TLS.
        folder: A private folder for Envoy's files.

    Raises:
        ConfigError: The files cannot be used.
    """

    def __init__(self, settings: TlsSettings, folder: Path) -> None:
        from forno.server.security import tls  # noqa: PLC0415  (OpenSSL: 2 MiB that a server without needs not)

        self._folder = folder
        self._watched, self._look_s = tls.watch(settings), tls.LOOK_S
        self._ended = threading.Event()
        self._write()

    def start(self) -> None:
        """Begins to look for changes, on a thread of its own."""
        threading.Thread(target=self._look, name="tls-files", daemon=True).start()

    def close(self) -> None:
        """Ends that."""
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(self._look_s):
            if self._watched.refresh():
                self._write()

    def _write(self) -> None:
        material = self._watched.value
        pair = {
            "certificate_chain": {"inline_string": material.certificate.decode()},
            "private_key": {"inline_string": material.key.decode()},
        }
        self._put(_SERVER, {"tls_certificate": pair})
        if material.client_ca:
            self._put(_CLIENTS, {"validation_context": {"trusted_ca": {"inline_string": material.client_ca.decode()}}})

    def _put(self, name: str, secret: dict[str, Any]) -> None:
        new, path = self._folder / f"{name}.new", secret_file(self._folder, name)
        new.touch(mode=0o600)
        new.write_text(json.dumps({"resources": [{"@type": _SECRET, "name": name, **secret}]}))
        new.replace(path)


def secret_file(folder: Path, name: str) -> Path:
    """The file by which Envoy gets a secret."""
    return folder / f"{name}.secret.json"


def transport_socket(settings: TlsSettings, folder: Path) -> dict[str, Any]:
    """The TLS side of a listener.

    Args:
        settings: What is asked of clients.
        folder: Where `Secrets` writes.
    """

    def secret(name: str) -> dict[str, Any]:
        source = {"path_config_source": {"path": str(secret_file(folder, name))}, "resource_api_version": "V3"}
        return {"name": name, "sds_config": source}

    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": f"TLSv1_{settings.min_version[-1]}"},
        "tls_certificate_sds_secret_configs": [secret(_SERVER)],
    }
    if settings.client_ca_file:
        common["validation_context_sds_secret_config"] = secret(_CLIENTS)
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": common,
            "require_client_certificate": settings.require_client_certificate,
        },
    }


def believed(door: Door, *, mutual: bool, forwarded: bool) -> dict[str, Any]:
    """What a connection manager takes from a caller's headers, and what it writes into them.

    Args:
        door: Where the caller comes in.
        mutual: Whether clients may show certificates.
        forwarded: Whether headers go on to another process. The module of this one knows by itself what came in where,
            and looks past the headers by which processes tell each other: taking them out would be a twentieth of what
            Envoy does for a small call.
    """
    if door == "inner":
        return {"use_remote_address": False, "forward_client_cert_details": "ALWAYS_FORWARD_ONLY"}
    manager: dict[str, Any] = {
        "use_remote_address": True,  # headers of Envoy's own that a caller sends are dropped
        "forward_client_cert_details": "SANITIZE_SET" if mutual else "SANITIZE",
    }
    if forwarded:
        # The transcoder alone may say which REST path a call came by, and we alone who calls, and where.
        removed = ("x-envoy-original-path", "x-envoy-original-method", DOOR, PEER, _NOWHERE)
        mutations: list[dict[str, Any]] = [{"remove": name} for name in removed]
        if door == "admin":
            mutations.append({"append": {"header": {"key": DOOR, "value": ADMIN}}})
        mutation = f"{TYPES}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
        manager["early_header_mutation_extensions"] = [
            {"name": "strip", "typed_config": {"@type": mutation, "mutations": mutations}}
        ]
    if mutual:
        # Whole: a name in it may hold what separates names in a list (certificates.py).
        manager["set_current_client_cert_details"] = {"cert": True}
    return manager


def peer() -> list[dict[str, Any]]:
    """What a router adds to each call, so that the server behind it knows the caller's address."""
    header = {"key": PEER, "value": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}
    return [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]


def cors_filter() -> dict[str, Any]:
    """Answers the questions that browsers ask before they let a page call (preflight)."""
    return {
        "name": "envoy.filters.http.cors",
        "typed_config": {"@type": f"{TYPES}.extensions.filters.http.cors.v3.Cors"},
    }


def cors_route() -> dict[str, Any]:
    """Where a page's call of an unknown path goes: nowhere, which Envoy answers with 404.

    To be tried before a route that answers by itself, to which Envoy's CORS filter applies no policy; a call of REST
    is not yet one of gRPC where that filter looks at its route.
    """
    page = [{"name": "origin", "present_match": True}]
    return {
        "match": {"prefix": "/", "headers": page},
        "route": {"cluster_header": _NOWHERE, "cluster_not_found_response_code": "NOT_FOUND"},
    }


def cors_policy(settings: CorsSettings) -> dict[str, Any]:
    """Which pages may call: the virtual host's part of it."""
    origins = [{"safe_regex": {"regex": ".*"}} if origin == "*" else {"exact": origin} for origin in settings.origins]
    return {
        "envoy.filters.http.cors": {
            "@type": f"{TYPES}.extensions.filters.http.cors.v3.CorsPolicy",
            "allow_origin_string_match": origins,
            "allow_methods": "GET, POST, OPTIONS",
            "allow_headers": ", ".join(settings.headers),
            "expose_headers": "retry-after",
            "max_age": str(settings.max_age_s),
        }
    }
