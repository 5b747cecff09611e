"""The client and `forno predict`, against the real servicer on a real port."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

import forno.client
from forno.client import (
    Client,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Overloaded,
    RequestError,
    ServerError,
    Unavailable,
)
from forno.server import endpoints
from forno.server.__main__ import main
from forno.server.config import Config
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.registry import Registry
from forno.server.servicers.predictor import PredictorServicer
from forno.v1 import predictor_pb2_grpc

CONFIG = {
    "models": {
        "pair": {"engine": "null", "null": {"shape": [-1, 2]}},
        "count": {"engine": "null", "null": {"shape": [-1, 3], "data_type": "int8"}},
        "words": {"engine": "null", "null": {"shape": [-1], "data_type": "string"}},
        "slow": {
            "engine": "null",
            "null": {"shape": [-1, 1], "delay_us": 400_000},
            "batching": {"max_pending_rows": 1},
        },
    },
    "endpoints": {"pairs": {"model": "pair"}},
}


class _Served(threading.Thread):
    """Null models behind `PredictorServicer` on grpc.aio, on an event loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.up = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.stop = asyncio.Event()

    def run(self) -> None:
        try:
            self.loop.run_until_complete(self._serve())
        finally:
            self.up.set()
            self.loop.close()

    async def _serve(self) -> None:
        config = Config.model_validate(CONFIG)
        registry, metrics = Registry(), Metrics()
        for name, settings in config.models.items():
            model = Model(name, "1", None, settings, metrics.model(name, "1"))
            await model.load()
            registry.add(model)
        server = grpc.aio.server()
        servicer = PredictorServicer(registry, endpoints.build(config, registry))
        predictor_pb2_grpc.add_PredictorServicer_to_server(servicer, server)
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.up.set()
        await self.stop.wait()
        await server.stop(0)
        for model in registry.models():
            await model.close(0)


@pytest.fixture(scope="module")
def address():
    thread = _Served()
    thread.start()
    thread.up.wait()
    yield f"127.0.0.1:{thread.port}"
    thread.loop.call_soon_threadsafe(thread.stop.set)
    thread.join()


@pytest.fixture
def client(address):
    with Client(address, timeout_s=10) as client:
        yield client


