"""Images before a model and best classes after it: on the CPU, and by the kernels, to the same numbers."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.compiling import needs_compiler
from tests.unit import onnx_models
from tests.unit.devices import Counting
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made
from tests.unit.test_onnx_cuda import answers

from forno.kernels import host, reference
from forno.kernels.devices.cpu import CpuDevice
from forno.server.config import Config, CudaSettings, ModelSettings, PreprocessSettings
from forno.server.config.base import MAX_PIXELS
from forno.server.endpoints.settings import ImageInput
from forno.server.engines import onnx_cuda
from forno.server.engines.processed import ProcessedEngine
from forno.server.errors import ConfigError, InvalidArgument
from forno.server.processing import plan

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET: dict[str, Any] = {"mean": list(MEAN), "std": list(STD)}
SCALE, BIAS = [1 / 255 / std for std in STD], [-mean / std for mean, std in zip(MEAN, STD, strict=True)]


def images(seed: int, *sizes: tuple[int, int], channels: int = 3) -> list[Any]:
    made = np.random.default_rng(seed)
    return [made.integers(0, 256, (1, *size, channels), np.uint8) for size in sizes]


class TestOnTheCpu:
    @settings(max_examples=60)
    @given(
        size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
        to=st.tuples(st.integers(1, 19), st.integers(1, 19)),
        more=st.tuples(st.integers(0, 7), st.integers(0, 9)),
        last=st.booleans(),
        dtype=st.sampled_from(["float16", "float32"]),
        seed=st.integers(0, 99),
    )
    def test_images_are_the_references(
        self, size: tuple[int, int], to: tuple[int, int], more: tuple[int, int], last: bool, dtype: str, seed: int
    ) -> None:
        (image,) = images(seed, size)
        top, left = np.random.default_rng(seed).integers(0, [more[0] + 1, more[1] + 1]).tolist()
        window = (to[0] + more[0], to[1] + more[1], top, left)
        out = np.empty((*to, 3) if last else (3, *to), dtype)
        host.image_to_tensor(image[0], out, window, SCALE, BIAS, channels_last=last)
        want = reference.image_to_tensor([*image], *to, SCALE, BIAS, windows=[window], channels_last=last)
        np.testing.assert_allclose(out, want[0], rtol=0, atol=2e-3 if dtype == "float16" else 1e-5)

    @settings(max_examples=60)
    @given(data=st.data(), rows=st.integers(0, 4), classes=st.integers(1, 40), softmax=st.booleans())
    def test_best_classes_are_the_references(self, data: Any, rows: int, classes: int, softmax: bool) -> None:
        elements = st.floats(-9, 9, width=16) | st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf])
        logits = data.draw(npst.arrays("float16", (rows, classes), elements=elements))
        k = data.draw(st.integers(1, classes))
        want, got = reference.softmax_topk(logits, k, softmax=softmax), host.softmax_topk(logits, k, softmax=softmax)
        np.testing.assert_array_equal(got[1], want[1], strict=True)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-7)


def planned(path: Path, before: dict[str, Any] | None = None, after: dict[str, Any] | None = None) -> Any:
    from forno.server.engines.onnx import OnnxEngine

    settings = ModelSettings(preprocess=before or {}, postprocess=after or {})
    engine = OnnxEngine(path, settings.onnx)
    try:
        return plan(engine.signature, settings.preprocess, settings.postprocess)
    finally:
        engine.close()


def test_the_documented_settings_are_settings() -> None:
    document = Path(__file__).parents[2] / "docs" / "gpu.md"
    blocks = [block.split("```")[0] for block in document.read_text().split("```yaml\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        assert Config.model_validate(yaml.safe_load(block)).models


class TestThePlan:
    def test_the_shorter_side_and_the_middle_are_torchvisions(self, tmp_path: Path) -> None:
        found = planned(onnx_models.seeing(tmp_path / "m.onnx", size=(224, 224)), {"resize": 256, **IMAGENET}).image
        # Resize(256) and CenterCrop(224) of torchvision, for a landscape, a portrait and a square.
        assert found.window(375, 500) == (256, 341, 16, 58)
        assert found.window(500, 333) == (384, 256, 80, 16)
        assert found.window(64, 64) == (256, 256, 16, 16)
        assert found.scale == pytest.approx(SCALE)
        assert found.bias == pytest.approx(BIAS)

    def test_nothing_asked_for_is_nothing_done(self, tmp_path: Path) -> None:
        assert planned(onnx_models.seeing(tmp_path / "m.onnx")) is None

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            ({"tensor": "picture"}, {}, r"preprocess\.tensor is 'picture', but the model's inputs are 'image'"),
            ({"mean": [1, 2]}, {}, r"preprocess\.mean has 2 numbers, expected one, or one for each of 3 channels"),
            (
                {"resize": 5},
                {},
                r"preprocess\.resize is 5, but 'image' is float32\[\?, 3, 6, 5\]: nothing could be cropped",
            ),
            ({"layout": "NHWC"}, {}, "5 channels in NHWC, expected 1 or 3"),
            ({}, {"top_k": 8}, r"postprocess\.top_k is 8, but 'logits' is float32\[\?, 7\]: 7 classes"),
            ({}, {"top_k": 1, "tensor": "x"}, "but the model's outputs are 'logits'"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path: Path, before: Any, after: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            planned(onnx_models.seeing(tmp_path / "m.onnx"), before, after)

    def test_rows_of_other_things_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"preprocess: 'x' is float32\[\?, 8\], expected rows of images"):
            planned(onnx_models.mlp(tmp_path / "m.onnx"), {"mean": 0.5})

    def test_padding_is_another_matter(self) -> None:
        with pytest.raises(ValueError, match="goes together with neither"):
            ModelSettings(padding="auto", postprocess={"top_k": 3})


def wanted(path: Path, pictures: list[Any], to: tuple[int, int], k: int, **ways: Any) -> tuple[Any, Any]:
    """What one after another gives, by the references."""
    rows = np.concatenate(pictures) if len({each.shape for each in pictures}) == 1 else [each[0] for each in pictures]
    tensor = reference.image_to_tensor(list(rows), *to, SCALE, BIAS, **ways)
    return reference.softmax_topk(plain(path, tensor)[0], k, softmax=True)


@pytest.fixture(params=["cpu", pytest.param("kernels", marks=needs_compiler)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where a model runs: on the CPU, or as on a GPU, with the kernels and streams of the CPU's device."""
    device = CpuDevice(runtime_memory=True, choose=random.Random(3).choice)
    monkeypatch.setattr(onnx_cuda, "open_device", lambda name, ordinal: device)
    yield "cpu" if request.param == "cpu" else "cuda"
    assert not any(device.statistics().values())


