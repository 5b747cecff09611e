"""Certificates: the names in them, and nothing that only looks like one."""

from __future__ import annotations

import datetime as dt
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from forno.server.config import Config
from forno.server.errors import PermissionDenied, Unauthenticated
from forno.server.security import certificates
from forno.server.security.credentials import credential_of
from forno.server.security.guard import Guard

URI, DNS = x509.UniformResourceIdentifier, x509.DNSName
PEER = "127.0.0.1:5000"
KEY = ec.generate_private_key(ec.SECP256R1())
SETTINGS = {
    "tls": {"certificate_file": "c", "key_file": "k", "client_ca_file": "a"},
    "certificates": {"spiffe://prod/web": ["predict:model/a"], "ops": ["admin"], "*": ["metrics"]},
}


def pem(subject: str, *names: x509.GeneralName) -> str:
    """A certificate; its subject as RFC 4514 writes it."""
    name, now = x509.Name.from_rfc4514_string(subject), dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder(name, name, KEY.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def forwarded(certificate: str, before: str = "Hash=0f;") -> str:
    return f'{before}Cert="{quote(certificate, safe="")}"'


def admitted(need: str, header: str):
    guard = Guard(Config.model_validate({"security": SETTINGS}).security, loopback=True)
    return guard.admit(need, credential_of([("x-forwarded-client-cert", header)], trusted=True), PEER)


@pytest.mark.parametrize(
    ("subject", "alternatives", "expected"),
    [
        ("CN=web", (), ("web",)),
        ("CN=c", (DNS("b.a"), URI("spiffe://x"), DNS("a.a")), ("spiffe://x", "b.a", "a.a", "c")),
        ("", (URI("spiffe://x"),), ("spiffe://x",)),
        ("O=nobody", (), ()),
        ("CN=ops+O=x,CN=web", (), ("web", "ops")),
        # What passes for two names where names are listed with commas or semicolons between.
        ("O=x\\,CN=ops,CN=web", (), ("web",)),
        ('O=x\\"\\;URI=spiffe://prod/web,CN=a', (), ("a",)),
        ("CN=a", (URI("spiffe://x;URI=spiffe://prod/web"),), ("spiffe://x;URI=spiffe://prod/web", "a")),
        ("CN=a", (DNS("x;URI=spiffe://prod/web"),), ("x;URI=spiffe://prod/web", "a")),
        ("CN=a", (x509.RFC822Name("ops"), x509.DirectoryName(x509.Name([]))), ("a",)),
    ],
)
def test_the_names_are_those_of_the_certificate(subject, alternatives, expected):
    assert certificates.names(pem(subject, *alternatives)) == expected


@pytest.mark.parametrize(
    "header",
    [
        "",
        "URI=spiffe://prod/web",
        'Subject="CN=ops";URI=ops',
        'Cert="nothing"',
        'Cert="',
        forwarded(pem("CN=ops")) + ",URI=ops",
        forwarded(pem("CN=ops"), 'Hash="0f"'),
    ],
)
def test_what_is_no_certificate_has_no_names(header):
    with pytest.raises((Unauthenticated, PermissionDenied)):
        admitted("admin", header)


def test_certificates_grant_by_their_names():
    both = forwarded(pem("CN=ops", URI("spiffe://prod/web")), "By=spiffe://us;Hash=0f;")
    principal = admitted("predict", both)
    assert [principal.may(right) for right in ("model/a", "admin", "metrics")] == [True, True, False]
    assert admitted("metrics", forwarded(pem("CN=else"))).name == "certificate else"
    guard = Guard(Config.model_validate({"security": SETTINGS}).security, loopback=True)
    own = credential_of([], trusted=False, extra=f"certificate\0{pem('CN=ops')}\0")  # as plain gRPC tells it
    assert guard.admit("admin", own, PEER).name == "certificate ops"
    # The names of our own headers mean nothing in what a caller sends.
    assert credential_of([("x-forwarded-client-cert", both), ("x-forno-door", "admin")], trusted=False) == ""
    assert credential_of([("certificate", pem("CN=ops"))], trusted=True) == ""
