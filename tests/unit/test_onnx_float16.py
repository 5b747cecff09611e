"""Models become float16: inputs and outputs stay, and answers are within 0.002 of their largest."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bench.gpu_models import SUBJECTS
from onnx import TensorProto as Type
from onnx import helper, numpy_helper
from onnxruntime.transformers import float16
from tests.compiling import needs_compiler
from tests.unit import onnx_models, plans
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made
from tests.unit.test_onnx_cuda import answers, normal
from tests.unit.test_processing import IMAGENET, images, wanted
from tests.unit.test_tensorrt_build import Bench
from tests.unit.test_tensorrt_refit import seen

from forno.kernels.devices.cpu import CpuDevice
from forno.server.config import ModelSettings
from forno.server.engines import onnx_cuda, onnx_float16, open_engine, tensorrt
from forno.server.engines.onnx_float16 import convert, converted
from forno.server.errors import ConfigError, NotReady

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SETTING = "cuda.precision"
TOLERANCE = 0.002
"""Of the largest answer; float16 has steps of a thousandth."""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: bench.device)
    yield bench
    plans.uninstalled()


def normalized(path: Path) -> Path:
    """A layer normalization that is written out: squares beyond float16, and an epsilon below it."""
    return onnx_models.save(
        path,
        [("x", Type.FLOAT, ["n", 8])],
        [("y", Type.FLOAT, ["n", 8])],
        [
            helper.make_node("ReduceMean", ["x", "last"], ["m"]),
            helper.make_node("Sub", ["x", "m"], ["d"]),
            helper.make_node("Pow", ["d", "two"], ["s"]),
            helper.make_node("ReduceMean", ["s", "last"], ["v"]),
            helper.make_node("Add", ["v", "epsilon"], ["w"]),
            helper.make_node("Sqrt", ["w"], ["r"]),
            helper.make_node("Div", ["d", "r"], ["y"]),
        ],
        {"last": np.array([1]), "two": np.float32(2), "epsilon": np.float32(1e-12)},
    )


def summed(path: Path) -> Path:
    """A sum beyond float16 that is the answer itself, and branches that take what was summed."""
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["r", f"by{operator}"], [operator])],
            operator,
            [],
            [helper.make_tensor_value_info(operator, Type.FLOAT, ["n", 8])],
            [numpy_helper.from_array(np.float32(1 / 1024), f"by{operator}")],
        )
        for operator in ("Mul", "Div")
    ]
    return onnx_models.save(
        path,
        [("x", Type.FLOAT, ["n", 8])],
        [("s", Type.FLOAT, ["n", 1]), ("y", Type.FLOAT, ["n", 8])],
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("ReduceSum", ["r", "last"], ["s"]),
            helper.make_node("If", ["always"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        {"last": np.array([1]), "always": np.array(True)},
    )


def resized(path: Path) -> Path:
    """Resize's scales are float32 whatever it resizes."""
    return onnx_models.save(
        path,
        [("x", Type.FLOAT, ["n", 1, 4, 4])],
        [("y", Type.FLOAT, ["n", 1, 8, 8])],
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")],
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )


