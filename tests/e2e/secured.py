"""A server with every lock on, and the credentials that open some of them."""

from __future__ import annotations

import datetime as dt
import http.client
import ipaddress
import json
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import jwt
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.e2e.forno_server import CHANNEL_OPTIONS, FornoServer, Reply

from forno.server.security import keys
from forno.v1 import predictor_pb2, tensors

if TYPE_CHECKING:
    from typing import Self

ISSUER, AUDIENCE = "https://id.example", "forno"
INPUT = tensors.encode("x", np.ones((1, 2), np.float32))
ROWS = b'{"inputs": {"x": [[1, 1]]}}'
Pair = tuple[bytes, bytes]  # certificate and key, PEM


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "tests") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self.certificate = _pem(
            self._builder(self._name, self._key).add_extension(basic, True).sign(self._key, hashes.SHA256())
        )

    def issue(self, common_name: str, *names: x509.GeneralName) -> Pair:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]), key)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _pem(builder.sign(self._key, hashes.SHA256())), private

    def issue_server(self) -> Pair:
        """One for a server on this machine."""
        return self.issue("server", x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost"))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Provider:
    """Signs tokens."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def jwks(self) -> str:
        made = jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**made, "kid": "1", "alg": "ES256"}]})

    def token(self, scope: str, **changed: Any) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ana", "exp": time.time() + 600, "scope": scope, **changed}
        return jwt.encode(claims, self._key, "ES256", headers={"kid": "1"})


@dataclass
class Credential:
    """What a caller shows, and what that should open."""

    headers: dict[str, str] = field(default_factory=dict)
    certificate: Pair | None = None
    rights: frozenset[str] = frozenset()
    known: bool = True  # whether it is a valid one; others are UNAUTHENTICATED everywhere but at health

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.headers.items()]


class Secured:
    """The files of a secured server, in one folder: models alpha and beta, endpoints alpha/run and beta/run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.provider = Authority(), Provider()
        self.keys_file = folder / "keys.yaml"
        self.rotate_certificate()
        (folder / "clients.pem").write_bytes(self.authority.certificate)
        (folder / "jwks.json").write_text(self.provider.jwks())
        keys.add(self.keys_file, "first", ["admin"])
        for name in ("alpha", "beta"):
            (folder / "models" / name).mkdir(parents=True)
            (folder / "models" / name / "model.yaml").write_text("engine: null\n")

    def rotate_certificate(self) -> None:
        """Puts another certificate and key in the place of what is there, one after the other."""
        certificate, key = self.authority.issue_server()
        for name, data in (("server.pem", certificate), ("server.key", key)):
            new = self.folder / f"{name}.new"
            new.write_bytes(data)
            new.replace(self.folder / name)

    def settings(self, **security: Any) -> Path:
        """A settings file."""
        path = self.folder / "forno.yaml"
        endpoint = {"input": {"codec": "tensors"}, "output": {"codec": "tensors"}}
        path.write_text(
            json.dumps(
                {
                    "models": {name: {"path": f"models/{name}"} for name in ("alpha", "beta")},
                    "endpoints": {f"{name}/run": {"model": name, **endpoint} for name in ("alpha", "beta")},
                    "security": security,
                }
            )
        )
        return path

    def all_locks(self, *, client_ca: bool = True, **more: Any) -> dict[str, Any]:
        """Every kind of credential at once."""
        return {
            "keys_file": "keys.yaml",
            "jwt": {"jwks_file": "jwks.json", "issuer": ISSUER, "audience": AUDIENCE, "algorithms": ["ES256"]},
            "tls": {"certificate_file": "server.pem", "key_file": "server.key"}
            | ({"client_ca_file": "clients.pem"} if client_ca else {}),
            **({"certificates": {"spiffe://test/alpha": ["predict:model/alpha"]}} if client_ca else {}),
            **more,
        }

    def key(self, *scopes: str) -> Credential:
        """An API key."""
        made = keys.add(self.keys_file, "test", scopes)
        return Credential({"X-Api-Key": made}, rights=frozenset(scopes))

    def token(self, scope: str, **changed: Any) -> Credential:
        """A token."""
        return Credential(
            {"Authorization": f"Bearer {self.provider.token(scope, **changed)}"}, rights=frozenset(scope.split())
        )

    def certificate(self, name: str, scope: str = "") -> Credential:
        """A client certificate."""
        pair = self.authority.issue("client", x509.UniformResourceIdentifier(name))
        return Credential(certificate=pair, rights=frozenset(scope.split()))


class SecuredServer(FornoServer):
    """`forno serve` behind TLS, or not.

    Args:
        files: Its files.
        settings: Its settings file.
        transport: As of FornoServer.
        encrypted: Whether it speaks TLS.
        certificate: What the server's own probes show.
    """

    def __init__(
        self, files: Secured, settings: Path, transport: str, *, encrypted: bool = True, certificate: Pair | None = None
    ) -> None:
        super().__init__(settings, transport=transport)
        self.files = files
        self._encrypted = encrypted
        self._certificate = certificate
        self._channels: dict[Pair | None, grpc.Channel] = {}

    def __enter__(self) -> Self:
        self._ready = False
        super().__enter__()
        self.channel.close()
        self.channel = self.connect(self._certificate)
        try:
            self.wait_ready()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def connect(self, certificate: Pair | None = None) -> grpc.Channel:
        """A connection of its own."""
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        if not self._encrypted:
            return grpc.insecure_channel(self.target, options)
        chain, key = certificate or (None, None)
        return grpc.secure_channel(
            self.target, grpc.ssl_channel_credentials(self.files.authority.certificate, key, chain), options
        )

    def rpc(self, path: str, request: Any, credential: Credential, *, stream: bool = False) -> tuple[str, Any]:
        """Status name and answer of one call; of a stream with one request, its first answer."""
        if credential.certificate not in self._channels:
            self._channels[credential.certificate] = self.connect(credential.certificate)
        channel = self._channels[credential.certificate]
        data = request.SerializeToString()
        try:
            if stream:
                answers = channel.stream_stream(path)(iter([data]), metadata=credential.metadata, timeout=10)
                return "OK", next(iter(answers))
            return "OK", channel.unary_unary(path)(data, metadata=credential.metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code().name, error.details()

    def rest(self, method: str, path: str, credential: Credential, body: bytes | None = None, **headers: str) -> Reply:
        """One REST call, its path as it is given."""
        if self._encrypted:
            context = ssl.create_default_context(cadata=self.files.authority.certificate.decode())
            if credential.certificate:
                for index, data in enumerate(credential.certificate):
                    (self.files.folder / f"client{index}.pem").write_bytes(data)
                context.load_cert_chain(self.files.folder / "client0.pem", self.files.folder / "client1.pem")
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=10, context=context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            sent = {"Content-Length": str(len(body or b"")), "Content-Type": "application/json", **credential.headers}
            for name, value in {**sent, **headers}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()


def keyed_server(files: Secured, transport: str = "envoy", **security: Any) -> SecuredServer:
    """One without TLS, which takes API keys."""
    return SecuredServer(files, files.settings(keys_file="keys.yaml", **security), transport, encrypted=False)


def predict(model: str) -> predictor_pb2.PredictRequest:
    """A request that a model takes."""
    return predictor_pb2.PredictRequest(model=model, inputs=[INPUT])
