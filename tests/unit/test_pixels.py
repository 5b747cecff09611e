"""The `image` and `label` codecs over a model that sees to sizes and best classes itself."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests.unit import onnx_models
from tests.unit.calls import registry_of
from tests.unit.test_engines import plain
from tests.unit.test_processing import BIAS, IMAGENET, SCALE, images

from forno.kernels import reference
from forno.server.config import Config, EndpointSettings, ModelSettings
from forno.server.endpoints import Payload, build
from forno.server.errors import ConfigError, InvalidArgument
from forno.server.metrics import Metrics
from forno.server.model import Model

LABELS = [f"class {number}" for number in range(7)]


async def opened(path, preprocess=None, postprocess=None):
    settings = ModelSettings(
        preprocess=IMAGENET if preprocess is None else preprocess,
        postprocess={"top_k": 3, "softmax": True} if postprocess is None else postprocess,
    )
    model = Model("m", "1", path, settings, Metrics().model("m", "1"))
    await model.load()
    return model


def endpoint_of(model, input_=None, output=None):
    settings = EndpointSettings(
        model="m",
        input={"codec": "image", **(input_ or {})},
        output={"codec": "label", "labels": LABELS, "top_k": 2, **(output or {})},
    )
    return build(Config(endpoints={"see": settings}), registry_of(model))["see"]


def encoded(image, format_="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format_, **options)
    return buffer.getvalue()


def reply_of(path, image):
    """What the references say of an image that is 6 x 5 or resized to it."""
    tensor = reference.image_to_tensor([image], 6, 5, SCALE, BIAS)
    scores, classes = reference.softmax_topk(plain(path, tensor.astype(np.float32))[0], 2, softmax=True)
    best = zip(scores[0].tolist(), classes[0].tolist(), strict=True)
    top = [{"prediction": LABELS[number], "confidence": pytest.approx(score, abs=1.1e-4)} for score, number in best]
    return {**top[0], "top": top}


@pytest.fixture
def path(tmp_path):
    return onnx_models.seeing(tmp_path / "m.onnx")


@pytest.fixture
async def model(path):
    made = await opened(path)
    yield made
    await made.close(0)


@pytest.mark.parametrize("format_", ["PNG", "BMP"])
async def test_a_picture_of_any_size(path, model, format_):
    endpoint = endpoint_of(model)
    for (image,) in images(1, (6, 5), (9, 30), (2, 3)):
        reply = await endpoint.invoke(Payload(content_type=f"image/{format_.lower()}", data=encoded(image, format_)))
        assert reply.value == reply_of(path, image)


async def test_a_jpeg_is_what_pillow_makes_of_it(path, model):
    data = encoded(images(1, (12, 9))[0][0], "JPEG")
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    reply = await endpoint_of(model).invoke(Payload(content_type="image/jpeg", data=data))
    assert reply.value == reply_of(path, image)


async def test_a_large_picture_comes_to_the_model_small_and_the_same(model):
    shades = np.linspace(0, 255, 1200, dtype=np.uint8)
    image = np.stack([np.add.outer(shades // 2, shades[:900] // 2)] * 3, axis=2)
    whole = reference.image_to_tensor([image], 6, 5, [1.0] * 3, [0.0] * 3)
    reader = endpoint_of(model)._reader
    for format_, levels in (("PNG", 0.5), ("JPEG", 2)):
        decoded = await reader.read(Payload(content_type="image/png", data=encoded(image, format_)))
        pixels = decoded.arrays["image"]
        assert pixels.shape[1] <= 160
        assert pixels.shape[2] <= 120
        small = reference.image_to_tensor([*pixels], 6, 5, [1.0] * 3, [0.0] * 3)
        np.testing.assert_allclose(small, whole, atol=levels)


async def test_transparency_and_grey_are_seen_as_ever(path, model):
    clear = np.zeros((6, 5, 4), np.uint8)
    reply = await endpoint_of(model).invoke(Payload(content_type="image/png", data=encoded(clear)))
    assert reply.value == reply_of(path, np.full((6, 5, 3), 255, np.uint8))
    grey = np.full((6, 5), 77, np.uint8)
    reply = await endpoint_of(model, {"invert": True}).invoke(Payload(content_type="image/png", data=encoded(grey)))
    assert reply.value == reply_of(path, np.full((6, 5, 3), 178, np.uint8))


async def test_pixels_as_json(path, model):
    endpoint = endpoint_of(model)
    (image,) = images(4, (7, 4))[0]
    assert (await endpoint.invoke(Payload(value={"pixels": image.tolist()}))).value == reply_of(path, image)
    many = await endpoint.invoke(Payload(value={"pixels": [image.tolist()] * 2}))
    assert many.value == [reply_of(path, image)] * 2


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ([[1, 2], [3, 4]], "has shape"),
        ([[[1, 2, 3, 4]]], "has shape"),
        ([], "expected"),
        ([[[1, 2, 300]]], "300"),
        ([[[1, 2, 0.5]]], "0.5"),
        ("x", "pixels"),
    ],
)
async def test_what_is_no_picture_is_refused(model, pixels, words):
    with pytest.raises(InvalidArgument, match=words):
        await endpoint_of(model).invoke(Payload(value={"pixels": pixels}))


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(np.zeros((4, 4, 3), np.uint8))[:45]])
async def test_a_broken_body_is_refused(model, data):
    with pytest.raises(InvalidArgument, match=r"image"):
        await endpoint_of(model).invoke(Payload(content_type="image/png", data=data))


@pytest.mark.parametrize(
    ("input_", "output", "words"),
    [
        ({"size": [6, 5], "scale": 2}, {}, r"^endpoints\.see\.input: scale and size cannot be set here: the model has"),
        ({"mode": "L"}, {}, r"input\.mode is L, but 'image' has 3 channels"),
        ({"tensor": "x"}, {}, r"input\.tensor is 'x', but the model's image is 'image'"),
        ({}, {"scores": "logits"}, r"output\.scores is logits; .* set postprocess\.softmax there"),
        ({}, {"top_k": 4}, r"output\.top_k is 4, but the model's postprocess\.top_k is 3"),
        ({}, {"labels": ["a", "b"]}, r"output\.labels has 2 names, expected 7"),
        ({}, {"label_tensor": "logits_classes"}, r"ranks 'logits'; remove tensor and label_tensor"),
    ],
)
async def test_settings_that_say_what_the_model_says_are_refused(model, input_, output, words):
    with pytest.raises(ConfigError, match=words):
        endpoint_of(model, input_, output)


async def test_grey_images_and_all_scores(tmp_path):
    path = onnx_models.seeing(tmp_path / "g.onnx", channels=1)
    model = await opened(path, preprocess={"mean": 0.5}, postprocess={})
    endpoint = endpoint_of(model, output={"scores": "logits"})
    ((image,),) = images(3, (9, 8), channels=1)
    tensor = reference.image_to_tensor([image], 6, 5, [1 / 255], [-0.5]).astype(np.float32)
    for payload in (
        Payload(content_type="image/png", data=encoded(image[:, :, 0])),
        Payload(value={"pixels": image[:, :, 0].tolist()}),
        Payload(value={"pixels": image.tolist()}),
    ):
        reply = await endpoint.invoke(payload)
        assert reply.value["prediction"] == LABELS[int(plain(path, tensor)[0].argmax())]
    await model.close(0)
