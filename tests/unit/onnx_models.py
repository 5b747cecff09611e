"""Small ONNX models, each with something that a server can get wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto as Type
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Value = tuple[str, int, Sequence[int | str | None]]


def save(
    path: Path,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
) -> Path:
    """A model of these parts."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def one(path: Path, operator: str, type_: int, dims: Sequence[int | str], **attributes: Any) -> Path:
    """y = operator(x), of the same shape."""
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return save(path, [("x", type_, dims)], [("y", type_, dims)], [node])


def mlp(path: Path) -> Path:
    """relu(x @ w) @ v, rows free: [rows, 8] -> [rows, 3]."""
    random = np.random.default_rng(1)
    return save(
        path,
        [("x", Type.FLOAT, ["rows", 8])],
        [("y", Type.FLOAT, ["rows", 3])],
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ],
        {
            "w": random.standard_normal((8, 16)).astype(np.float32),
            "v": random.standard_normal((16, 3)).astype(np.float32),
        },
    )


def seeing(
    path: Path,
    *,
    size: tuple[int, int] = (6, 5),
    channels: int = 3,
    classes: int = 7,
    last: bool = False,
    half: bool = False,
) -> Path:
    """Logits of images: [rows, channels, *size], or with `last` [rows, *size, channels], times weights."""
    shape = (*size, channels) if last else (channels, *size)
    weights = np.random.default_rng(4).standard_normal((size[0] * size[1] * channels, classes)) / 3
    type_ = Type.FLOAT16 if half else Type.FLOAT
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    outputs = [("logits", type_, ["rows", classes])]
    return save(
        path, [("image", type_, ["rows", *shape])], outputs, nodes, {"w": weights.astype("f2" if half else "f4")}
    )


def seeing_beside(path: Path) -> Path:
    """Logits of images [rows, 3, 6, 5], of which the mean of others, [rows, size], lifts the first; and the others."""
    weights = np.random.default_rng(4).standard_normal((90, 7)).astype(np.float32) / 3
    return save(
        path,
        [("others", Type.FLOAT, ["rows", "size"]), ("image", Type.FLOAT, ["rows", 3, 6, 5])],
        [("logits", Type.FLOAT, ["rows", 7]), ("same", Type.FLOAT, ["rows", "size"])],
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["seen"]),
            helper.make_node("ReduceMean", ["others", "axes"], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", "first"], ["lift"]),
            helper.make_node("Add", ["seen", "lift"], ["logits"]),
            helper.make_node("Identity", ["others"], ["same"]),
        ],
        {"w": weights, "axes": np.array([1]), "first": np.eye(1, 7, dtype=np.float32)},
    )


def finding(path: Path) -> Path:
    """Logits of one image [1, 3, 6, 5], and those of them that are positive: how many is for the image to say."""
    weights = np.random.default_rng(4).standard_normal((90, 7)).astype(np.float32) / 3
    return save(
        path,
        [("image", Type.FLOAT, [1, 3, 6, 5])],
        [("logits", Type.FLOAT, [1, 7]), ("found", Type.FLOAT, ["count"])],
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
            helper.make_node("Greater", ["logits", "zero"], ["above"]),
            helper.make_node("Reshape", ["above", "line"], ["chosen"]),
            helper.make_node("Reshape", ["logits", "line"], ["scores"]),
            helper.make_node("Compress", ["scores", "chosen"], ["found"], axis=0),
        ],
        {"w": weights, "zero": np.float32(0), "line": np.array([7])},
    )


def two_in_two_out(path: Path) -> Path:
    """sum and product of a [n, 4] and a [n, 1]."""
    return save(
        path,
        [("a", Type.FLOAT, ["n", 4]), ("b", Type.FLOAT, ["n", 1])],
        [("sum", Type.FLOAT, ["n", 4]), ("product", Type.FLOAT, ["n", 4])],
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])],
    )


