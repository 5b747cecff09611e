"""`engine: tensorrt` as a person has it, over a driver and a TensorRT of our own: cuda-bindings are the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import onnx
import pytest
from tests.compiling import fake_driver
from tests.e2e import test_images
from tests.e2e.forno_server import ROOT, FornoServer, environment, forno
from tests.e2e.hosts import eventually
from tests.e2e.test_reload import reload
from tests.unit import onnx_models
from tests.unit.plans import FAKE
from tests.unit.test_engines import plain
from tests.unit.test_kernels_build import nvrtc_obstacle

from forno.client import Client
from forno.kernels import build
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from concurrent.futures import Future

SETTINGS = """\
models:
  m: {path: m.onnx, engine: tensorrt, instances: 2, batching: {max_rows: 16}, cuda: {graphs: true}}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake libcuda.so.1."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings are missing")
    folder = tmp_path_factory.mktemp("driver")
    fake_driver(folder)
    return folder


@pytest.fixture
def folder(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and its settings, and an environment in which there seems to be a GPU."""
    onnx_models.mlp(tmp_path / "m.onnx")
    (tmp_path / "forno.yaml").write_text(SETTINGS)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_TENSORRT_DRIVER", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def predict(server: FornoServer, rows: Any, name: str = "x", **which: str) -> Future[Any]:
    request = predictor_pb2.PredictRequest(inputs=[tensors.encode(name, rows)], **{"model": "m", **which})
    future: Future[Any] = predictor_pb2_grpc.PredictorStub(server.channel).Predict.future(request, timeout=20)
    return future


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_a_model_is_built_served_and_taken_from_the_cache(folder: Path, transport: str) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    want = plain(folder / "m.onnx", rows)[0]
    for told in ("builds a plan, to be kept as", "takes the plan kept as"):
        with FornoServer(folder / "forno.yaml", transport=transport) as server:
            answers = [predict(server, row[None]) for row in rows]
            got = np.concatenate([tensors.decode(answer.result().outputs[0]) for answer in answers])
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            assert "(tensorrt, batches up to 16 rows)" in server.output()
            assert told in server.output()
        assert server.process.returncode == 0
    assert len([*(folder / "cache" / "forno" / "tensorrt").glob("m-*.plan")]) == 1


def test_the_next_version_is_served_without_a_build(folder: Path) -> None:
    (folder / "forno.yaml").write_text(
        "models: {m: {path: m, engine: tensorrt, versions: 2, tensorrt: {refit: true}, batching: {max_rows: 4}}}\n"
    )
    models = {version: folder / "m" / version / "model.onnx" for version in ("1", "2")}
    models["1"].parent.mkdir(parents=True)
    onnx_models.mlp(models["1"])
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    with FornoServer(folder / "forno.yaml") as server:
        models["2"].parent.mkdir()
        model = onnx.load(models["1"])
        for each in model.graph.initializer:
            each.CopyFrom(onnx.numpy_helper.from_array(-2 * onnx.numpy_helper.to_array(each), each.name))
        onnx.save(model, models["2"])
        assert "models loaded: m/2" in reload(server)
        assert server.output().count(" built in ") == 1
        assert server.output().count("given 2 weights in ") == 1
        for version, path in models.items():
            answer = tensors.decode(predict(server, rows, version=version).result().outputs[0])
            np.testing.assert_allclose(answer, plain(path, rows)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(nvrtc_obstacle()), reason=nvrtc_obstacle())
def test_what_gpus_are_asked_is_sound(folder: Path) -> None:
    """tests/gpu, which wait for a GPU, do not rot meanwhile."""
    build.kernels_for("sm_90", folder / "cache" / "forno" / "kernels")  # NVRTC is not for a fake driver
    chosen = ["tests/gpu/test_tensorrt_on_gpu.py", "-k", "cuda and not pycuda and not hundred"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(bool(nvrtc_obstacle()), reason=nvrtc_obstacle())
@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_pictures_come_in_and_labels_go_out(folder: Path, transport: str) -> None:
    """The kernels run around recorded runs, through the real cuda-bindings; pictures of all sizes together."""
    build.kernels_for("sm_90", folder / "cache" / "forno" / "kernels")  # NVRTC is not for a fake driver
    path = onnx_models.seeing(folder / "see.onnx", size=(32, 32))
    ours = {"engine": "tensorrt", "instances": 2, "batching": {"max_rows": 8}, "cuda": {"graphs": True}}
    models = {"see": {**test_images.SETTINGS["models"]["see"], **ours}}
    (folder / "forno.yaml").write_text(json.dumps({**test_images.SETTINGS, "models": models}))
    with FornoServer(folder / "forno.yaml", transport=transport) as server, Client(server.target) as client:
        for _ in range(3):
            asked = [predict(server, image[np.newaxis], "image", model="see") for image in test_images.pictures() * 8]
            for image, answer in zip(test_images.pictures() * 8, asked, strict=True):
                values, classes = test_images.best_of(path, image)
                got = {output.name: tensors.decode(output) for output in answer.result().outputs}
                np.testing.assert_array_equal(got["logits_classes"], classes)
                np.testing.assert_allclose(got["logits"], values, rtol=1e-4, atol=1e-6)
        image = test_images.pictures()[0]
        data = test_images.encoded(image, "PNG")
        test_images.check(client.invoke("pictures", data=data, content_type="image/png").output, path, image)
        if transport == "envoy":
            reply = server.http("POST", "/v1/pictures", data, {"content-type": "image/png"})
            assert reply.status == 200, reply.body
            test_images.check(json.loads(reply.body), path, image)
        assert "(tensorrt, batches up to 8 rows)" in server.output()
    assert server.process.returncode == 0


def test_what_no_profile_holds_is_refused_in_words(folder: Path) -> None:
    onnx_models.one(folder / "m.onnx", "Relu", 1, ["n", "length"])
    profile = "[{x: {min: [1, 4], opt: [8, 8], max: [8, 16]}}]"
    (folder / "forno.yaml").write_text(
        f"models: {{m: {{path: m.onnx, engine: tensorrt, tensorrt: {{profiles: {profile}}}}}}}\n"
    )
    with FornoServer(folder / "forno.yaml", transport="grpc") as server:
        good = predict(server, np.ones((1, 16), np.float32))
        with pytest.raises(grpc.RpcError) as caught:
            predict(server, np.ones((1, 17), np.float32)).result()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not built for shape [17], expected [4] to [16]" in caught.value.details()
        assert tensors.decode(good.result().outputs[0]).shape == (1, 16)


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_a_server_that_is_stopped_gives_up_its_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", '{"step_s": 60}')
    with FornoServer(folder / "forno.yaml", transport=transport, ready=False) as server:
        eventually(lambda: "builds a plan" in server.output(), 20)
        assert server.process.poll() is None, server.output()
        server.process.terminate()
        assert server.process.wait(10) == 0, server.output()
        assert "Traceback" not in server.output()
    assert not builders(folder)


def test_the_builder_does_not_outlive_a_server_that_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", '{"step_s": 60}')
    with FornoServer(folder / "forno.yaml", transport="grpc", ready=False) as server:
        eventually(lambda: builders(folder), 20)
        server.process.kill()
        eventually(lambda: not builders(folder), 20)


def builders(folder: Path) -> list[str]:
    """Processes that build for a test in this folder; none where there is no /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"engines.tensorrt.builder" in (process / "cmdline").read_bytes():
                told = (process / "environ").read_bytes()
                found += [process.name] if os.fsencode(folder) in told else []
        except OSError:
            continue
    return found


def test_check_says_what_will_be_built(folder: Path) -> None:
    for told in ("builds a plan, to be kept as", "takes the plan kept as"):
        done = forno("check", folder / "forno.yaml")
        assert done.returncode == 0, done.stderr
        assert f"forno: m 1: {told} {folder / 'cache' / 'forno' / 'tensorrt' / 'm-'}" in done.stderr
        assert ".plan, with TensorRT 11.4.0.106 for Fake H200, 132 multiprocessors, driver 13" in done.stderr
        assert "tensorrt" in done.stdout


def test_check_without_a_gpu_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = forno("check", folder / "forno.yaml")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "there is no device 'cuda:0'" in line
