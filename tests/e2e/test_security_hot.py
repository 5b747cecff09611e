"""Rights and limits of requests that repeat: one plan (servicers/hot.py) serves all, each sender is asked anew."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2, status_pb2
from tests.e2e.secured import Credential, Secured, SecuredServer, keyed_server, predict

from forno.server.security import keys
from forno.v1 import predictor_pb2 as pb

if TYPE_CHECKING:
    from typing import Self

PREDICT, STREAM = "/forno.v1.Predictor/Predict", "/forno.v1.Predictor/PredictStream"
BODY = predict("alpha").SerializeToString()
TOLD = "grpc-status-details-bin"
OK, EXHAUSTED, DENIED, UNKNOWN = "OK", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED"
NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class Caller:
    """One way to send the same body again and again; each answer is awaited. Holds its connection.

    Args:
        server: Where to.
        credential: Shown with each call, or with the one stream.
    """

    def __init__(self, server: SecuredServer, credential: Credential) -> None:
        self._channel = server.connect()
        self._metadata = credential.metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def send(self) -> tuple[str, status_pb2.Status]:
        """Status name of one more request, and what else is told."""
        raise NotImplementedError

    def sends(self, count: int) -> list[str]:
        """Status names of so many requests."""
        return [self.send()[0] for _ in range(count)]


class Unary(Caller):
    """A call each."""

    def send(self) -> tuple[str, status_pb2.Status]:
        try:
            self._channel.unary_unary(PREDICT)(BODY, metadata=self._metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code().name, told_by(error)
        return OK, status_pb2.Status()


class Items(Caller):
    """Items of one stream; once that has ended, what it has ended with."""

    def __init__(self, server: SecuredServer, credential: Credential) -> None:
        super().__init__(server, credential)
        self._items: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream = self._channel.stream_stream(STREAM, response_deserializer=pb.PredictStreamResponse.FromString)
        self._answers = stream(iter(self._items.get, None), metadata=self._metadata, timeout=60)

    def __exit__(self, *_: object) -> None:
        self._items.put(None)
        super().__exit__()

    def send(self) -> tuple[str, status_pb2.Status]:
        self._items.put(pb.PredictStreamRequest(request=predict("alpha")).SerializeToString())
        try:
            answer = next(self._answers)
        except grpc.RpcError as error:
            return error.code().name, told_by(error)
        return NAMES[answer.error.code], answer.error


WAYS = pytest.mark.parametrize("way", [Unary, Items])


def told_by(error: grpc.RpcError) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(error.trailing_metadata()).get(TOLD, b""))


@pytest.fixture
def files(tmp_path) -> Secured:
    return Secured(tmp_path)


def eventually(caller: Caller, status: str) -> None:
    """Calls until a change of the keys file is seen, which is once a second."""
    end = time.monotonic() + 8
    while (seen := caller.send()[0]) != status:
        assert seen == OK
        assert time.monotonic() < end, f"still {seen}, expected {status}"
        time.sleep(0.05)


@WAYS
def test_every_sender_of_a_planned_request_is_asked(files, way):
    alpha, beta, pages = files.key("predict:model/alpha"), files.key("predict:model/beta"), files.key("metrics")
    expected = [
        (alpha, OK),
        (Credential(), UNKNOWN),
        (Credential({"x-api-key": "forno_00000000_AAAA"}), UNKNOWN),
        (Credential({"authorization": "Bearer " + alpha.headers["X-Api-Key"][:-1]}), UNKNOWN),
        (beta, DENIED),
        (pages, DENIED),
        (Credential({"authorization": "Bearer " + alpha.headers["X-Api-Key"]}), OK),
    ]
    with keyed_server(files) as server:
        cold = server.rpc(PREDICT, predict("alpha"), beta)  # before there is a plan
        with way(server, alpha) as first:
            assert first.sends(3) == [OK] * 3
            for credential, status in expected:
                with way(server, credential) as caller:
                    assert caller.sends(3) == [status] * 3
                    assert first.send()[0] == OK
            with way(server, beta) as caller:
                assert (DENIED, caller.send()[1].message) == cold


def test_callers_that_share_a_pass_of_the_loop_keep_their_own_rights(files):
    """Requests with one body that wait together are handed over together, whoever sends them."""
    credentials = [(files.key("predict:model/alpha"), OK), (files.key("predict:model/beta"), DENIED)]
    credentials += [(Credential(), UNKNOWN), (files.key("predict"), OK)]
    with keyed_server(files) as server, server.connect() as channel:
        call = channel.unary_unary(PREDICT)
        call(BODY, metadata=credentials[0][0].metadata, timeout=10)
        calls = [
            (call.future(BODY, metadata=credential.metadata, timeout=10), status)
            for credential, status in credentials * 100
        ]
        assert [future.code().name for future, _ in calls] == [status for _, status in calls]


@WAYS
def test_a_key_that_is_taken_back_or_narrowed_ends_what_was_planned(files, way):
    narrowed, removed, kept = files.key("predict"), files.key("predict"), files.key("predict")
    ids = [credential.headers["X-Api-Key"].split("_")[1] for credential in (narrowed, removed)]
    with (
        keyed_server(files) as server,
        way(server, narrowed) as one,
        way(server, removed) as two,
        way(server, kept) as other,
    ):
        for caller in (one, two, other):
            assert caller.sends(3) == [OK] * 3
        document = yaml.safe_load(files.keys_file.read_text())
        document["keys"][ids[0]]["scopes"] = ["predict:model/beta"]
        files.keys_file.write_text(yaml.safe_dump(document))
        eventually(one, DENIED)
        assert (two.send()[0], other.send()[0]) == (OK, OK)
        keys.remove(files.keys_file, ids[1])
        eventually(two, UNKNOWN)
        assert (one.send()[0], two.send()[0], other.send()[0]) == (DENIED, UNKNOWN, OK)


BURST = 40
PROBES = 20  # at most, that the start-up of the server has sent


LIMITED = [("envoy", way, anonymous) for way in (Unary, Items) for anonymous in (False, True)]


@pytest.mark.parametrize(("transport", "way", "anonymous"), [*LIMITED, ("proxy", Items, True), ("grpc", Items, True)])
def test_planned_requests_count_against_the_limit(files, transport, way, anonymous):
    """The burst is answered, the opening of a stream being one of it; the others hear when to come again."""
    limit = {"calls_per_s": 0.01, "burst": BURST}
    with keyed_server(files, transport, rate_limit=limit, anonymous=["predict", "health"]) as server:
        credential = Credential() if anonymous else files.key("predict")
        with way(server, credential) as one, way(server, files.key("predict")) as other:
            allowed = BURST - (way is Items)
            seen = one.sends(allowed + 3)
            answered = seen.count(OK)
            assert seen == [OK] * answered + [EXHAUSTED] * (len(seen) - answered)
            assert allowed - (PROBES if anonymous else 0) <= answered <= allowed
            code, told = one.send()
            retry = error_details_pb2.RetryInfo()
            assert code == EXHAUSTED
            assert [detail.Unpack(retry) for detail in told.details].count(True) == 1
            assert 0 < retry.retry_delay.ToMilliseconds() <= 100_000
            assert other.send()[0] == OK