def centered(path: Path) -> Path:
    """x minus its mean over axis 0: the rows are free, but not independent."""
    return save(
        path,
        [("x", Type.FLOAT, ["n", 4])],
        [("y", Type.FLOAT, ["n", 4])],
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        {"axes": np.array([0])},
    )


def filtered(path: Path) -> Path:
    """The rows whose first element is positive: how many come out depends on what they hold."""
    return save(
        path,
        [("x", Type.FLOAT, ["n", 4])],
        [("y", Type.FLOAT, ["m", 4])],
        [
            helper.make_node("Gather", ["x", "first"], ["f"], axis=1),
            helper.make_node("Greater", ["f", "zero"], ["c"]),
            helper.make_node("Compress", ["x", "c"], ["y"], axis=0),
        ],
        {"first": np.array(0), "zero": np.float32(0)},
    )


def noisy(path: Path) -> Path:
    """x plus random numbers."""
    return save(
        path,
        [("x", Type.FLOAT, ["n", 4])],
        [("y", Type.FLOAT, ["n", 4])],
        [
            helper.make_node("RandomNormalLike", ["x"], ["r"]),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ],
    )


def lookup(path: Path, least: int = 0) -> Path:
    """Rows of a table of 4, by indexes of which `least` is the least that it takes."""
    return save(
        path,
        [("x", Type.INT64, ["n"])],
        [("y", Type.FLOAT, ["n", 2])],
        [helper.make_node("Sub", ["x", "least"], ["i"]), helper.make_node("Gather", ["t", "i"], ["y"])],
        {"t": np.arange(8, dtype=np.float32).reshape(4, 2), "least": np.array(least)},
    )


def passed_through(path: Path) -> Path:
    """An input that is an output too: a bound output would stay empty."""
    return save(
        path,
        [("x", Type.FLOAT, ["n", 4])],
        [("x", Type.FLOAT, ["n", 4]), ("y", Type.FLOAT, ["n", 4])],
        [helper.make_node("Neg", ["x"], ["y"])],
    )


def reshaped(path: Path) -> Path:
    """x in a shape that is an input too, and that the file declares as [2, 2] whatever comes."""
    return save(
        path,
        [("x", Type.FLOAT, [4]), ("s", Type.INT64, [2])],
        [("y", Type.FLOAT, [2, 2])],
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
    )


def of_sequence(path: Path) -> Path:
    """Takes a sequence of tensors, which cannot be served."""
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["s"], ["y"])],
        "graph",
        [helper.make_tensor_sequence_value_info("s", Type.FLOAT, None)],
        [helper.make_tensor_value_info("y", Type.INT64, [])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def masked(path: Path, *, pooled_over: str = "mask") -> Path:
    """Embedded tokens: each one on its own, and their mean over what the mask leaves, or over every position.

    tokens, mask: int64 [n, length] -> each: [n, length, 4], mean: [n, 4].
    """
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["each"]),
        helper.make_node("Cast", ["mask"], ["m"], to=Type.FLOAT),
    ]
    if pooled_over == "mask":
        nodes += [
            helper.make_node("Unsqueeze", ["m", "last"], ["wide"]),
            helper.make_node("Mul", ["each", "wide"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["m", "one"], ["count"], keepdims=1),
            helper.make_node("Div", ["sum", "count"], ["mean"]),
        ]
    else:
        nodes.append(helper.make_node("ReduceMean", ["each", "one"], ["mean"], keepdims=0))
    return save(
        path,
        [("tokens", Type.INT64, ["n", "length"]), ("mask", Type.INT64, ["n", "length"])],
        [("each", Type.FLOAT, ["n", "length", 4]), ("mean", Type.FLOAT, ["n", 4])],
        nodes,
        {
            "table": np.random.default_rng(3).standard_normal((10, 4)).astype(np.float32),
            "one": np.array([1]),
            "last": np.array([2]),
        },
    )
