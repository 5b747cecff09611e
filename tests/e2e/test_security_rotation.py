"""Certificates and keys change while calls come: none fails that shows what is good."""

from __future__ import annotations

import socket
import ssl
import threading
import time

import grpc
import pytest
from tests.e2e.hosts import eventually
from tests.e2e.secured import ROWS, Credential, Secured, SecuredServer, keyed_server, predict

from forno.server.security import keys

PREDICT = "/forno.v1.Predictor/Predict"


class Load:
    """Callers that never pause: one keeps its connection, one makes a new one for each call."""

    def __init__(self, server: SecuredServer, credential: Credential) -> None:
        self.credential = credential
        self.calls, self.failures = 0, []
        self._server = server
        self._end = threading.Event()
        kinds = (self._kept, self._new)
        self._threads = [threading.Thread(target=kind, daemon=True) for kind in kinds]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join(15)

    def _kept(self) -> None:
        with self._server.connect() as channel:
            self._call(channel)

    def _new(self) -> None:
        while not self._end.is_set():
            with self._server.connect() as channel:
                self._call(channel, once=True)

    def _call(self, channel: grpc.Channel, *, once: bool = False) -> None:
        call = channel.unary_unary(PREDICT)
        while not self._end.is_set():
            try:
                call(predict("alpha").SerializeToString(), metadata=self.credential.metadata, timeout=10)
            except grpc.RpcError as error:
                self.failures.append((error.code(), error.details()))
            self.calls += 1
            time.sleep(0.002)
            if once:
                return


def served_certificate(server: SecuredServer) -> bytes:
    context = ssl.create_default_context(cadata=server.files.authority.certificate.decode())
    with (
        socket.create_connection(("127.0.0.1", server.port), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True)


@pytest.mark.parametrize("transport", ["envoy", "grpc"])
def test_nothing_fails_while_certificates_and_keys_change(tmp_path, transport):
    files = Secured(tmp_path)
    settings = files.settings(**files.all_locks(client_ca=False))
    with SecuredServer(files, settings, transport) as server, Load(server, files.key("predict:model/alpha")) as load:
        for _ in range(2):
            before = served_certificate(server)
            files.rotate_certificate()
            eventually(lambda before=before: served_certificate(server) != before, 8)
            old = load.credential
            new = files.key("predict:model/alpha")
            load.credential = new  # good at once
            time.sleep(0.2)  # until calls that show the old one have ended
            keys.remove(files.keys_file, old.headers["X-Api-Key"].split("_")[1])
            eventually(lambda old=old: server.rpc(PREDICT, predict("alpha"), old)[0] == "UNAUTHENTICATED", 8)
        current = served_certificate(server)
        (files.folder / "server.key").write_text("no key")
        time.sleep(1.5)
        assert served_certificate(server) == current  # what is wrong is told, and changes nothing
        told = server.output()
    assert load.failures == []
    assert load.calls > 100
    assert "the TLS certificate stays as it was" in told


def test_a_key_that_is_taken_back_ends_its_streams(tmp_path):
    from forno.v1 import predictor_pb2 as pb

    files = Secured(tmp_path)
    held = files.key("predict:model/alpha")
    with keyed_server(files) as server:
        channel = server.connect()
        stream = channel.stream_stream(
            "/forno.v1.Predictor/PredictStream",
            pb.PredictStreamRequest.SerializeToString,
            pb.PredictStreamResponse.FromString,
        )
        codes: list[int] = []

        def items():
            yield pb.PredictStreamRequest(request=predict("alpha"))
            files.key("predict")  # another key comes: the file changes, and the stream goes on
            time.sleep(1.2)
            yield pb.PredictStreamRequest(request=predict("alpha"))
            eventually(lambda: len(codes) == 2)  # whoever asks later may be too late
            keys.remove(files.keys_file, held.headers["X-Api-Key"].split("_")[1])
            end = time.monotonic() + 5
            while time.monotonic() < end:
                yield pb.PredictStreamRequest(request=predict("alpha"))
                time.sleep(0.1)
                if server.rpc(PREDICT, predict("alpha"), held)[0] == "UNAUTHENTICATED":
                    break
            yield pb.PredictStreamRequest(request=predict("alpha"))

        for answer in stream(items(), metadata=held.metadata, timeout=20):
            codes.append(answer.error.code)  # noqa: PERF401  (`items` looks at them meanwhile)
        channel.close()
    assert codes[:2] == [0, 0]
    assert codes[-1] == grpc.StatusCode.UNAUTHENTICATED.value[0]


@pytest.mark.parametrize("transport", ["envoy", "proxy", "grpc"])
def test_a_client_over_its_limit_is_told_when_to_come_again(tmp_path, transport):
    files = Secured(tmp_path)
    with keyed_server(files, transport, rate_limit={"calls_per_s": 0.5, "burst": 3}) as server:
        one, other = files.key("predict"), files.key("predict")
        codes = [server.rpc(PREDICT, predict("alpha"), one)[0] for _ in range(5)]
        assert codes == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 2
        assert server.rpc(PREDICT, predict("alpha"), other)[0] == "OK"
        if transport != "grpc":
            reply = server.rest("POST", "/v1/models/alpha:predict", one, ROWS)
            assert (reply.status, reply.headers["retry-after"]) == (429, "2")


@pytest.mark.parametrize("transport", ["envoy", "proxy", "grpc"])
def test_no_header_gives_a_caller_another_address(tmp_path, transport):
    burst = 40  # of which the start-up of the server may send half
    limit = {"calls_per_s": 0.01, "burst": burst}
    with keyed_server(Secured(tmp_path), transport, rate_limit=limit, anonymous=["predict", "health"]) as server:
        codes = []
        for number in range(burst + 1):
            address = f"10.0.0.{number}"
            headers = {"x-forno-peer": address, "x-forwarded-for": address, "x-envoy-external-address": address}
            codes.append(server.rpc(PREDICT, predict("alpha"), Credential(headers))[0])
        assert codes[0] == "OK"
        assert codes[-1] == "RESOURCE_EXHAUSTED"
