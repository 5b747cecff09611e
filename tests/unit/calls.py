"""What unit tests of servicers and endpoints need: real models, and a call without a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import onnx
from onnx import TensorProto, helper

from forno.server.config import ModelSettings, NullSettings
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path


class Aborted(grpc.aio.AbortError):
    """Ends a handler, as the transports' own does."""


class CallContext:
    """The part of a servicer context that servicers use; keeps the outcome for the test to look at."""

    def __init__(self, time_remaining_s: float | None = None, path: str = "") -> None:
        self.code = grpc.StatusCode.OK
        self.message = ""
        self.trailing: dict[str, Any] = {}
        self._time_remaining_s = time_remaining_s
        self._path = path

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    def invocation_metadata(self) -> Any:
        return (("x-envoy-original-path", self._path),) if self._path else None

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailing = dict(metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self.code, self.message = code, details
        raise Aborted


async def loaded(name: str, path: Path | None = None, version: str = "1", **null: Any) -> Model:
    """A ready model: of a file, or the null engine where there is none."""
    settings = ModelSettings() if path else ModelSettings(engine="null", null=NullSettings(**null))
    model = Model(name, version, path, settings, Metrics().model(name, version))
    await model.load()
    return model


def registry_of(*models: Model) -> Registry:
    registry = Registry()
    for model in models:
        registry.add(model)
    return registry


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def spam_model(path: Path) -> Path:
    """text: string[N] -> probabilities: float32[N, 2]; the text "buy" is spam by 0.97, any other by 0.1."""
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["text"],
            ["p"],
            domain="ai.onnx.ml",
            keys_strings=["buy"],
            values_floats=[0.97],
            default_float=0.1,
        ),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("Unsqueeze", ["p", "axis"], ["p2"]),
        helper.make_node("Unsqueeze", ["q", "axis"], ["q2"]),
        helper.make_node("Concat", ["q2", "p2"], ["probabilities"], axis=1),
    ]
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["N"])
    out = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2])
    return save(path, nodes, [text], [out])


def sums_model(path: Path) -> Path:
    """x: float32[N, 2], k: int64[N] -> total: float32[N], label: int64[N], both: float32[N, 2]."""
    nodes = [
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=0),
        helper.make_node("Identity", ["k"], ["label"]),
        helper.make_node("Identity", ["x"], ["both"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2]),
        helper.make_tensor_value_info("k", TensorProto.INT64, ["N"]),
    ]
    outputs = [
        helper.make_tensor_value_info("total", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("both", TensorProto.FLOAT, ["N", 2]),
    ]
    return save(path, nodes, inputs, outputs)
