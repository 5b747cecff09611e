"""What `bench.gpu` measures: models of real shapes with random weights, the rows that they are asked for, and settings.

`resnet50`, `-fp16` and `-uint8`: the same network on float32, on float16, and on float16 made of pictures by the
server's own kernels, with the five best classes as the answer; `-tensorrt`: that by TensorRT, with CUDA graphs, of a
plan that is built first. `minilm`: six layers of 384 on 128 tokens, as all-MiniLM-L6 has, pooled. Those with `small`
are their like for seconds on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.models import IR_VERSION, OPSET, ROW_SHAPES, kept, path_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

_IMAGES: dict[str, Any] = {
    "preprocess": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "postprocess": {"top_k": 5, "softmax": True},
}


@dataclass(frozen=True)
class Subject:
    """One model as it is measured."""

    path: Callable[[], Path]
    rows: Callable[[int], Array]  # what callers send: so many rows
    own_rows: Callable[[int], Array] | None = None  # what the runtime alone is given, where that is something else
    settings: dict[str, Any] = field(default_factory=dict)


def _floats(shape: tuple[int, ...], dtype: str) -> Callable[[int], Array]:
    return lambda rows: np.random.default_rng(1).standard_normal((rows, *shape)).astype(dtype)


def _whole(shape: tuple[int, ...], dtype: str, below: int) -> Callable[[int], Array]:
    return lambda rows: np.random.default_rng(1).integers(0, below, (rows, *shape)).astype(dtype)


def _half(name: str) -> Path:
    """The model in float16, inputs and outputs too."""

    def make() -> Any:
        import onnx  # noqa: PLC0415
        from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

        return convert_float_to_float16(onnx.load(path_of(name)))

    return kept(f"{name}-fp16", make)


def _small_vision() -> Path:
    """A convolution, pooling and a linear layer: float32 [rows, 3, 32, 32] to 10 scores."""

    def make() -> Any:
        from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

        random = np.random.default_rng(5)
        weights = {"k": random.standard_normal((8, 3, 3, 3)) / 5, "w": random.standard_normal((8, 10))}
        nodes = [
            helper.make_node("Conv", ["x", "k"], ["c"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])
        constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "small_vision", [x], [y], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    return kept("vision-small", make)


def _encoder(name: str, *, layers: int, width: int, heads: int, tokens: int, vocabulary: int) -> Path:
    """Layers of attention and feed-forward on token numbers int64 [rows, tokens], and the mean over tokens."""

    def make() -> Any:
        from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

        random = np.random.default_rng(6)
        nodes: list[Any] = []
        constants: dict[str, Any] = {}

        def constant(value: Any) -> str:
            constants[f"c{len(constants)}"] = np.asarray(value)
            return f"c{len(constants) - 1}"

        def weight(*shape: int) -> str:
            return constant((random.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32))

        def add(operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
            names = [f"n{len(nodes)}_{number}" for number in range(outputs)]
            nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
            return names if outputs > 1 else names[0]

        def normal(x: str) -> str:
            ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
            return str(add("LayerNormalization", x, constant(ones), constant(zeros), axis=-1))

        def number(value: float) -> str:
            return constant(np.float32(value))

        split = constant(np.array([0, tokens, heads, width // heads]))
        joined = constant(np.array([0, tokens, width]))
        x = normal(add("Add", add("Gather", weight(vocabulary, width), "x"), weight(tokens, width)))
        for _ in range(layers):
            parts = add("Split", add("MatMul", x, weight(width, 3 * width)), outputs=3, axis=-1)
            q, k, v = [add("Reshape", part, split) for part in parts]
            q, v = [add("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v)]
            k = add("Transpose", k, perm=[0, 2, 3, 1])
            scores = add("Mul", add("MatMul", q, k), number((width // heads) ** -0.5))
            seen = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
            x = normal(add("Add", x, add("MatMul", add("Reshape", seen, joined), weight(width, width))))
            h = add("MatMul", x, weight(width, 4 * width))
            h = add("Mul", h, add("Add", add("Erf", add("Mul", h, number(math.sqrt(0.5)))), number(1)))
            h = add("Mul", h, number(0.5))
            x = normal(add("Add", x, add("MatMul", h, weight(4 * width, width))))
        nodes.append(helper.make_node("ReduceMean", [x], ["y"], axes=[1], keepdims=0))
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", tokens])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    return kept(name, make)


_SIZE = ROW_SHAPES["resnet50"]
SUBJECTS = {
    "tiny": Subject(lambda: path_of("tiny"), _floats(ROW_SHAPES["tiny"], "f4")),
    "resnet50": Subject(lambda: path_of("resnet50"), _floats(_SIZE, "f4")),
    "resnet50-fp16": Subject(lambda: _half("resnet50"), _floats(_SIZE, "f2")),
    "resnet50-uint8": Subject(
        lambda: _half("resnet50"), _whole((224, 224, 3), "u1", 256), _floats(_SIZE, "f2"), _IMAGES
    ),
    "small-uint8": Subject(
        _small_vision,
        _whole((40, 40, 3), "u1", 256),
        _floats((3, 32, 32), "f4"),
        {**_IMAGES, "postprocess": {"top_k": 1}},
    ),
    "resnet50-uint8-tensorrt": Subject(
        lambda: _half("resnet50"),
        _whole((224, 224, 3), "u1", 256),
        _floats(_SIZE, "f2"),
        {
            **_IMAGES,
            "engine": "tensorrt",
            "cuda": {"graphs": True},
            "padding": {"allowed_rows": [2**n for n in range(8)]},
        },
    ),
    "minilm": Subject(
        lambda: _encoder("minilm", layers=6, width=384, heads=12, tokens=128, vocabulary=30522),
        _whole((128,), "i8", 30522),
    ),
    "small-minilm": Subject(
        lambda: _encoder("minilm-small", layers=1, width=32, heads=2, tokens=8, vocabulary=100), _whole((8,), "i8", 100)
    ),
}
