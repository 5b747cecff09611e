"""What of a call says who makes it: one text, by which a guard knows the caller again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.security.headers import CALLERS_KEYS, EDGE_KEYS, PEER
from forno.server.security.rates import address_of

if TYPE_CHECKING:
    from collections.abc import Iterable


def credential_of(metadata: Iterable[tuple[str, str | bytes]], *, trusted: bool, extra: str = "") -> str:
    """The part of a call's metadata that says who calls, in one text that stands for it in the guard's memory.

    Args:
        metadata: The call's.
        trusted: Whether it comes from our own Envoy, which says in it who its caller is.
        extra: Further "key NUL value NUL" from the transport itself.
    """
    wanted = EDGE_KEYS if trusted else CALLERS_KEYS
    found = [
        f"{key}\0{value if isinstance(value, str) else value.decode('latin-1')}\0"
        for key, value in metadata
        if key in wanted
    ]
    return "".join(found) + extra


def pairs_of(credential: str) -> list[tuple[str, str]]:
    """The keys and values in a text that `credential_of` has made."""
    fields = credential.split("\0")
    return [*zip(fields[::2], fields[1::2], strict=False)]


def client_of(credential: str, peer: str) -> str:
    """The address of a call's maker, as limits know it.

    Args:
        credential: As `credential_of` says; the edge may have told it there.
        peer: As the transport tells it.
    """
    told = [value for key, value in pairs_of(credential) if key == PEER]
    return address_of(told[-1] if told else peer)
