"""Pictures to a model that resizes, normalises and ranks: through an endpoint and as tensors, by REST and gRPC."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import json_format
from PIL import Image
from tests.e2e.forno_server import FornoServer
from tests.unit import onnx_models
from tests.unit.test_engines import plain
from tests.unit.test_pixels import encoded

from forno.client import Client, InvalidArgument
from forno.kernels import reference
from forno.v1 import predictor_pb2, predictor_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = [f"class {number}" for number in range(7)]
SETTINGS: dict[str, Any] = {
    "models": {
        "see": {
            "path": "see.onnx",
            "preprocess": {"resize": 36, "mean": MEAN, "std": STD, "max_pixels": 5000},
            "postprocess": {"top_k": 3, "softmax": True},
        }
    },
    "endpoints": {
        "pictures": {
            "model": "see",
            "input": {"codec": "image"},
            "output": {"codec": "label", "labels": LABELS, "top_k": 3},
        }
    },
}


@pytest.fixture(scope="module", params=["envoy", "grpc"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FornoServer]:
    folder = tmp_path_factory.mktemp("images")
    onnx_models.seeing(folder / "see.onnx", size=(32, 32))
    (folder / "forno.yaml").write_text(json.dumps(SETTINGS))
    with FornoServer(folder / "forno.yaml", transport=request.param) as running:
        running.folder = folder  # type: ignore[attr-defined]
        yield running


def pictures() -> list[Any]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((60, 80), (90, 40), (32, 32))]


def best_of(path: Path, image: Any) -> tuple[Any, Any]:
    """Scores and classes by the references: the shorter side becomes 36, and the middle 32 x 32 is taken."""
    height, width = image.shape[:2]
    rows, columns = 36 * height // min(height, width), 36 * width // min(height, width)
    window = (rows, columns, round((rows - 32) / 2), round((columns - 32) / 2))
    scale, bias = [1 / 255 / std for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
    tensor = reference.image_to_tensor([image], 32, 32, scale, bias, windows=[window]).astype(np.float32)
    return reference.softmax_topk(plain(path, tensor)[0], 3, softmax=True)


def check(reply: Any, path: Path, image: Any) -> None:
    values, classes = best_of(path, image)
    assert [entry["prediction"] for entry in reply["top"]] == [LABELS[number] for number in classes[0]]
    np.testing.assert_allclose([entry["confidence"] for entry in reply["top"]], values[0], atol=1e-4)
    assert reply["prediction"] == LABELS[classes[0][0]]


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_ranked(server: FornoServer, format_: str) -> None:
    path = server.folder / "see.onnx"  # type: ignore[attr-defined]
    stub = predictor_pb2_grpc.PredictorStub(server.channel)
    for image in pictures():
        data = encoded(image, format_)
        seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        kind = f"image/{format_.lower()}"
        request = predictor_pb2.InvokeRequest(endpoint="pictures")
        request.body.content_type, request.body.data = kind, data
        check(json_format.MessageToDict(stub.Invoke(request, timeout=10).output), path, seen)
        if server.transport == "envoy":
            reply = server.http("POST", "/v1/pictures", data, {"content-type": kind})
            assert reply.status == 200, reply.body
            check(json.loads(reply.body), path, seen)


def test_pixels_as_tensors(server: FornoServer) -> None:
    path = server.folder / "see.onnx"  # type: ignore[attr-defined]
    with Client(server.target) as client:
        for image in pictures():
            values, classes = best_of(path, image)
            for _ in range(3):  # the hot way from the second on
                answer = client.predict("see", {"image": image[np.newaxis]}).outputs
                np.testing.assert_array_equal(answer["logits_classes"], classes)
                np.testing.assert_allclose(answer["logits"], values, rtol=1e-4, atol=1e-6)
            if server.transport == "envoy":
                body = json.dumps({"inputs": {"image": [image.tolist()]}}).encode()
                reply = server.http("POST", "/v1/models/see:predict", body)
                assert reply.status == 200, reply.body
                assert json.loads(reply.body)["outputs"]["logits_classes"] == classes.tolist()


def test_what_is_no_picture_is_told(server: FornoServer) -> None:
    with (
        Client(server.target) as client,
        pytest.raises(Exception, match="images of 0 x 4, expected sides of 1 to 32767"),
    ):
        client.predict("see", {"image": np.zeros((1, 0, 4, 3), np.uint8)})
    if server.transport == "envoy":
        reply = server.http("POST", "/v1/pictures", b"\xff\xd8\xff\xe0 half", {"content-type": "image/jpeg"})
        assert reply.status == 400
        assert b"not an image that can be read" in reply.body


def test_a_picture_that_is_too_large_is_refused_before_it_waits(server: FornoServer) -> None:
    words = "input 'image': images of 60 x 84, 5040 pixels, expected at most 5000 (preprocess.max_pixels)"
    large, fine = (np.zeros((1, 60, columns, 3), np.uint8) for columns in (84, 83))
    with Client(server.target) as client:
        for _ in range(2):
            assert client.predict("see", {"image": fine}).outputs["logits"].shape == (1, 3)
            with pytest.raises(InvalidArgument, match=re.escape(words)):
                client.predict("see", {"image": large})
    if server.transport == "envoy":
        body = json.dumps({"inputs": {"image": large.tolist()}}).encode()
        for path, data, kind in (
            ("/v1/models/see:predict", body, "application/json"),
            ("/v1/pictures", encoded(large[0], "PNG"), "image/png"),
        ):
            reply = server.http("POST", path, data, {"content-type": kind})
            assert reply.status == 400
            assert json.loads(reply.body)["message"] == words
