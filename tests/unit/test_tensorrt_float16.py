"""Models become float16 for TensorRT 11: inputs and outputs stay, and answers are within 0.002 of their largest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bench.gpu_models import SUBJECTS
from onnx import TensorProto as Type
from onnx import helper, numpy_helper
from onnxruntime.transformers import float16
from tests.unit import onnx_models, plans
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers, normal
from tests.unit.test_tensorrt_build import Bench
from tests.unit.test_tensorrt_refit import seen

from forno.server.config import ModelSettings
from forno.server.engines import open_engine, tensorrt
from forno.server.engines.tensorrt.float16 import convert
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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
    converted = convert(model, tmp_path / "converted")
    for got, want in zip(exactly(converted, rows()), exactly(model, rows()), strict=True):
        close(got, want)
    if "w" in (weights := {each.name: each.data_type for each in onnx.load(converted).graph.initializer}):
        assert weights["w"] == Type.FLOAT16


def test_what_soon_leaves_float16_is_computed_in_float32(tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(convert(normalized(tmp_path / "model.onnx"), tmp_path / "converted")), strict_mode=True
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
    converted = convert(model, tmp_path / "converted")
    close(plain(converted, normal(3, 8))[0], plain(model, normal(3, 8))[0])


def test_weights_beside_a_model_are_converted(tmp_path: Path) -> None:
    model = onnx_models.mlp(tmp_path / "m.onnx")
    for folder in ("beside", "converted"):
        (tmp_path / folder).mkdir()
    onnx.save(
        onnx.load(model), tmp_path / "beside" / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    before = {path: path.read_bytes() for path in (tmp_path / "beside").iterdir()}
    converted = convert(tmp_path / "beside" / "m.onnx", tmp_path / "converted")
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
        ConfigError, match=r"precision is 'fp16', and the model cannot be converted to it: .*AutoCast"
    ) as caught:
        convert(model, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"is not installed \(.*onnx.*\): pip install 'forno\[gpu,tensorrt\]'"):
        convert(model, tmp_path)


def test_what_a_killed_conversion_left_is_removed(bench: Bench, tmp_path: Path) -> None:
    bench.folder.mkdir(exist_ok=True)
    left = bench.folder / ".building-17abc"
    left.mkdir()
    (left / "weights.bin").write_bytes(b"1")
    bench.plans().ready()
    assert bench.files() == {"m", "timings", "build"}
