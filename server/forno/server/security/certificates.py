"""Client certificates: the names that one carries, however a transport tells of it.

Envoy's `x-forwarded-client-cert` and grpc's authentication context both come down to names such as
"spiffe://prod/web" (URI), "web.example.com" (DNS) and "web" (the subject's common name).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PAIR = re.compile(r'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^;,"]*)(?:;|\Z)')
_NAME = re.compile(r"[A-Za-z0-9._:/@*+-]{1,512}")
_COMMON_NAME = re.compile(r"(?:^|,)CN=([^,+\\]+)")


def of_forwarded(header: str) -> tuple[str, ...]:
    """The names in an `x-forwarded-client-cert` of one certificate; none where it is of another form.

    Args:
        header: As Envoy writes it (HTTP connection manager, `SANITIZE_SET`): key=value, quoted where needed, with ";"
            between. A "," outside quotes would begin a second certificate, which Envoy does not write here.
    """
    at, found = 0, []
    while at < len(header):
        pair = _PAIR.match(header, at)
        if pair is None:
            return ()
        at = pair.end()
        key, value = pair[1].lower(), pair[2]
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        if key in {"uri", "dns"}:
            found.append(value)
        elif key == "subject" and (common := _COMMON_NAME.search(value)):
            found.append(common[1])
    return _plain(found)


def of_context(context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """The names in grpc's authentication context of a call; none where there is no certificate."""
    keys = ("x509_subject_alternative_name", "x509_common_name")
    return _plain(name.decode(errors="replace") for key in keys for name in context.get(key, ()))


def _plain(names: Iterable[str]) -> tuple[str, ...]:
    """Names without the odd ones: nobody needs spaces or separators in a name that grants something."""
    return tuple(dict.fromkeys(name for name in names if _NAME.fullmatch(name)))
