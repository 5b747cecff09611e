"""Tokens: only those of the right issuer, for us, in time and signed by a key that we were given."""

from __future__ import annotations

import base64
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from forno.server.config import Config, JwtSettings
from forno.server.errors import ConfigError, Unauthenticated
from forno.server.security import tokens
from forno.server.security.credentials import credential_of
from forno.server.security.guard import Guard

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
CLAIMS = {"iss": "https://id.example", "aud": "forno", "sub": "ana", "scope": "openid predict:model/spam"}


def jwk(key, key_id: str, algorithm: str) -> dict:
    made = (jwt.algorithms.RSAAlgorithm if algorithm == "RS256" else jwt.algorithms.ECAlgorithm).to_jwk(
        key.public_key(), as_dict=True
    )
    return {**made, "kid": key_id, "alg": algorithm, "use": "sig"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(RSA, "r", "RS256"), jwk(EC, "e", "ES256")]}))
    return path


@pytest.fixture
def settings(file):
    return JwtSettings(jwks_file=file, issuer=CLAIMS["iss"], audience="forno")


def token(key=RSA, algorithm: str = "RS256", key_id: str | None = "r", **changed) -> str:
    claims = {**CLAIMS, "exp": time.time() + 60, **changed}
    return jwt.encode(
        {name: value for name, value in claims.items() if value is not None},
        key,
        algorithm,
        headers={"kid": key_id} if key_id else {},
    )


def unsigned(header: dict) -> str:
    def part(value: dict) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part({**CLAIMS, 'exp': time.time() + 60})}."


def test_what_a_good_token_says(file, settings):
    known = tokens.read(file)
    for good in (token(), token(EC, "ES256", "e"), token(aud=["x", "forno"]), token(nbf=time.time())):
        claims = tokens.verify(good, known, settings)
        assert claims.subject == "ana"
        assert claims.scopes.texts == ("predict:model/spam",)
    listed = tokens.verify(token(scope=["predict", 3, "x"]), known, settings)
    assert listed.scopes.texts == ("predict",)
    prefixed = settings.model_copy(update={"scopes_prefix": "forno.", "scopes_claim": "roles"})
    claims = tokens.verify(token(roles="admin forno.metrics", scope=None), known, prefixed)
    assert claims.scopes.texts == ("metrics",)


PUBLIC = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
_HS256 = jwt.api_jws.PyJWS(algorithms=["HS256"])
WRONG = {
    "no token": "",
    "noise": "a.b.c",
    "another key": token(OTHER),
    "an unknown key id": token(key_id="z"),
    "no key id, of two keys": token(key_id=None),
    "another issuer": token(iss="https://evil.example"),
    "another audience": token(aud="other"),
    "no audience": token(aud=None),
    "no expiry": token(exp=None),
    "expired": token(exp=time.time() - 61),
    "not yet": token(nbf=time.time() + 3600),
    "alg none": unsigned({"alg": "none", "kid": "r"}),
    "alg of another key": token(EC, "ES256", "r"),
    "alg not among ours": token(RSA, "RS384"),
    "no alg": unsigned({"kid": "r"}),
    "numbers": unsigned({"alg": 1, "kid": 2}),
    "too long": token(filler="x" * 20_000),
    "signature cut": token()[:-4],
    "critical extension": jwt.encode(
        {**CLAIMS, "exp": time.time() + 60}, RSA, "RS256", {"kid": "r", "crit": ["x"], "x": 1}
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_no_other_is_believed(file, settings, wrong):
    with pytest.raises(Unauthenticated):
        tokens.verify(wrong, tokens.read(file), settings)


def test_a_public_key_is_no_shared_secret(file, settings):
    """The classic confusion (RFC 8725, 2.1): HS256 with the public key as its secret."""
    import hashlib
    import hmac

    head = unsigned({"alg": "HS256", "kid": "r"}).rstrip(".")
    made = base64.urlsafe_b64encode(hmac.new(PUBLIC, head.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated):
        tokens.verify(f"{head}.{made}", tokens.read(file), settings)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AA"}]}', '{"keys": [3]}']
)
def test_a_file_without_public_keys_is_refused(tmp_path, text):
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"jwks\.json"):
        tokens.read(path)


def test_keys_that_cannot_sign_for_us_are_left_out(tmp_path, caplog):
    path = tmp_path / "jwks.json"
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    odd = [
        {"kty": "OKP", "crv": "X25519", "x": "AAAA", "kid": "o"},
        {"kty": "new", "kid": "n"},
        {"kty": "RSA", "kid": "b"},
    ]
    encrypting = {**jwk(OTHER, "c", "RS256"), "use": "enc"}
    path.write_text(json.dumps({"keys": [*odd, jwk(weak, "w", "RS256"), encrypting, jwk(RSA, "r", "RS256")]}))
    assert [key.key_id for key in tokens.read(path)] == ["r"]
    assert [record.getMessage().split("key ")[1][0] for record in caplog.records] == ["o", "n", "b", "w"]
    path.write_text(json.dumps({"keys": [jwk(weak, "w", "RS256")]}))
    with pytest.raises(ConfigError, match="no public key for signatures"):
        tokens.read(path)


def test_a_token_is_verified_once_until_it_ends(file, monkeypatch):
    now = {"us": 0}
    security = {"jwt": {"jwks_file": str(file), "issuer": CLAIMS["iss"], "audience": "forno", "leeway_s": 0}}
    settings = Config.model_validate({"security": security}).security
    began_s = time.time()
    guard = Guard(settings, loopback=True, clock_us=lambda: now["us"], time_s=lambda: began_s + now["us"] / 1e6)
    verified = []
    verify = guard._verify
    monkeypatch.setattr(guard, "_verify", lambda *given: verified.append(1) or verify(*given))
    credential = credential_of([("authorization", f"Bearer {token()}")], trusted=False)
    for _ in range(3):
        assert guard.admit("predict", credential, "1.1.1.1:1").name == "token ana"
    assert len(verified) == 1
    now["us"] = 61_000_000
    guard.admit("predict", credential, "1.1.1.1:1")  # asks again; by the library's own clock it is still good
    assert len(verified) == 2
    file.write_text(json.dumps({"keys": [jwk(OTHER, "r", "RS256")]}))
    now["us"] += 1_000_000
    with pytest.raises(Unauthenticated):
        guard.admit("predict", credential, "1.1.1.1:1")
