"""Endpoints and their codecs on real models."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.unit.calls import loaded, registry_of, spam_model, sums_model

from forno.server.config import Config, EndpointSettings
from forno.server.endpoints import Payload, build, image
from forno.server.endpoints.image import ImageReader
from forno.server.endpoints.label import LabelWriter
from forno.server.endpoints.payload import Decoded
from forno.server.endpoints.settings import ImageInput, LabelOutput, input_settings, output_settings
from forno.server.errors import ConfigError, EngineFailed, InvalidArgument, NotReady
from forno.server.request import Answer
from forno.server.signature import Signature, TensorSpec
from forno.v1 import tensors


def endpoints_of(*models, **settings):
    registry = registry_of(*models)
    entries = {name.replace("__", "/"): EndpointSettings(**values) for name, values in settings.items()}
    return build(Config(endpoints=entries), registry), registry


def signature(*inputs, outputs=(), batched=True):
    return Signature(tuple(inputs), tuple(outputs), batched)


def spec(name, data_type, *shape):
    return TensorSpec(name, tensors.dtype_named(data_type), shape)


def picture(array, format_="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(buffer, format_, **options)
    return buffer.getvalue()


def reader(*shape, data_type="float32", **settings):
    return ImageReader(ImageInput(codec="image", **settings), signature(spec("pixels", data_type, *shape)), "e.input")


async def pixels_of(reader_, data, content_type="image/png"):
    decoded = await reader_.read(Payload(content_type=content_type, data=data))
    return decoded.arrays["pixels"]


def label_writer(output, batched=True, extra=(), **settings):
    outputs = [output, *extra]
    return LabelWriter(LabelOutput(codec="label", **settings), signature(outputs=outputs, batched=batched), "e.output")


def written(writer, *outputs, many=False):
    return writer.write(Answer([np.asarray(output) for output in outputs], 0, 0, 1), Decoded({}, many=many))


class TestText:
    @pytest.fixture
    async def detect(self, tmp_path):
        model = await loaded("spam", spam_model(tmp_path / "spam.onnx"))
        found, _ = endpoints_of(
            model,
            spam__detect={
                "model": "spam",
                "input": {"codec": "text", "field": "text"},
                "output": {"codec": "label", "labels": ["ham", "spam"], "tensor": "probabilities"},
            },
        )
        yield found["spam/detect"]
        await model.close(0)

    @pytest.mark.parametrize(
        "payload",
        [
            Payload(value={"text": "buy"}),
            Payload(content_type="application/json", data=b'{"text": "buy"}'),
            Payload(data=b'{"text": "buy"}'),
            Payload(content_type="text/plain; charset=utf-8", data=b"buy"),
        ],
        ids=str,
    )
    async def test_a_text_in_every_dress(self, detect, payload):
        reply = await detect.invoke(payload)
        assert reply.value == {"prediction": "spam", "confidence": 0.97}
        assert (reply.model, reply.version, reply.batch_rows) == ("spam", "1", 1)

    async def test_a_list_of_texts_gives_a_list(self, detect):
        reply = await detect.invoke(Payload(value={"text": ["buy", "hi"]}))
        assert [entry["prediction"] for entry in reply.value] == ["spam", "ham"]
        assert isinstance((await detect.invoke(Payload(value={"text": ["buy"]}))).value, list)

    @pytest.mark.parametrize(
        ("payload", "words"),
        [
            (Payload(value={"txt": "a"}), ["`txt`", "did you mean `text`?"]),
            (Payload(value={"text": "a", "lang": "en"}), ["`lang`"]),
            (Payload(value={}), ["`text` is missing"]),
            (Payload(value="buy"), ["not an object"]),
            (Payload(value={"text": 3}), ["`text` is 3"]),
            (Payload(value={"text": ["a", None]}), ["`text[1]` is null"]),
            (Payload(value={"text": []}), ["empty list"]),
            (Payload(data=b'{"text"'), ["not JSON"]),
            (Payload(content_type="text/plain", data=b"\xff"), ["UTF-8", "byte 0"]),
            (Payload(content_type="text/plain; charset=latin-1", data=b"a"), ["latin-1"]),
            (Payload(content_type="image/png", data=b"a"), ["image/png", "text/plain"]),
        ],
        ids=str,
    )
    async def test_refusals(self, detect, payload, words):
        with pytest.raises(InvalidArgument) as caught:
            await detect.invoke(payload)
        for word in words:
            assert word in str(caught.value)

    async def test_a_model_of_numbers_takes_no_text(self):
        with pytest.raises(ConfigError, match=r"endpoints\.e\.input: .*'x' is float32\[\?, \?\]"):
            endpoints_of(await loaded("m"), e={"model": "m", "input": {"codec": "text"}})


class TestImages:
    RAMP = np.arange(64).reshape(8, 8) * 4

    async def test_pixels_are_mapped_onto_the_range(self):
        values = await pixels_of(reader(-1, 64, range=(0, 16)), picture(self.RAMP))
        assert values.shape == (1, 64)
        assert values.dtype == np.float32
        assert np.allclose(values, self.RAMP.reshape(1, 64) / 255 * 16)

    async def test_a_larger_image_is_averaged_down(self):
        large = np.kron(self.RAMP, np.ones((10, 10)))
        assert np.array_equal(await pixels_of(reader(-1, 8, 8), picture(large)), self.RAMP[np.newaxis])

    @pytest.mark.parametrize("ink", ["dark", "light"])
    async def test_auto_makes_the_background_black(self, ink):
        image_ = np.zeros((8, 8))
        image_[3:5, 3:5] = 255
        data = picture(255 - image_ if ink == "dark" else image_)
        assert np.array_equal((await pixels_of(reader(-1, 8, 8, invert="auto"), data))[0], image_)
        plain = (await pixels_of(reader(-1, 8, 8, invert=True), data))[0]
        assert np.array_equal(plain, image_ if ink == "dark" else 255 - image_)

    @pytest.mark.parametrize(
        ("shape", "settings", "expected"),
        [
            ((-1, 4, 4, 3), {}, (1, 4, 4, 3)),
            ((-1, 3, 4, 4), {}, (1, 3, 4, 4)),
            ((1, 4, 6, 1), {}, (1, 4, 6, 1)),
            ((-1, -1, -1, 3), {"size": (5, 7)}, (1, 5, 7, 3)),
            ((-1, 4, 4), {"mode": "L"}, (1, 4, 4)),
            ((-1, 48), {"mode": "RGB"}, (1, 48)),
            ((-1, 24), {"size": (4, 6)}, (1, 24)),
            ((-1, -1), {"size": (4, 6)}, (1, 24)),
            ((-1, 3, 3, 3), {"layout": "NCHW"}, (1, 3, 3, 3)),
        ],
    )
    async def test_the_geometry_comes_from_the_model(self, shape, settings, expected):
        assert (await pixels_of(reader(*shape, **settings), picture(np.zeros((9, 9, 3))))).shape == expected

    async def test_channels_have_numbers_of_their_own(self):
        red = np.zeros((2, 2, 3))
        red[..., 0] = 200
        values = await pixels_of(reader(-1, 3, 2, 2, scale=(1, 2, 3), offset=(0, 5, 6)), picture(red))
        assert values[0, :, 0, 0].tolist() == [200, 5, 6]

    async def test_integers_are_rounded_and_stay_in_range(self):
        values = await pixels_of(reader(-1, 8, 8, data_type="uint8", scale=1.3), picture(self.RAMP))
        assert values.dtype == np.uint8
        assert np.array_equal(values[0], np.rint(self.RAMP * np.float32(1.3)).clip(0, 255))

    @pytest.mark.parametrize("format_", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
    async def test_formats(self, format_):
        values = await pixels_of(reader(-1, 8, 8), picture(np.full((64, 64), 200), format_), "")
        assert abs(values - 200).max() < 4

    async def test_transparency_is_white_and_16_bits_are_scaled(self):
        clear = picture(np.zeros((8, 8, 4)))
        assert (await pixels_of(reader(-1, 8, 8), clear)).min() == 255
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(buffer, "PNG")
        assert (await pixels_of(reader(-1, 8, 8), buffer.getvalue())).min() == 255
        palette = Image.new("P", (8, 8), 0)
        palette.info["transparency"] = b"\0"
        buffer = io.BytesIO()
        palette.save(buffer, "PNG")
        assert (await pixels_of(reader(-1, 8, 8), buffer.getvalue())).min() == 255

    async def test_a_photo_is_turned_upright(self):
        tall = np.zeros((16, 8), np.uint8)
        tall[:8] = 255
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        values = await pixels_of(reader(-1, 16, 8), picture(tall, "JPEG", exif=exif))
        assert values[0, :6].max() < 10
        assert values[0, 10:].min() > 245

    async def test_large_images_are_decoded_off_the_loop(self, monkeypatch):
        threads = []
        decode = ImageReader._decode
        monkeypatch.setattr(
            ImageReader, "_decode", lambda *args: threads.append(threading.current_thread()) or decode(*args)
        )
        await pixels_of(reader(-1, 8, 8), picture(np.zeros((600, 600))))
        await pixels_of(reader(-1, 8, 8), picture(np.zeros((16, 16))))
        assert threads[0] is not threading.main_thread()
        assert threads[1] is threading.main_thread()

    @pytest.mark.parametrize("shape", [(-1, 64), (-1, 8, 8), (-1, 8, 8, 1), (-1, 1, 8, 8)])
    async def test_pixel_rows_go_to_the_model_as_they_are(self, shape):
        reader_ = reader(*shape, range=(0, 16), invert=True)
        rows = (self.RAMP / 16).tolist()
        one = await reader_.read(Payload(value={"pixels": rows}))
        assert one.arrays["pixels"].shape == (1, *shape[1:])
        assert np.array_equal(one.arrays["pixels"].reshape(8, 8), np.float32(rows))
        assert not one.many
        text = json.dumps({"pixels": [rows, rows]}).encode()
        for content_type in ("application/json", "application/x-www-form-urlencoded", ""):
            two = await reader_.read(Payload(content_type=content_type, data=text))
            assert two.arrays["pixels"].shape == (2, *shape[1:])
            assert two.many

    async def test_colour_pixels_are_laid_out_for_the_model(self):
        values = np.arange(12).reshape(2, 2, 3)
        decoded = await reader(-1, 3, 2, 2).read(Payload(value={"pixels": values.tolist()}))
        assert np.array_equal(decoded.arrays["pixels"][0], values.transpose(2, 0, 1))

    @pytest.mark.parametrize(
        ("content_type", "data", "words"),
        [
            ("image/png", b"", ["empty"]),
            ("image/png", b"\x01\x02no image", ["10 bytes", "01 02 6e", "PNG, JPEG, BMP, GIF or WEBP"]),
            ("image/png", picture(np.zeros((64, 64)))[:60], ["broken"]),
            (
                "image/jpeg",
                picture(np.random.default_rng(0).integers(0, 255, (64, 64)), "JPEG")[:900],
                ["broken"],
            ),
            ("text/html", b"<img>", ["text/html", "image/png", "application/json"]),
            ("application/json", b"{", ["not JSON"]),
            ("application/json", b'{"pixel": []}', ["did you mean `pixels`?"]),
            ("application/json", b'{"pixels": [[1, 2], [3]]}', ["pixels[1] is a list of 1"]),
            ("application/json", b'{"pixels": [[1, 2]]}', ["shape [1, 2]", "expected [8, 8]"]),
            ("application/json", b'{"pixels": []}', ["shape [0]"]),
            ("application/json", b'{"pixels": [[true]]}', ["is true"]),
        ],
        ids=str,
    )
    async def test_refusals(self, content_type, data, words):
        with pytest.raises(InvalidArgument) as caught:
            await pixels_of(reader(-1, 64), data, content_type)
        for word in words:
            assert word in str(caught.value)

    async def test_an_image_too_large_is_not_decoded(self, monkeypatch):
        monkeypatch.setattr(ImageReader, "_decode", None)
        with pytest.raises(InvalidArgument, match="100 x 100, 10000 pixels, expected at most 9999"):
            await pixels_of(reader(-1, 64, max_pixels=9999), picture(np.zeros((100, 100))))

    @given(st.binary(max_size=200), st.integers(0, 120))
    async def test_random_bytes_are_refused(self, data, at):
        good = picture(self.RAMP)
        reader_ = reader(-1, 64)
        for body in (data, good[:at] + data, good[:at] + data + good[at + len(data) :]):
            try:
                await pixels_of(reader_, body)
            except InvalidArgument as error:
                assert str(error)  # noqa: PT017  (any other error is what the test is for)

    @pytest.mark.parametrize(
        ("shape", "settings", "words"),
        [
            ((-1, 63), {}, ["input.size is missing", "float32[?, 63]"]),
            ((-1, 64), {"size": (8, 9)}, ["[8, 9]"]),
            ((-1, -1, -1, 3), {}, ["input.size is missing"]),
            ((-1, 8, 8, 3), {"size": (9, 9)}, ["[9, 9]"]),
            ((-1, 3, 3, 3), {}, ["set `layout`"]),
            ((-1, 8, 8, 3), {"mode": "L"}, ["mode is L", "3 channels"]),
            ((-1, 8, 8, 2), {"layout": "NHWC"}, ["2 channels"]),
            ((8, 8), {}, ["rows of images"]),
            ((-1,), {}, ["rows of images"]),
            ((-1, 8, 8), {"scale": (1, 2, 3)}, ["scale has 3"]),
            ((-1, 8, 8), {"tensor": "x"}, ["tensor is 'x'", "'pixels'"]),
        ],
    )
    def test_a_model_that_does_not_fit(self, shape, settings, words):
        with pytest.raises(ConfigError) as caught:
            reader(*shape, **settings)
        for word in words:
            assert word in str(caught.value)

    def test_without_pillow_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(image, "Image", None)
        with pytest.raises(ConfigError, match=r"pip install 'forno\[images\]'"):
            reader(-1, 64)


class TestLabels:
    PROBABILITIES = spec("probabilities", "float32", -1, 3)
    ROW = np.float32([[0.2, 0.7, 0.1]])

    def test_the_likeliest(self):
        writer = label_writer(self.PROBABILITIES, labels=("a", "b", "c"))
        assert written(writer, self.ROW) == {"prediction": "b", "confidence": 0.7}
        assert written(writer, self.ROW, many=True) == [{"prediction": "b", "confidence": 0.7}]
        assert len(written(writer, np.repeat(self.ROW, 2, 0))) == 2

    def test_the_likeliest_few(self):
        writer = label_writer(self.PROBABILITIES, labels=("a", "b", "c"), top_k=2)
        top = [{"prediction": "b", "confidence": 0.7}, {"prediction": "a", "confidence": 0.2}]
        assert written(writer, self.ROW) == {**top[0], "top": top}

    def test_numbers_where_there_are_no_names(self):
        assert written(label_writer(self.PROBABILITIES), self.ROW) == {"prediction": 1, "confidence": 0.7}

    def test_logits(self):
        writer = label_writer(self.PROBABILITIES, scores="logits")
        assert written(writer, np.float32([[1000, 1000, -1000]])) == {"prediction": 0, "confidence": 0.5}

    @pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
    def test_one_score_is_that_of_the_second_of_two(self, shape):
        output = spec("p", "float64", *shape)
        score = np.full((1, *shape[1:]), 0.25)
        assert written(label_writer(output, labels=("no", "yes")), score) == {
            "prediction": "no",
            "confidence": 0.75,
        }
        logits = label_writer(output, labels=("no", "yes"), scores="logits")
        assert written(logits, score * 0 + 800) == {"prediction": "yes", "confidence": 1.0}

    def test_a_model_without_rows(self):
        writer = label_writer(spec("p", "float32", 3), batched=False, labels=("a", "b", "c"))
        assert written(writer, self.ROW[0]) == {"prediction": "b", "confidence": 0.7}

    def test_the_models_own_choice(self):
        texts = spec("label", "string", -1)
        chosen = np.array(["a"], object)
        writer = label_writer(self.PROBABILITIES, extra=[texts], label_tensor="label", labels=("a", "b", "c"))
        assert written(writer, self.ROW, chosen) == {"prediction": "a", "confidence": 0.2}
        writer = label_writer(self.PROBABILITIES, extra=[texts], label_tensor="label")
        assert written(writer, self.ROW, chosen) == {"prediction": "a", "confidence": 0.7}
        numbers = spec("label", "int64", -1)
        writer = label_writer(self.PROBABILITIES, extra=[numbers], label_tensor="label", labels=("a", "b", "c"))
        assert written(writer, self.ROW, np.int64([2])) == {"prediction": "c", "confidence": 0.1}
        writer = label_writer(self.PROBABILITIES, extra=[numbers], label_tensor="label")
        assert written(writer, self.ROW, np.int64([7])) == {"prediction": 7, "confidence": 0.7}

    def test_scores_that_are_no_numbers(self):
        with pytest.raises(EngineFailed, match="'probabilities'"):
            written(label_writer(self.PROBABILITIES), self.ROW * np.nan)

    @pytest.mark.parametrize(
        ("outputs", "settings", "words"),
        [
            ([PROBABILITIES], {"labels": ("a", "b")}, ["labels has 2 names", "float32[?, 3]", "expected 3"]),
            ([PROBABILITIES], {"tensor": "p"}, ["tensor is 'p'", "'probabilities' (float32[?, 3])"]),
            ([PROBABILITIES, spec("q", "float32", -1)], {}, ["tensor is missing", "'q'"]),
            ([spec("n", "int64", -1)], {}, ["tensor is missing"]),
            ([spec("p", "float32", -1, 2, 2)], {}, ["one score a class"]),
            ([PROBABILITIES], {"label_tensor": "probabilities"}, ["texts or whole numbers"]),
        ],
    )
    def test_a_model_that_does_not_fit(self, outputs, settings, words):
        with pytest.raises(ConfigError) as caught:
            label_writer(outputs[0], extra=outputs[1:], **settings)
        for word in words:
            assert word in str(caught.value)


class TestTensors:
    async def test_every_form_is_answered_in_kind(self, tmp_path):
        model = await loaded("sums", sums_model(tmp_path / "m.onnx"))
        found, _ = endpoints_of(model, sums={"model": "sums"})
        invoke = found["sums"].invoke
        row = {"x": [0.1, 0], "k": 3}
        expected = {"total": 0.1, "label": 3, "both": [0.1, 0.0]}
        assert (await invoke(Payload(value={"instances": [row]}))).value == {"predictions": [expected]}
        columns = Payload(data=b'{"inputs":{"x":[[0.1,0]],"k":[3]}}')
        assert (await invoke(columns)).value == {"outputs": {name: [value] for name, value in expected.items()}}
        with pytest.raises(InvalidArgument, match="`model` cannot be chosen here"):
            await invoke(Payload(value={"instances": [row], "model": "other"}))
        with pytest.raises(InvalidArgument, match="image/png"):
            await invoke(Payload(content_type="image/png", data=b"x"))

    async def test_a_text_may_be_answered_with_tensors(self, tmp_path):
        model = await loaded("spam", spam_model(tmp_path / "m.onnx"))
        found, _ = endpoints_of(model, spam={"model": "spam", "input": {"codec": "text"}})
        assert (await found["spam"].invoke(Payload(value={"text": "hi"}))).value == {"outputs": [[0.9, 0.1]]}


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"codec": "txt"}, ["e.input.codec is 'txt'", "did you mean `text`?"]),
            ({"codec": 5}, ["expected text, image or tensors"]),
            ({"field": "text"}, ["e.input.codec is missing"]),
            ({"codec": "text", "feild": "a"}, ["e.input.feild is not a setting", "did you mean `field`?"]),
            ({"codec": "image", "mode": "CMYK"}, ["e.input.mode is 'CMYK'"]),
            ({"codec": "image", "size": [8]}, ["e.input.size"]),
            ({"codec": "image", "range": [0, 1], "scale": 2}, ["e.input takes either `range` or"]),
        ],
        ids=str,
    )
    def test_a_wrong_input(self, values, words):
        with pytest.raises(ConfigError) as caught:
            input_settings(values, "e.input")
        for word in words:
            assert word in str(caught.value)

    def test_a_wrong_output(self):
        with pytest.raises(ConfigError, match="did you mean `label`"):
            output_settings({"codec": "labels"}, "e.output")
        with pytest.raises(ConfigError, match=r"e\.output\.labels is 'ham'"):
            output_settings({"codec": "label", "labels": "ham"}, "e.output")

    @pytest.mark.parametrize("name", ["", "/a", "a//b", "a b", "a:predict", "models/m", "predict"])
    async def test_a_name_that_cannot_be_called(self, name):
        with pytest.raises(ConfigError, match=r"endpoints\."):
            endpoints_of(await loaded("m"), **{name: {"model": "m"}})

    async def test_an_unknown_model(self):
        with pytest.raises(ConfigError, match=r"endpoints\.e\.model: model 'mm' is unknown; did you mean 'm'"):
            endpoints_of(await loaded("m"), e={"model": "mm"})


async def test_codecs_follow_the_model_that_is_served():
    first = await loaded("m", shape=(-1, 4))
    found, registry = endpoints_of(first, e={"model": "m", "input": {"codec": "image"}})
    data = picture(np.zeros((8, 8)))
    assert np.shape((await found["e"].invoke(Payload(data=data))).value["outputs"]) == (1, 4)
    registry.add(await loaded("m", version="2", shape=(-1, 9)))
    reply = await found["e"].invoke(Payload(data=data))
    assert (reply.version, np.shape(reply.value["outputs"])) == ("2", (1, 9))
    registry.add(await loaded("m", version="3", shape=(-1, 5)))
    with pytest.raises(NotReady, match="does not fit the model that it has now"):
        await found["e"].invoke(Payload(data=data))
