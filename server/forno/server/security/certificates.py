"""Client certificates: the names that one carries, such as "spiffe://prod/web", "web.example.com" and "web".

The certificate itself is read, not what others write of it: the lists of names that Envoy can put into a header are
separated by signs that names may hold, so that a name could pass for two.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from cryptography import x509

_FORWARDED = re.compile(r'(?:.*;)?Cert="([^"]*)"')


def of_forwarded(header: str) -> str:
    """The certificate in an `x-forwarded-client-cert`, PEM; empty where there is none.

    Args:
        header: As Envoy writes it (HTTP connection manager, `SANITIZE_SET` with `cert` alone): our own names, a hash
            and, last, the certificate, percent-encoded.
    """
    found = _FORWARDED.fullmatch(header)
    return unquote(found[1]) if found else ""


def names(pem: str) -> tuple[str, ...]:
    """The names in a certificate: its URIs, its DNS names, its subject's common names; none where it is none.

    Args:
        pem: What a handshake has shown, its signature checked there.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        common = [str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        return (*_alternatives(certificate), *common)
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ()


def _alternatives(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    kinds = (x509.UniformResourceIdentifier, x509.DNSName)
    return [name for kind in kinds for name in found.get_values_for_type(kind)]
