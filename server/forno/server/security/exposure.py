"""Who can reach the server at all. Kept light: every start asks."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from forno.server.address import Address

if TYPE_CHECKING:
    from forno.server.config import Config


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT or unix:PATH can be reached from its own machine alone."""
    given = Address.parse(address)
    if given.path or given.host == "localhost":
        return True
    try:
        return ip_address(given.host).is_loopback
    except ValueError:  # a name, such as 127.example.com, may stand for anything
        return False


def why_open(config: Config) -> str:
    """A warning where the server can be reached from other machines and asks nobody who they are; empty otherwise."""
    security = config.security
    asks = security.keys_file or security.jwt.jwks_file or security.certificates or security.anonymous is not None
    if asks or security.tls.require_client_certificate or is_loopback(config.server.address):
        return ""
    return (
        f"{config.server.address} answers everyone who can reach it: no API keys, tokens or client certificates are "
        "asked for (docs/security.md)"
    )