class TestAModel:
    def live(self, path: Path, check: Any, **settings: Any) -> None:
        async def live() -> None:
            model = made(path, **settings)
            await model.load()
            try:
                await check(model)
            finally:
                await model.close(1)

        asyncio.run(live())

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("allowed_rows", [(), (1, 4, 8)])
    @pytest.mark.parametrize("instances", [1, 3])
    def test_images_of_any_size_run_together(
        self, tmp_path: Path, place: str, last: bool, allowed_rows: Any, instances: int
    ) -> None:
        path = onnx_models.seeing(tmp_path / "m.onnx", last=last)
        pictures = images(1, *[(3 + number, 40 - number) for number in range(30)])
        values, classes = wanted(path, pictures, (6, 5), 3, channels_last=last)

        async def check(model: Any) -> None:
            assert str(model.signature.inputs[0]) == "uint8[?, ?, ?, 3]"
            assert [str(spec) for spec in model.signature.outputs] == ["float32[?, 3]", "int32[?, 3]"]
            assert [spec.name for spec in model.signature.outputs] == ["logits", "logits_classes"]
            got = await asyncio.gather(*[ask(model, image=picture) for picture in pictures])
            np.testing.assert_array_equal(np.concatenate([best for _, best in got]), classes)
            np.testing.assert_allclose(np.concatenate([value for value, _ in got]), values, rtol=1e-4, atol=1e-6)
            (value, best) = await ask(model, image=np.concatenate(images(2, (9, 9), (9, 9))))
            assert value.shape == best.shape == (2, 3)

        self.live(
            path, check, device=place, instances=instances, padding={"allowed_rows": allowed_rows},
            preprocess=IMAGENET, postprocess={"top_k": 3, "softmax": True},
        )  # fmt: skip

    def test_crops_and_half_precision(self, tmp_path: Path, place: str) -> None:
        path = onnx_models.seeing(tmp_path / "m.onnx", half=True)
        pictures = images(5, (20, 31), (12, 10))
        windows = [(8, 12, 1, 4), (9, 8, 2, 2)]  # the shorter side is 8
        tensor = reference.image_to_tensor(
            [each[0] for each in pictures], 6, 5, SCALE, BIAS, windows=windows, dtype="float16"
        )
        want = plain(path, tensor)[0].astype(np.float32)

        async def check(model: Any) -> None:
            got = await asyncio.gather(*[ask(model, image=picture) for picture in pictures])
            np.testing.assert_allclose(np.concatenate([y for (y,) in got]), want, rtol=1e-2, atol=2e-2)

        self.live(path, check, device=place, preprocess={**IMAGENET, "resize": 8})

    def test_the_best_of_a_model_that_sees_nothing(self, tmp_path: Path, place: str) -> None:
        path = onnx_models.mlp(tmp_path / "m.onnx")
        x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
        want = reference.softmax_topk(plain(path, x)[0], 2, softmax=False)

        async def check(model: Any) -> None:
            got = await ask(model, x=x)
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5)

        self.live(path, check, device=place, postprocess={"top_k": 2})

    @pytest.mark.parametrize(
        ("size", "words"),
        [
            ((0, 5), "0 x 5, expected sides of 1 to 32767"),
            ((5, 0), "5 x 0, expected sides of 1 to 32767"),
            ((1, 32768), "1 x 32768, expected sides of 1 to 32767"),
            ((2, 30000), "2 x 30000 would be longer than 32767"),
            ((9, 6667), r"9 x 6667, 60003 pixels, expected at most 60000 \(preprocess.max_pixels\)"),
        ],
    )
    def test_impossible_images_are_refused_alone(
        self, tmp_path: Path, place: str, size: tuple[int, int], words: str
    ) -> None:
        path = onnx_models.seeing(tmp_path / "m.onnx")

        async def check(model: Any) -> None:
            fine = [ask(model, image=np.zeros((1, *side, 3), np.uint8)) for side in ((4, 4), (200, 300))]
            with pytest.raises(InvalidArgument, match=f"input 'image': images of {words}") as caught:
                ask(model, image=np.zeros((2, *size, 3), np.uint8))
            assert caught.value.field == "inputs[image].shape"
            assert [len(y) for (y,) in await asyncio.gather(*fine)] == [1, 1]

        self.live(path, check, device=place, preprocess={"resize": 6, "max_pixels": 60_000, **IMAGENET})

    def test_images_are_bounded_as_those_of_endpoints(self) -> None:
        bounds = (PreprocessSettings().max_pixels, ImageInput(codec="image").max_pixels)
        assert bounds == (MAX_PIXELS, MAX_PIXELS)


