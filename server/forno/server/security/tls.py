"""What the server shows and believes in a TLS handshake, read from files that may change at any time."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError
from forno.server.security.watched import Watched

if TYPE_CHECKING:
    from pathlib import Path

    from forno.server.config import TlsSettings

LOOK_S = 1.0
"""How often the files are looked at for changes, in seconds."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the files hold; all of it PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes = b""  # empty: clients are not asked for certificates


def watch(settings: TlsSettings) -> Watched[Material]:
    """The files' material, and where to look for its changes.

    Raises:
        ConfigError: A file cannot be read, or they do not go together.
    """
    named = (settings.certificate_file, settings.key_file, settings.client_ca_file)
    paths = tuple([path for path in named if path is not None])
    return Watched(paths, lambda: read(*paths), "the TLS certificate")


def read(certificate_file: Path, key_file: Path, client_ca_file: Path | None = None) -> Material:
    """Reads the files and makes sure that a handshake can be made with them.

    A pair is replaced by two renames, and is wrong in between: refused here, it is looked at again when the second has
    happened.

    Raises:
        ConfigError: A file cannot be read, or they do not go together.
    """
    material = _bytes(certificate_file, key_file, client_ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate_file, key_file, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"{certificate_file} and {key_file} are not a certificate and its key, both PEM and the key without a "
            f"password ({reason})"
        ) from error
    if client_ca_file is not None:
        try:
            context.load_verify_locations(client_ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{client_ca_file} holds no certificate in PEM") from error
    if material != _bytes(certificate_file, key_file, client_ca_file):
        raise ConfigError(f"{certificate_file} is being written")
    return material


def _bytes(certificate_file: Path, key_file: Path, client_ca_file: Path | None) -> Material:
    found = []
    for path in (certificate_file, key_file, client_ca_file):
        try:
            found.append(path.read_bytes() if path is not None else b"")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return Material(*found)


def _no_password() -> str:
    """In place of a prompt, at which a server would hang."""
    return ""
