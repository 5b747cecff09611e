"""JSON Web Tokens: who signed one, for whom, until when, and what it may."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import jwt

from forno.server.errors import ConfigError, Unauthenticated
from forno.server.security.scopes import Scopes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forno.server.config import JwtSettings

log = logging.getLogger("forno.security")

MAX_TOKEN_BYTES = 16 * 1024
_MIN_RSA_BITS = 2048  # RFC 7518, 3.3


class Claims(NamedTuple):
    """What a token says, once it is believed."""

    subject: str
    scopes: Scopes
    expires_at_s: float  # seconds since 1970


def read(path: Path) -> list[jwt.PyJWK]:
    """The public keys of a JWKS file (RFC 7517) that sign. Of keys of other kinds the log tells, and they are left out.

    Raises:
        ConfigError: It cannot be read, holds a shared secret, or none of its keys is of use.
    """
    try:
        document = json.loads(path.read_bytes())
        given = [(key.get("kid", f"number {number}"), key) for number, key in enumerate(document["keys"], 1)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{path}: is no JWKS, such as {{"keys": [...]}}: {error}') from error
    if any(key.get("kty") == "oct" for _, key in given):
        # Who could check a token with a shared secret could make one too.
        raise ConfigError(f"{path}: holds a shared secret; expected public keys alone (RSA, EC or OKP)")
    found = []
    for name, key in given:
        if key.get("use", "sig") != "sig":
            continue
        try:
            found.append(_public_key(key))
        except (ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
            log.warning("%s: key %s is left out: %s", path, name, error)
    if not found:
        raise ConfigError(
            f"{path}: holds no public key for signatures (RSA of {_MIN_RSA_BITS} bits or more, EC or OKP)"
        )
    return found


def _public_key(given: dict[str, Any]) -> jwt.PyJWK:
    key = jwt.PyJWK.from_dict(given)
    if getattr(key.key, "key_size", _MIN_RSA_BITS) < _MIN_RSA_BITS and given["kty"] == "RSA":
        raise ValueError(f"it has {key.key.key_size} bits; expected {_MIN_RSA_BITS} or more")
    return key


def verify(token: str, keys: Sequence[jwt.PyJWK], settings: JwtSettings) -> Claims:
    """What a token says.

    Args:
        token: As it was sent.
        keys: Whose signature is believed.
        settings: Who must have made it, for whom, with which algorithms.

    Raises:
        Unauthenticated: It is not to be believed. Says why only where the signature is good.
    """
    refused = Unauthenticated("the credential is not valid")
    if len(token) > MAX_TOKEN_BYTES:
        raise refused
    try:
        header = jwt.get_unverified_header(token)
        key = _key_of(header, keys)
        # The algorithm is the key's own and one of ours, whatever the token asks for (RFC 8725, 3.1). What it calls
        # critical would have to be understood (RFC 7515, 4.1.11), and there is nothing such that we do.
        if (
            key is None
            or "crit" in header
            or header.get("alg") != key.algorithm_name
            or key.algorithm_name not in settings.algorithms
        ):
            raise refused
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=settings.issuer,
            audience=settings.audience,
            leeway=settings.leeway_s,
            options={"require": ["exp", "iss", "aud"]},
        )
        return Claims(
            str(claims.get("sub", ""))[:200], _scopes(claims, settings), float(claims["exp"]) + settings.leeway_s
        )
    except jwt.ExpiredSignatureError:
        raise Unauthenticated("the token has expired") from None
    except jwt.ImmatureSignatureError:
        raise Unauthenticated("the token is not valid yet") from None
    except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
        raise Unauthenticated("the token was made by, or for, someone else") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise refused from None


def _key_of(header: dict[str, Any], keys: Sequence[jwt.PyJWK]) -> jwt.PyJWK | None:
    key_id = header.get("kid")
    if key_id is None:
        return keys[0] if len(keys) == 1 else None
    return next((key for key in keys if key.key_id == key_id), None)


def _scopes(claims: dict[str, Any], settings: JwtSettings) -> Scopes:
    """The scopes among a claim's words; others are for other services, and are left out."""
    claim = claims.get(settings.scopes_claim, "")
    words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    found: list[str] = []
    for word in words:
        if isinstance(word, str) and word.startswith(settings.scopes_prefix):
            try:
                found += Scopes([word.removeprefix(settings.scopes_prefix)]).texts
            except ValueError:
                continue
    return Scopes(found)