@needs_compiler
def test_only_bytes_go_in_and_only_the_best_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Counting(runtime_memory=True)
    monkeypatch.setattr(onnx_cuda, "open_device", lambda name, ordinal: device)
    path = onnx_models.seeing(tmp_path / "m.onnx", size=(64, 64), classes=1000)

    async def live() -> None:
        model = made(path, device="cuda", preprocess=IMAGENET, postprocess={"top_k": 5})
        await model.load()
        device.copies.clear()
        await ask(model, image=images(1, (20, 30))[0])
        await model.close(1)

    asyncio.run(live())
    image_bytes, offsets_bytes, ways_bytes = 20 * 30 * 3, 8, 24
    assert device.copies == [
        ("in", -(-image_bytes // 256) * 256 + -(-offsets_bytes // 256) * 256 + ways_bytes),  # 2.3 kB; floats: 49 kB
        ("out", 256 + 5 * 4),  # all scores: 4 kB
    ]


@needs_compiler
def test_pictures_of_all_sizes_share_the_graph_of_their_slot(tmp_path: Path) -> None:
    path = onnx_models.seeing(tmp_path / "m.onnx")
    inner = onnx_cuda.OnnxCudaEngine(path, CudaSettings(graphs=True), CpuDevice(runtime_memory=True))
    settings = ModelSettings(preprocess=IMAGENET, postprocess={"top_k": 2, "softmax": True})
    answers(inner, inner.new_slot(1), (np.zeros((1, 3, 6, 5), np.float32),))  # the proof, on the thread that opened it
    engine = ProcessedEngine(inner, plan(inner.signature, settings.preprocess, settings.postprocess))
    slots = [engine.new_slot(1) for _ in range(2)]
    pictures = images(3, (6, 5), (200, 300), (900, 70), (3, 4))  # for which the slabs of their bytes have to grow

    def serve() -> None:
        for slot in slots:
            for picture in pictures:
                values, classes = answers(engine, slot, (picture,))
                want = wanted(path, [picture], (6, 5), 2)
                np.testing.assert_allclose(values, want[0], rtol=1e-4, atol=1e-6)
                np.testing.assert_array_equal(classes, want[1])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve).result()
    assert len(inner._graphs) == len(slots)
    engine.close()
