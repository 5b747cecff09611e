"""SIGHUP: a single server changes to the models and settings that there are now, and loses no call."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e.forno_server import FLEET, TRANSPORTS, FornoServer
from tests.e2e.hosts import eventually

from forno.client import Client, NotFound, RequestError
from forno.server.security import keys
from forno.v1 import predictor_pb2, predictor_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

X = np.ones((1, 2), np.float32)
ENDPOINT = {"input": {"codec": "tensors"}, "output": {"codec": "tensors"}}


def null(width: int = 2, **settings: Any) -> dict[str, Any]:
    return {"engine": "null", "null": {"shape": [-1, width]}, **settings}


def write(folder: Path, models: dict[str, Any], **sections: Any) -> Path:
    path = folder / "forno.yaml"
    new = folder / "new.yaml"
    new.write_text(json.dumps({"models": models, **sections}))
    new.replace(path)
    return path


def reload(server: FornoServer) -> str:
    """What the log says of one reload."""
    before = len(server.output())
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: "reloaded" in server.output()[before:], 20)
    return server.output()[before:]


@contextlib.contextmanager
def calling(server: FornoServer, *models: str) -> Iterator[list[str]]:
    """Callers of each model, by gRPC and REST, until the end; each outcome."""
    ended, outcomes = threading.Event(), ["begun"]

    def call(model: str) -> None:
        with Client(server.target) as client:
            while not ended.is_set():
                try:
                    outcomes.append(str(client.predict(model, {"x": X}).outputs["y"].tolist()))
                except RequestError as error:
                    outcomes.append(repr(error))

    def post(model: str) -> None:
        while not ended.is_set():
            reply = server.http("POST", f"/v1/models/{model}:predict", b'{"inputs": {"x": [[1, 1]]}}')
            outcomes.append("[[1.0, 1.0]]" if reply.status == 200 else f"{reply.status} {reply.body!r}")

    kinds = (call, post) if server.transport != "grpc" else (call,)
    threads = [threading.Thread(target=kind, args=(model,)) for kind in kinds for model in models]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(outcomes) > 20 * len(threads))
        yield outcomes
        enough = len(outcomes) + 20 * len(threads)
        eventually(lambda: len(outcomes) > enough)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_models_and_endpoints_change_while_their_callers_go_on(tmp_path, transport):
    models = {"stays": null(), "changes": null(), "goes": null()}
    path = write(tmp_path, models, endpoints={"old/name": {"model": "goes", **ENDPOINT}})
    with FornoServer(path, transport=transport) as server, Client(server.target) as client:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="goes"), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with calling(server, "stays", "changes") as outcomes:
            changed = null(batching={"max_rows": 4})
            endpoints = {"new/name": {"model": "comes", **ENDPOINT}}
            write(tmp_path, {"stays": null(), "changes": changed, "comes": null(3)}, endpoints=endpoints)
            said = reload(server)
            assert "models loaded: changes/1, comes/1; let go: changes/1, goes/1" in said
            assert client.predict("comes", {"x": np.ones((1, 3), np.float32)}).outputs["y"].shape == (1, 3)
            with pytest.raises(NotFound):
                client.predict("goes", {"x": X})
            body = {"inputs": {"x": [[1, 2, 3]]}}
            assert client.invoke("new/name", body).output == {"outputs": [[1, 2, 3]]}
            with pytest.raises(NotFound):
                client.invoke("old/name", body)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            assert sorted(model.name for model in client.models()) == ["changes", "comes", "stays"]
            for _ in range(3):
                assert "models loaded: none; let go: none" in reload(server)
        assert set(outcomes[1:]) == {"[[1.0, 1.0]]"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_cannot_be_served_leaves_all_as_it_was(tmp_path, transport):
    path = write(tmp_path, {"echo": null()})
    with FornoServer(path, transport=transport) as server, Client(server.target) as client:
        for models, why in (
            ({"echo": null(), "bad": {"path": str(tmp_path / "none.onnx")}}, "none.onnx: no such file"),
            ({"echo": null(max_rws=3)}, "max_rws"),
            ({}, "nothing to serve"),
        ):
            write(tmp_path, models)
            said = reload(server)
            assert "not reloaded: " in said
            assert why in said
            assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no model")
        write(tmp_path, {"echo": null(4), "broken": {"path": str(broken)}})
        assert "broken.onnx is not a readable ONNX model" in reload(server)
        assert client.predict("echo", {"x": X}).outputs["y"].tolist() == X.tolist()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.output()
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_settings_that_cannot_change_are_named_and_kept(tmp_path, transport):
    path = write(tmp_path, {"echo": null()})
    with FornoServer(path, transport=transport) as server, Client(server.target) as client:
        write(
            tmp_path,
            {"echo": null(), "other": null()},
            server={"max_call_s": 5.0, "drain_s": 3.0, "log_level": "debug"},
            fleet={"replicas": 2},
            security={"cors": {"origins": ["*"]}, "anonymous": ["predict", "health"]},
            telemetry={"sample_ratio": 0.5},
        )
        said = reload(server)
        kept = "fleet.replicas, security.cors, server.max_call_s, telemetry.sample_ratio"
        assert f"kept as they were until the server is started again: {kept}" in said
        assert client.predict("other", {"x": X}).outputs["y"].tolist() == X.tolist()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_new_file_in_the_place_of_a_model_is_served(tmp_path, transport):
    from onnx import TensorProto, helper, save_model

    def put(factor: float) -> None:
        """A model that multiplies."""
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy")
        weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [factor])
        graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "times", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        save_model(model, str(tmp_path / "times.onnx.new"))
        (tmp_path / "times.onnx.new").replace(tmp_path / "models" / "times" / "1" / "model.onnx")

    (tmp_path / "models" / "times" / "1").mkdir(parents=True)
    put(2)
    with FornoServer(tmp_path / "models", transport=transport) as server, Client(server.target) as client:
        assert client.predict("times", {"x": X}).outputs["y"].tolist() == [[2, 2]]
        put(3)
        (tmp_path / "models" / "times" / "2").mkdir()
        assert "models loaded: times/1; let go: times/1" in reload(server)
        assert client.predict("times", {"x": X}).outputs["y"].tolist() == [[3, 3]]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_hangups_in_a_row_end_nothing_and_the_last_settings_win(tmp_path, transport):
    with FornoServer(write(tmp_path, {"echo": null()}), transport=transport) as server:
        for width in (3, 4, 5):
            write(tmp_path, {"echo": null(width)})
            for _ in range(3):
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.01)
        describe = predictor_pb2_grpc.PredictorStub(server.channel).GetModel

        def width_now() -> int:
            return describe(predictor_pb2.GetModelRequest(model="echo"), timeout=5).inputs[0].shape[-1]

        eventually(lambda: width_now() == 5, 20)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.output()


@pytest.mark.parametrize("transport", [*TRANSPORTS, FLEET])
def test_who_may_call_changes_while_callers_go_on(tmp_path, transport):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    stays = keys.add(first, "stays", ["predict"])
    second.write_text(first.read_text())
    goes, comes = keys.add(first, "goes", ["predict"]), keys.add(second, "comes", ["predict"])
    models = {"echo": null()}

    def status(credential: str) -> str:
        with Client(server.target, credential=credential) as client:
            try:
                client.predict("echo", {"x": X})
            except RequestError as error:
                return error.code
        return "OK"

    path = write(tmp_path, models, security={"keys_file": str(first)})
    with FornoServer(path, transport=transport) as server:
        assert [status(key) for key in (stays, goes, comes)] == ["OK", "OK", "UNAUTHENTICATED"]
        ended, seen = threading.Event(), []
        caller = threading.Thread(target=lambda: [seen.append(status(stays)) for _ in iter(ended.is_set, True)])
        caller.start()
        limit = {"calls_per_s": 1000.0, "burst": 2000}
        write(tmp_path, models, security={"keys_file": str(second), "rate_limit": limit, "anonymous": []})
        said = reload(server)
        eventually(lambda: [status(key) for key in (stays, goes, comes)] == ["OK", "UNAUTHENTICATED", "OK"], 20)
        ended.set()
        caller.join()
        assert set(seen) == {"OK"}
        assert "kept" not in said
        write(tmp_path, models, security={"keys_file": str(tmp_path / "none.yaml")})
        assert "not reloaded: security.keys_file is" in reload(server)
        write(tmp_path, models)  # nobody would be asked any more
        assert "until the server is started again: security" in reload(server)
        assert [status(key) for key in (stays, goes, comes)] == ["OK", "UNAUTHENTICATED", "OK"]
