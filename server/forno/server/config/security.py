"""Settings of who may call, and what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from forno.server.address import Address
from forno.server.config.base import Settings


class TlsSettings(Settings):
    """Encryption of the public address. Files are read anew when they change."""

    certificate_file: Path | None = None
    """The server's certificate and those between it and its authority, PEM; unset = no encryption."""
    key_file: Path | None = None
    """The certificate's private key, PEM."""
    client_ca_file: Path | None = None
    """Authorities whose client certificates are believed, PEM; unset = clients need none and are asked for none."""
    require_client_certificate: bool = False
    """Whether a connection without a client certificate is refused; false = it may show another credential."""
    min_version: Literal["1.2", "1.3"] = "1.2"
    """Oldest version of TLS that is spoken."""

    @model_validator(mode="after")
    def _whole(self) -> TlsSettings:
        if bool(self.certificate_file) != bool(self.key_file):
            raise ValueError("both `certificate_file` and `key_file`, or none of them")
        if self.client_ca_file and not self.certificate_file:
            raise ValueError("`client_ca_file` only beside `certificate_file` and `key_file`")
        if self.require_client_certificate and not self.client_ca_file:
            raise ValueError("`require_client_certificate` only beside `client_ca_file`, which says whose are believed")
        return self


class JwtSettings(Settings):
    """JSON Web Tokens of an identity provider, in `authorization: Bearer`; off unless `jwks_file` is set."""

    jwks_file: Path | None = None
    """The provider's public keys (JWKS, RFC 7517); read anew when it changes."""
    issuer: str = ""
    """Whose tokens they must be: their claim `iss`."""
    audience: str = ""
    """For whom they must have been made: their claim `aud`."""
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...] = ("RS256", "ES256")
    """Which signatures are believed; none that rests on a shared secret."""
    scopes_claim: str = "scope"
    """The claim that holds scopes, as words in a text or as a list; words that are no scopes are left out."""
    scopes_prefix: str = ""
    """What scopes begin with in that claim, such as `forno.`; others are left out."""
    leeway_s: Annotated[int, Field(strict=True, ge=0, le=300)] = 30
    """How far clocks may be apart, in seconds."""

    @model_validator(mode="after")
    def _bound(self) -> JwtSettings:
        if self.jwks_file and not (self.issuer and self.audience):
            raise ValueError("`issuer` and `audience` beside `jwks_file`, or tokens made for others would be believed")
        return self


class RateLimitSettings(Settings):
    """How often one client may call: a credential, or an address where none is asked for."""

    calls_per_s: Annotated[float, Field(strict=True, ge=0, le=1e9)] = 0.0
    """Calls and stream items that a client may send in a second, as a mean over seconds; 0 = no limit."""
    burst: Annotated[int, Field(strict=True, ge=0, le=10**9)] = 0
    """Calls that may come at once; 0 = those of one second."""


class CorsSettings(Settings):
    """Calls from web pages of other origins; off unless `origins` is set."""

    origins: tuple[str, ...] = ()
    """Origins whose pages may call, such as ["https://app.example.com"]; "*" = all."""
    headers: tuple[str, ...] = ("authorization", "content-type", "x-api-key")
    """Request headers that they may send."""
    max_age_s: Annotated[int, Field(strict=True, ge=0, le=86_400)] = 600
    """How long a browser may remember the permission, in seconds."""


class SecuritySettings(Settings):
    """Who may call and what. Off by default; as soon as one kind of credential is set, callers must show one."""

    keys_file: Path | None = None
    """API keys, made by `forno keys add`; read anew when it changes."""
    certificates: dict[str, tuple[str, ...]] = {}
    """Name in a client's certificate (URI, DNS or common name; `*` = any other) -> scopes. With
    `tls.client_ca_file`."""
    anonymous: tuple[str, ...] | None = None
    """Scopes of callers without a credential; unset = [health] where a kind of credential is set, else everything, but
    `admin` only where `server.address` is a loopback address."""
    admin_address: str = ""
    """HOST:PORT for metrics, reflection and administration, which are then served only there; empty = on
    `server.address`. Health and everything else is served there too. Never encrypted: keep it on an inner network."""
    admin_anonymous: tuple[str, ...] | None = None
    """Scopes of callers without a credential at `admin_address`; unset = everything on a loopback address, else
    [health, metrics]."""
    tls: TlsSettings = TlsSettings()
    """Encryption and client certificates."""
    jwt: JwtSettings = JwtSettings()
    """Tokens of an identity provider."""
    rate_limit: RateLimitSettings = RateLimitSettings()
    """How often one client may call."""
    cors: CorsSettings = CorsSettings()
    """Calls from web pages."""

    @field_validator("admin_address")
    @classmethod
    def _listenable(cls, address: str) -> str:
        if address:
            Address.parse(address)
        return address

    @model_validator(mode="after")
    def _certificates_can_come(self) -> SecuritySettings:
        if self.certificates and not self.tls.client_ca_file:
            raise ValueError("`certificates` only beside `tls.client_ca_file`, which says whose are believed")
        return self