def exactly(model: Path, *inputs: Any) -> list[Any]:
    """Answers of ONNX Runtime in the types that the model says: optimized, it would leave out casts."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    answers: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
    return answers


def close(got: Any, want: Any) -> None:
    assert got.dtype == want.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (onnx_models.mlp, lambda: normal(5, 8)),
        (lambda path: seen(path, seed=1), lambda: normal(3, 3, 4, 4)),
        (normalized, lambda: 3000 * normal(3, 8)),
        (normalized, lambda: normal(3, 8) / 3000),
        (summed, lambda: 30000 * abs(normal(3, 8))),
        (resized, lambda: normal(3, 1, 4, 4)),
        (lambda _: SUBJECTS["small-minilm"].path(), lambda: SUBJECTS["small-minilm"].rows(3)),
        (lambda _: SUBJECTS["small-uint8"].path(), lambda: SUBJECTS["small-uint8"].own_rows(3)),
        pytest.param(lambda _: SUBJECTS["minilm"].path(), lambda: SUBJECTS["minilm"].rows(2), marks=pytest.mark.slow),
        pytest.param(
            lambda _: SUBJECTS["resnet50"].path(), lambda: SUBJECTS["resnet50"].rows(2), marks=pytest.mark.slow
        ),
    ],
)
def test_answers_stay(tmp_path: Path, make: Callable[[Path], Path], rows: Callable[[], Any]) -> None:
    model = make(tmp_path / "model.onnx")
    (tmp_path / "converted").mkdir()
    converted = convert(model, tmp_path / "converted", SETTING)
    for got, want in zip(exactly(converted, rows()), exactly(model, rows()), strict=True):
        close(got, want)
    if "w" in (weights := {each.name: each.data_type for each in onnx.load(converted).graph.initializer}):
        assert weights["w"] == Type.FLOAT16


def test_what_soon_leaves_float16_is_computed_in_float32(tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(convert(normalized(tmp_path / "model.onnx"), tmp_path / "converted", SETTING)), strict_mode=True
    ).graph
    types = {each.name: each.type.tensor_type.elem_type for each in [*graph.value_info, *graph.input, *graph.output]}
    computed = {node.op_type: types[node.output[0]] for node in graph.node if node.op_type != "Cast"}
    exact = dict.fromkeys(["ReduceMean", "Pow", "Add", "Sqrt"], Type.FLOAT)
    assert computed == {**exact, "Sub": Type.FLOAT, "Div": Type.FLOAT16}  # Sub and Add stand beside what may be large
    between = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Cast"}
    for start, end in between.items():
        if types[start] == Type.FLOAT and types.get(between.get(end, "")) == Type.FLOAT:
            pytest.fail(f"{start} is float32, {end} is float16, and {between[end]} is float32 again")


def test_what_a_converter_casts_twice_is_cast_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*given: Any, **options: Any) -> Any:
        """As ONNX Runtime did before 1.32, the newest for GPUs included."""
        made = real(*given, **options)
        made.graph.node.extend([node for node in made.graph.node if node.op_type == "Cast"])
        return made

    real = float16.convert_float_to_float16
    monkeypatch.setattr(float16, "convert_float_to_float16", twice)
    model = normalized(tmp_path / "model.onnx")
    (tmp_path / "converted").mkdir()
    converted = convert(model, tmp_path / "converted", SETTING)
    close(plain(converted, normal(3, 8))[0], plain(model, normal(3, 8))[0])


def test_weights_beside_a_model_are_converted(tmp_path: Path) -> None:
    model = onnx_models.mlp(tmp_path / "m.onnx")
    for folder in ("beside", "converted"):
        (tmp_path / folder).mkdir()
    onnx.save(
        onnx.load(model), tmp_path / "beside" / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    before = {path: path.read_bytes() for path in (tmp_path / "beside").iterdir()}
    converted = convert(tmp_path / "beside" / "m.onnx", tmp_path / "converted", SETTING)
    close(plain(converted, normal(5, 8))[0], plain(model, normal(5, 8))[0])
    assert {each.data_type for each in onnx.load(converted).graph.initializer} == {Type.FLOAT16}
    assert {path: path.read_bytes() for path in (tmp_path / "beside").iterdir()} == before


def test_the_setting_means_the_same_for_tensorrt_11(bench: Bench, tmp_path: Path) -> None:
    settings = {"cache_dir": bench.folder, "precision": "fp16", "refit": True}
    for seed in (1, 2):
        model = seen(tmp_path / f"{seed}.onnx", seed=seed)
        engine = open_engine(model, ModelSettings(engine="tensorrt", tensorrt=settings, batching={"max_rows": 4}))
        assert str(engine.signature.inputs[0]) == "float32[?, 3, 4, 4]"
        (got,) = answers(engine, engine.new_slot(4), (normal(3, 3, 4, 4),))
        close(got, plain(model, normal(3, 3, 4, 4))[0])
        assert (got != plain(model, normal(3, 3, 4, 4))[0]).any()
        engine.close()
        bench.wish(fault="refuse")  # to build: the second takes the plan of the first
    kept = onnx.load_from_string(next(bench.folder.glob("2-*.plan")).read_bytes().partition(b"\n")[2])
    assert {each.data_type for each in kept.graph.initializer} >= {Type.FLOAT16}
    assert bench.files() == {"1", "2", "timings", "build", "structure"}


def test_a_model_that_cannot_be_converted_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"no model")
    with pytest.raises(
        ConfigError, match=r"cuda\.precision is 'fp16', and the model cannot be converted to it: .*AutoCast"
    ) as caught:
        convert(model, tmp_path, SETTING)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"is not installed \(.*onnx.*\): pip install 'forno\[gpu\]'"):
        convert(model, tmp_path, SETTING)


def test_what_a_killed_conversion_left_is_removed(bench: Bench, tmp_path: Path) -> None:
    bench.folder.mkdir(exist_ok=True)
    left = bench.folder / ".building-17abc"
    left.mkdir()
    (left / "weights.bin").write_bytes(b"1")
    bench.plans().ready()
    assert bench.files() == {"m", "timings", "build"}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuDevice]:
    """What ONNX Runtime takes for a GPU."""
    device = CpuDevice(runtime_memory=True, choose=random.Random(1).choice)
    monkeypatch.setattr(onnx_cuda, "open_device", lambda name, ordinal: device)
    yield device
    assert not any(device.statistics().values())


HALF: dict[str, Any] = {"device": "cuda", "cuda": {"precision": "fp16"}}


class TestOnAGpu:
    @pytest.mark.parametrize(
        ("make", "rows", "graphs"),
        [
            (onnx_models.mlp, lambda: normal(4, 8), False),
            (onnx_models.mlp, lambda: normal(4, 8), True),
            (normalized, lambda: 3000 * normal(4, 8), False),
            (
                lambda _: SUBJECTS["small-minilm"].path(),
                lambda: SUBJECTS["small-minilm"].rows(4),
                False,
            ),  # weights beside
        ],
    )
    def test_answers_stay(
        self, tmp_path: Path, gpu: CpuDevice, temporary: Path, make: Any, rows: Callable[[], Any], graphs: bool
    ) -> None:
        path = make(tmp_path / "m.onnx")
        settings = ModelSettings(
            device="cuda", cuda={"precision": "fp16", "graphs": graphs}, padding={"allowed_rows": [1, 4]}
        )
        engine, exact = open_engine(path, settings), open_engine(path, ModelSettings())
        assert not any(temporary.iterdir())
        assert engine.signature == exact.signature
        (want,) = plain(path, rows())
        slots = [engine.new_slot(4), engine.new_slot(4)]
        for slot in (*slots, *slots):  # the first run proves bindings, the others use them
            close(answers(engine, slot, (rows(),))[0], want)
        if make is onnx_models.mlp:
            assert (answers(engine, slots[0], (rows(),))[0] != want).any()
        engine.close()
        exact.close()

    @needs_compiler
    def test_pictures_in_and_best_classes_out(self, tmp_path: Path, gpu: CpuDevice) -> None:
        path = onnx_models.seeing(tmp_path / "m.onnx")
        pictures = images(1, *[(3 + number, 40 - number) for number in range(9)])
        values, classes = wanted(path, pictures, (6, 5), 1)

        async def live() -> None:
            model = made(path, **HALF, preprocess=IMAGENET, postprocess={"top_k": 1, "softmax": True})
            await model.load()
            assert str(model.signature.inputs[0]) == "uint8[?, ?, ?, 3]"
            got = await asyncio.gather(*[ask(model, image=picture) for picture in pictures])
            np.testing.assert_array_equal(np.concatenate([best for _, best in got]), classes)
            np.testing.assert_allclose(np.concatenate([value for value, _ in got]), values, atol=TOLERANCE)
            await model.close(1)

        asyncio.run(live())

    def test_a_model_is_converted_once_for_all_devices(self, tmp_path: Path, gpu: CpuDevice, caplog: Any) -> None:
        path = onnx_models.mlp(tmp_path / "m.onnx")
        with caplog.at_level("INFO", "forno.engine.onnx"):
            engine = open_engine(path, ModelSettings(**HALF, devices=[0, 1]))
        for slot in (engine.new_slot(8), engine.new_slot(8)):
            close(answers(engine, slot, (normal(5, 8),))[0], plain(path, normal(5, 8))[0])
        engine.close()
        assert caplog.text.count("m.onnx: converted to float16 in") == 1

    def test_what_is_wrong_is_told_by_the_models_own_path(
        self, tmp_path: Path, gpu: CpuDevice, temporary: Path
    ) -> None:
        path = onnx_models.one(tmp_path / "m.onnx", "Identity", Type.FLOAT16, ["n", 5])
        with pytest.raises(ConfigError, match="the model has no float32 to be converted; remove the setting") as caught:
            open_engine(path, ModelSettings(**HALF))
        assert str(caught.value).startswith(f"{path}: cuda.precision is 'fp16', and")
        open_ended = onnx_models.one(tmp_path / "open.onnx", "Relu", Type.FLOAT, ["n", "m"])
        graphs = {"cuda": {"precision": "fp16", "graphs": True}, "padding": {"allowed_rows": [1]}}
        with pytest.raises(ConfigError, match=f"^{open_ended}: cuda.graphs needs fixed row shapes"):
            open_engine(open_ended, ModelSettings(**{**HALF, **graphs}))
        assert not any(temporary.iterdir())

    def test_a_gpu_that_is_not_there_is_told_before_anything_is_converted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(onnx_float16, "CONVERTER", None)
        with pytest.raises(ConfigError, match="cuda"):
            open_engine(onnx_models.mlp(tmp_path / "m.onnx"), ModelSettings(**HALF))

    def test_on_the_cpu_it_says_nothing(self, tmp_path: Path) -> None:
        path = onnx_models.mlp(tmp_path / "m.onnx")
        engine = open_engine(path, ModelSettings(cuda=HALF["cuda"]))
        np.testing.assert_array_equal(
            answers(engine, engine.new_slot(5), (normal(5, 8),))[0], plain(path, normal(5, 8))[0]
        )
        engine.close()

    def test_tensorrt_has_a_setting_of_its_own(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"which is for ONNX Runtime, .* set tensorrt\.precision instead"):
            open_engine(onnx_models.mlp(tmp_path / "m.onnx"), ModelSettings(engine="tensorrt", cuda=HALF["cuda"]))


def test_a_conversion_that_crashes_is_one_line(tmp_path: Path, temporary: Path) -> None:
    crash = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with (
        converted(tmp_path / "m.onnx", SETTING, converter=[sys.executable, "-c", crash]) as model,
        pytest.raises(ConfigError, match=r"m\.onnx: the process .* was ended by SIGKILL, as where .*: so far$"),
    ):
        model()
    assert not any(temporary.iterdir())


def test_a_conversion_that_nobody_waits_for_is_given_up(tmp_path: Path, temporary: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    forever = "import time; time.sleep(600)"
    with (
        converted(tmp_path / "m.onnx", SETTING, stopping, [sys.executable, "-c", forever]) as model,
        pytest.raises(NotReady, match=r"m\.onnx: converting it to float16 was given up"),
    ):
        model()
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("type_", [Type.FLOAT16, Type.INT64, Type.DOUBLE])
def test_a_model_without_float32_has_nothing_to_be_converted(tmp_path: Path, type_: int) -> None:
    with pytest.raises(ConfigError, match="the model has no float32 to be converted"):
        convert(onnx_models.one(tmp_path / "m.onnx", "Identity", type_, ["n", 5]), tmp_path, SETTING)


def test_float32_in_a_branch_is_converted(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("Cast", ["x"], ["f"], to=Type.FLOAT),
             helper.make_node(operator, ["f"], ["g"]),
             helper.make_node("Cast", ["g"], ["y"], to=Type.INT64)],
            operator, [], [helper.make_tensor_value_info("y", Type.INT64, ["n", 8])],
        )
        for operator in ("Relu", "Neg")
    ]  # fmt: skip
    model = onnx_models.save(
        tmp_path / "m.onnx",
        [("x", Type.INT64, ["n", 8])],
        [("y", Type.INT64, ["n", 8])],
        [helper.make_node("If", ["always"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        {"always": np.array(True)},
    )
    (tmp_path / "converted").mkdir()
    x = np.arange(16).reshape(2, 8) - 8
    (got,) = exactly(convert(model, tmp_path / "converted", SETTING), x)
    np.testing.assert_array_equal(got, np.maximum(x, 0))