@pytest.fixture
def predict(address, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        status = main(["predict", "--address", address, *words])
        return (status, *capsys.readouterr())

    return run


def test_arrays_come_back_as_they_went(client):
    x = np.array([[1.5, 2.5], [3.5, np.nan]], np.float32)
    prediction = client.predict("pair", {"x": x}, request_id="a")
    np.testing.assert_array_equal(prediction.outputs["y"], x)
    assert (prediction.model, prediction.version) == ("pair", "1")
    assert prediction.timings.batch_rows == 2


def test_lists_become_what_the_signature_says(client):
    y = client.predict("pair", {"x": [1, 2]}).outputs["y"]
    assert y.dtype == np.float32
    assert y.tolist() == [[1, 2]]
    assert client.predict("words", {"x": "a\0"}).outputs["y"].tolist() == ["a\0"]


@pytest.mark.parametrize(
    ("model", "value", "text"),
    [
        ("count", [1, 2, 300], "expected numbers from -128 to 127"),
        ("count", [1, 2, 3.5], "expected whole numbers"),
        ("count", [[[1, 2, 3]]], "the value has shape [1, 1, 3]"),
        ("count", [[1], [2, 3]], "does not fit"),
        ("count", "x", "expected numbers"),
        ("words", [1], "expected texts"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_the_call(client, model, value, text):
    with pytest.raises(InvalidArgument, match=text.replace("[", r"\[")) as caught:
        client.predict(model, {"x": value})
    assert caught.value.code == ""


def test_each_status_is_an_error_of_its_own(client):
    with pytest.raises(NotFound, match="pai"):
        client.predict("pai", {"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(InvalidArgument, match="expected") as caught:
        client.predict("pair", {"x": np.zeros((1, 2))})
    assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(DeadlineExceeded):
        client.predict("slow", {"x": np.zeros((1, 1), np.float32)}, timeout_s=0.05)
    with (
        Client("127.0.0.1:1") as nowhere,
        pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:1"),
    ):
        nowhere.models()
    for kind in (InvalidArgument, NotFound, Unavailable, Overloaded, DeadlineExceeded, ServerError):
        assert issubclass(kind, RequestError)


def test_overload_says_when_to_come_back(client):
    refused = []

    def call() -> None:
        try:
            client.predict("slow", {"x": np.zeros((1, 1), np.float32)})
        except Overloaded as error:
            refused.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    assert refused[0].retry_after_s > 0


def test_models_are_described(client):
    assert [model.name for model in client.models()] == ["count", "pair", "slow", "words"]
    model = client.model("pair")
    assert (model.state, model.engine, model.endpoints) == ("ready", "null", ("pairs",))
    assert str(model.inputs[0]) == "x: float32[?, 2]"


def test_endpoints_take_json(client):
    answer = client.invoke("pairs", {"instances": [[1, 2]]})
    assert answer.output == {"predictions": [[1, 2]]}
    assert answer.model == "pair"


def test_the_public_surface_is_what_all_says():
    public = {name for name in vars(forno.client) if not name.startswith("_")} - {"annotations"}
    assert public == set(forno.client.__all__)
    assert sorted(forno.client.__all__) == forno.client.__all__


def test_predict_prints_the_answer(predict):
    status, out, _ = predict("pair", "x=[[1, 2]]")
    assert status == 0
    assert out.startswith("pair 1 (waited ")
    assert out.endswith("y: float32[1, 2] = [[1., 2.]]\n")


def test_predict_prints_json(predict):
    status, out, _ = predict("pair", "x=[1, NaN]", "--json")
    assert status == 0
    assert json.loads(out)["outputs"] == {"y": [[1.0, "NaN"]]}


def test_predict_reads_files_and_standard_input(predict, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    assert "float32[3, 2]" in predict("pair", f"x=@{tmp_path}/x.npy")[1]
    (tmp_path / "x.txt").write_text("win cash")
    assert "['win cash']" in predict("words", f"x=@{tmp_path}/x.txt")[1]
    assert "['win cash']" in predict("words", "x=win cash")[1]
    assert "['a', 'b']" in predict("words", 'x=["a", "b"]')[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("[[7, 8]]"))
    assert "[[7., 8.]]" in predict("pair", "x=@-")[1]


def test_predict_makes_inputs_up(predict):
    for model, shape in (("pair", "[5, 2]"), ("count", "[5, 3]"), ("words", "[5]")):
        status, out, err = predict(model, "--random", "--rows", "5")
        assert (status, err) == (0, "")
        assert shape in out


def test_predict_calls_endpoints(predict, tmp_path):
    body = '{"instances": [[1, 2]]}'
    (tmp_path / "body.json").write_text(body)
    for given in (body, f"@{tmp_path}/body.json"):
        status, out, _ = predict("--endpoint", "pairs", given)
        assert (status, json.loads(out)) == (0, {"predictions": [[1, 2]]})


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 2, "no MODEL given; expected `forno predict MODEL NAME=VALUE...` or `--endpoint NAME`"),
        (["pair"], 2, "no value for x; pair takes x: float32[?, 2]. To make them up: --random"),
        (["pair", "y=1"], 2, "input 'y' is unknown; pair takes x: float32[?, 2]"),
        (["pair", "1"], 2, "'1' given; expected NAME=VALUE. pair takes x: float32[?, 2]"),
        (["pair", "x=a"], 2, "the value of x is not JSON: Expecting value: line 1 column 1 (char 0): a"),
        (["pair", "x=@none.npy"], 2, "none.npy: No such file or directory"),
        (["pair", "x=[1, 2, 3]"], 1, "input 'x': shape of [1, 3] does not fit, expected float32[?, 2]"),
        (["pai", "x=1"], 1, "pai"),
        (["--endpoint", "pairs"], 2, "0 bodies given; expected one: JSON, @FILE, or @- for standard input"),
        (["--endpoint", "none", "{}"], 1, "none"),
    ],
)
def test_predict_says_what_is_wrong(predict, words, status, text):
    got, out, err = predict(*words)
    assert (got, out) == (status, "")
    assert err.startswith("forno: ")
    assert text in err
    assert err.count("\n") == 1


def test_predict_needs_nothing_of_the_server():
    source = Path(forno.client.__file__).parent
    assert not [file for file in source.glob("*.py") if "forno.server" in file.read_text()]
