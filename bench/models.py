"""The two models that are measured, made on first use: seeded random weights, real shapes, a free batch axis.

`tiny`: a multi-layer perceptron 64-64-10 with softmax, where everything but the model is what costs.
`resnet50`: the architecture of ResNet-50 (version 1.5, batch normalisation folded in), where the model is
what costs.
Both take `x` and give `y`, float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Array = np.ndarray[Any, np.dtype[Any]]

CACHE = Path(__file__).parent / ".cache"
ROW_SHAPES: dict[str, tuple[int, ...]] = {"tiny": (64,), "resnet50": (3, 224, 224)}
OPSET = 17
IR_VERSION = 8
# blocks, width, stride of the four stages of ResNet-50
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))


@dataclass
class _Graph:
    """Nodes and weights of a model in the making."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Appends a node.

        Returns:
            The name of its output.
        """
        from onnx import helper  # noqa: PLC0415  (only making a model needs it)

        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def weight(self, shape: tuple[int, ...], scale: float) -> str:
        """Adds normally distributed weights; a scale of 0 makes a bias of zeros."""
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.random.standard_normal(shape) * scale).astype(np.float32)
        return name

    def linear(self, x: str, fan_in: int, fan_out: int, output: str = "") -> str:
        """A fully connected layer."""
        weight = self.weight((fan_in, fan_out), fan_in**-0.5)
        return self.add("Gemm", x, weight, self.weight((fan_out,), 0), output=output)

    def conv(self, x: str, sizes: tuple[int, int], kernel: int, stride: int = 1, gain: float = 1.0) -> str:
        """A convolution with bias that keeps the picture's size up to its stride."""
        fan_in, fan_out = sizes
        scale = gain * (2.0 / (fan_in * kernel * kernel)) ** 0.5
        weight = self.weight((fan_out, fan_in, kernel, kernel), scale)
        return self.add(
            "Conv",
            x,
            weight,
            self.weight((fan_out,), 0),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )


def _tiny(graph: _Graph) -> int:
    hidden = graph.add("Relu", graph.linear("x", 64, 64))
    graph.add("Softmax", graph.linear(hidden, 64, 10), output="y", axis=1)
    return 10


def _resnet50(graph: _Graph) -> int:
    x = graph.add("Relu", graph.conv("x", (3, 64), 7, 2))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for blocks, width, first_stride in STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = graph.add("Relu", graph.conv(x, (channels, width), 1))
            y = graph.add("Relu", graph.conv(y, (width, width), 3, stride))
            # gains below 1 keep the sum of both ways from growing through 16 blocks of random weights
            y = graph.conv(y, (width, width * 4), 1, gain=0.3)
            way = graph.conv(x, (channels, width * 4), 1, stride, gain=0.7) if block == 0 else x
            x = graph.add("Relu", graph.add("Add", y, way))
            channels = width * 4
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x), axis=1)
    graph.linear(x, channels, 1000, output="y")
    return 1000


MAKERS = {"tiny": _tiny, "resnet50": _resnet50}


def path_of(name: str) -> Path:
    """The file of "tiny" or "resnet50"."""
    return kept(name, lambda: _make(name))


def kept(name: str, make: Callable[[], onnx.ModelProto]) -> Path:
    """The file of a model, made where it is absent.

    Args:
        name: Of the file.
        make: Makes the model; what it imports of `onnx`, a cached model does not need.
    """
    path = CACHE / f"{name}.onnx"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(make().SerializeToString())
        partial.rename(path)
    return path


def _make(name: str) -> onnx.ModelProto:
    from onnx import TensorProto, checker, helper, numpy_helper  # noqa: PLC0415

    graph = _Graph(np.random.default_rng(7))
    width = MAKERS[name](graph)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *ROW_SHAPES[name]])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
            [numpy_helper.from_array(value, key) for key, value in graph.weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model)
    return model


def rows_of(name: str, rows: int, seed: int = 42) -> Array:
    """Seeded input rows of a model."""
    random = np.random.default_rng(seed)
    return random.standard_normal((rows, *ROW_SHAPES[name])).astype(np.float32)
