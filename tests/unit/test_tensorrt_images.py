"""Images before a TensorRT plan and best classes after it: the kernels and slots are real, the plan is the fake's."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bench import gpu_engine
from bench.gpu_models import SUBJECTS
from tests.compiling import needs_compiler
from tests.unit import onnx_models, plans
from tests.unit.devices import Counting
from tests.unit.test_engines import plain
from tests.unit.test_model import ask
from tests.unit.test_processing import BIAS, IMAGENET, SCALE, images, wanted
from tests.unit.test_tensorrt import live

from forno.kernels import library, reference
from forno.kernels.devices import DeviceUnavailable
from forno.server.engines import tensorrt
from forno.server.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_compiler

BEST: dict[str, Any] = {"engine": "tensorrt", "preprocess": IMAGENET, "postprocess": {"top_k": 3, "softmax": True}}
PICTURES = images(1, *[(3 + number, 40 - number) for number in range(20)])


class Watched(Counting, plans.StrictDevice):
    """Takes kernels for the CPU, for the fake GPU that it is, and counts how many run."""

    launched = 0

    def load_module(self, binary: bytes) -> int:
        assert binary == b"for sm_90"
        return super().load_module(library.kernels_for("cpu"))

    def launch(self, *to_do: Any) -> None:
        assert not self.captures()  # what a kernel is told differs from batch to batch
        self.launched += 1
        super().launch(*to_do)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made, build = Watched(choose=random.Random(3).choice), library.kernels_for
    plans.installed(monkeypatch, made)
    monkeypatch.setattr(library, "kernels_for", lambda name, *more: b"for sm_90" if name == "sm_90" else build(name))
    yield made
    plans.uninstalled()
    assert not any(made.statistics().values())


def seeing(tmp_path: Path, *rows: tuple[int, int, int], **more: Any) -> tuple[Path, Path]:
    """A plan, with a profile of least, best and most rows each, and the model that it was made of."""
    model = onnx_models.seeing(tmp_path / "m.onnx", **more)
    shape = (6, 5, 3) if more.get("last") else (3, 6, 5)
    ranges = [{"image": [[count, *shape] for count in counts]} for counts in (rows or [(1, 4, 8)])]
    return plans.write(tmp_path / "m.plan", model, *ranges), model


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rows", [[(1, 4, 8)], [(4, 4, 4), (8, 8, 8)]])
def test_pictures_of_any_size_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched, graphs: bool, last: bool, rows: Any
) -> None:
    plan, model = seeing(tmp_path, *rows, last=last)
    values, classes = wanted(model, PICTURES, (6, 5), 3, channels_last=last)

    async def check(served: Any) -> None:
        assert [str(spec) for spec in served.signature.inputs] == ["uint8[?, ?, ?, 3]"]
        assert served.signature.inputs[0].dim_names == ("", "height", "width", "")
        assert [spec.name for spec in served.signature.outputs] == ["logits", "logits_classes"]
        assert all(len(spec.dim_names) == 2 for spec in served.signature.outputs)
        for _ in range(3):  # with graphs, the later ones are replayed, on pictures of other sizes
            got = await asyncio.gather(*[ask(served, image=picture) for picture in PICTURES])
            np.testing.assert_array_equal(np.concatenate([best for _, best in got]), classes)
            np.testing.assert_allclose(np.concatenate([value for value, _ in got]), values, rtol=1e-4, atol=1e-6)
        assert bool(device.replays) == graphs
        assert device.launched

    live(monkeypatch, device, plan, check, **BEST, instances=2, cuda={"graphs": graphs}, batching={"max_rows": 8})


def test_half_precision_and_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched) -> None:
    plan, model = seeing(tmp_path, half=True)
    pictures, windows = images(5, (20, 31), (12, 10)), [(8, 12, 1, 4), (9, 8, 2, 2)]  # the shorter side is 8
    tensor = reference.image_to_tensor(
        [each[0] for each in pictures], 6, 5, SCALE, BIAS, windows=windows, dtype="float16"
    )
    want = np.sort(plain(model, tensor)[0].astype(np.float32))[:, :-3:-1]

    async def check(served: Any) -> None:
        got = await asyncio.gather(*[ask(served, image=picture) for picture in pictures])
        np.testing.assert_allclose(np.concatenate([y for y, _ in got]), want, rtol=1e-2, atol=2e-2)

    live(
        monkeypatch, device, plan, check, engine="tensorrt", preprocess={**IMAGENET, "resize": 8},
        postprocess={"top_k": 2},
    )  # fmt: skip


def test_only_bytes_go_in_and_only_the_best_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched
) -> None:
    model = onnx_models.seeing(tmp_path / "m.onnx", size=(64, 64), classes=1000)
    plan = plans.write(tmp_path / "m.plan", model, {"image": [[count, 3, 64, 64] for count in (1, 4, 8)]})

    async def check(served: Any) -> None:
        device.copies.clear()
        device.launched = 0
        await ask(served, image=images(1, (20, 30))[0])
        image_bytes, offsets_bytes, ways_bytes = 20 * 30 * 3, 8, 24
        assert device.copies == [
            ("in", -(-image_bytes // 256) * 256 + -(-offsets_bytes // 256) * 256 + ways_bytes),  # floats: 49 kB
            ("out", 256 + 3 * 4),  # all scores: 4 kB
        ]
        assert device.launched == 2

    live(monkeypatch, device, plan, check, **BEST)


def beside(tmp_path: Path) -> tuple[Path, Path]:
    """A plan for images with 2 to 4 other numbers beside each."""
    model = onnx_models.seeing_beside(tmp_path / "m.onnx")
    ranges = {"image": [[rows, 3, 6, 5] for rows in (1, 4, 8)], "others": [[1, 2], [4, 3], [8, 4]]}
    return plans.write(tmp_path / "m.plan", model, ranges), model


BESIDE: dict[str, Any] = {
    "engine": "tensorrt",
    "preprocess": {**IMAGENET, "tensor": "image"},
    "postprocess": {"top_k": 2, "tensor": "logits"},
}


@pytest.mark.parametrize("graphs", [False, True])
def test_what_lies_beside_the_pictures_decides_what_runs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched, graphs: bool
) -> None:
    plan, model = beside(tmp_path)
    sizes = [2 + number % 3 for number in range(len(PICTURES))]

    def check_one(number: int, got: Any) -> None:
        others = np.full((1, sizes[number]), number, np.float32)
        tensor = reference.image_to_tensor([PICTURES[number][0]], 6, 5, SCALE, BIAS)
        logits, same = plain(model, others, tensor)
        values, classes = reference.softmax_topk(logits, 2, softmax=False)
        np.testing.assert_allclose(got[0], values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[1], same)
        np.testing.assert_array_equal(got[2], classes)

    async def check(served: Any) -> None:
        for _ in range(3):
            device.launched = 0
            asked = [
                ask(served, image=picture, others=np.full((1, sizes[number]), number, np.float32))
                for number, picture in enumerate(PICTURES)
            ]
            for number, got in enumerate(await asyncio.gather(*asked)):
                check_one(number, got)
            assert device.launched == 2 * 3  # a batch for each of three sizes, whatever those of the pictures
        device.launched = 0
        many = [np.repeat(PICTURES[number], rows, axis=0) for number, rows in enumerate((11, 5))]
        await asyncio.gather(*[ask(served, image=each, others=np.zeros((len(each), 2), np.float32)) for each in many])
        assert device.launched == 2 * 2  # the last 3 rows of the one go with the other

    live(
        monkeypatch, device, plan, check, **BESIDE, cuda={"graphs": graphs},
        batching={"max_rows": 8, "max_delay_us": 20_000},
    )  # fmt: skip
    assert bool(device.replays) == graphs


@pytest.mark.parametrize("rows", [1, 11])
def test_what_no_profile_holds_is_refused_before_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched, rows: int
) -> None:
    plan, _ = beside(tmp_path)
    pictures = np.repeat(PICTURES[0], rows, axis=0)

    async def check(served: Any) -> None:
        good = ask(served, image=pictures, others=np.zeros((rows, 4), np.float32))
        with pytest.raises(InvalidArgument, match=r"input 'others': .* not built for shape \[5\], expected \[2\] to"):
            ask(served, image=pictures, others=np.zeros((rows, 5), np.float32))
        with pytest.raises(InvalidArgument, match=r"input 'image': images of 0 x 5, expected sides of 1 to 32767"):
            ask(served, image=pictures[:, :0, :5], others=np.zeros((rows, 4), np.float32))
        assert [len(array) for array in await good] == [rows] * 3

    live(monkeypatch, device, plan, check, **BESIDE)


@pytest.mark.parametrize("graphs", [False, True])
def test_scores_beside_an_output_whose_size_only_the_data_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched, graphs: bool
) -> None:
    model = onnx_models.finding(tmp_path / "m.onnx")
    plan = plans.write(tmp_path / "m.plan", model, {})

    async def check(served: Any) -> None:
        assert not served.signature.batched
        for picture in PICTURES[:6]:
            values, found, classes = await ask(served, image=picture)
            logits, want = plain(model, reference.image_to_tensor([picture[0]], 6, 5, SCALE, BIAS))
            best, numbers = reference.softmax_topk(logits, 2, softmax=False)
            np.testing.assert_allclose(values, best, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(classes, numbers)
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)

    live(monkeypatch, device, plan, check, **{**BESIDE, "preprocess": IMAGENET}, cuda={"graphs": graphs})


def test_each_of_several_gpus_has_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched) -> None:
    plan, model = seeing(tmp_path)
    values, classes = wanted(model, PICTURES, (6, 5), 3)

    async def check(served: Any) -> None:
        assert device.statistics()["modules"] == 2
        got = await asyncio.gather(*[ask(served, image=picture) for picture in PICTURES])
        np.testing.assert_array_equal(np.concatenate([best for _, best in got]), classes)
        np.testing.assert_allclose(np.concatenate([value for value, _ in got]), values, rtol=1e-4, atol=1e-6)

    live(monkeypatch, device, plan, check, **BEST, devices=[0, 1])


def test_the_benchmark_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched) -> None:
    plan, _ = seeing(tmp_path)
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: device)
    rows = np.concatenate(images(1, *[(20, 30)] * 8))
    settings = SUBJECTS["resnet50-uint8-tensorrt"].settings
    found = asyncio.run(gpu_engine.ours(plan, "cuda", rows, 0.02, 2, 8, settings))
    assert found["offline_rows_per_s"] > 0
    assert found["loads"]
    assert device.replays


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"postprocess": {"top_k": 8}}, r"postprocess\.top_k is 8, but 'logits' is float32\[\?, 7\]: 7 classes"),
        ({"preprocess": {"layout": "NHWC"}}, "5 channels in NHWC, expected 1 or 3"),
        ({"preprocess": {"resize": 5}}, r"preprocess\.resize is 5, .*: nothing could be cropped"),
    ],
)
def test_what_does_not_fit_the_plan_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched, settings: Any, complaint: str
) -> None:
    plan, _ = seeing(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        live(monkeypatch, device, plan, None, engine="tensorrt", **settings)


def test_without_its_kernels_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Watched
) -> None:
    def missing(*_: Any) -> bytes:
        raise DeviceUnavailable("the kernels need NVRTC; install it: pip install 'forno[gpu]'")

    monkeypatch.setattr(library, "kernels_for", missing)
    plan, _ = seeing(tmp_path)
    with pytest.raises(ConfigError, match=r"its kernels cannot be had: the kernels need NVRTC; install it") as caught:
        live(monkeypatch, device, plan, None, **BEST)
    assert "\n" not in str(caught.value)
