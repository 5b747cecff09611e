"""Puts other weights into the fake plans.

As the real one: what the parser takes for attributes of a layer becomes part of a plan; of a batch normalization it
makes two weights of its own names; weights of an ONNX model are found by their names. `FAKE_TENSORRT_BUILD` may say
that a plan has one more weight that no model has (`unnamed`).
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import tensorrt as trt

_WISHES = json.loads(os.environ.get("FAKE_TENSORRT_BUILD", "{}"))
_ATTRIBUTES = {"Clip", "Resize", "Pad", "LeakyRelu"}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def folded(graph: Any) -> list[tuple[list[str], list[str]]]:
    """Of each batch normalization, the names of its weights, and of those made of them."""
    nodes = [node for node in graph.node if node.op_type == "BatchNormalization"]
    made = iter(range(2 * len(nodes)))
    return [(list(node.input[1:5]), [f"tmp_refittable_weight_{next(made)}" for _ in range(2)]) for node in nodes]


def refittable(model: bytes) -> list[str]:
    """Names of the weights that a plan of a model can take anew."""
    graph = onnx.load_from_string(model).graph
    fixed = {name for node in graph.node if node.op_type in _ATTRIBUTES for name in node.input}
    made = []
    for weights, names in folded(graph):
        fixed |= set(weights)
        made += names
    named = [each.name for each in graph.initializer if each.data_type in _FLOATS and each.name not in fixed]
    return [*named, *made, *([_WISHES["unnamed"]] if "unnamed" in _WISHES else [])]


class Refitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        trt.need_device()
        if not engine.refittable:
            logger.tell("createInferRefitter: Error Code 3: condition: e.isRefittable()")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine, self._logger = engine, logger
        self._set: dict[str, Any] = {}
        self.owner: Any = None  # of the weights that were set: real ones are not copied

    def get_all_weights(self) -> list[str]:
        return list(self._engine.told["weights"])

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.get_all_weights() if name not in self._set] if self._set else []

    def set_named_weights(self, name: str, weights: Any) -> bool:
        was = {each.name: each for each in onnx.load_from_string(self._engine.model).graph.initializer}
        if name not in self.get_all_weights():
            return False
        if name in was:
            value = numpy_helper.to_array(was[name])
            if (value.shape, value.dtype) != (weights.shape, weights.dtype):
                return False
        self._set[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        trt.need_device()
        if self._engine.under_way:
            raise trt.Undefined("a refit while the engine has work under way")
        if self.owner is not None and self.owner() is None:
            raise trt.Undefined("weights whose parser is gone")
        if self.get_missing_weights():
            self._logger.tell("refitCudaEngine: weights are missing")
            return False
        model = onnx.load_from_string(self._engine.model)
        for each in model.graph.initializer:
            if each.name in self._set:
                each.CopyFrom(numpy_helper.from_array(self._set[each.name], each.name))
        for weights, names in folded(model.graph):
            for each in model.graph.initializer:
                if each.name in weights and names[0] in self._set:
                    each.CopyFrom(numpy_helper.from_array(self._set[names[0]][weights.index(each.name)], each.name))
        self._engine.take(model.SerializeToString())
        return True


class OnnxParserRefitter:
    num_errors: int

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter
        self._errors: list[str] = []
        self.num_errors = 0

    def refit_from_file(self, model: str) -> bool:
        match _WISHES.get("fault"):
            case "refit crash":
                print("Assertion `weights.count == 3' failed.", flush=True)
                ctypes.string_at(0)
            case "refit refuse":
                return self._failed("In node 3 with name: and operator: Gemm\n(refit): INVALID_NODE")
        graph = onnx.load(model).graph
        wanted = self._refitter.get_all_weights()
        given = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        values = {name: value for name, value in given.items() if name in wanted}
        for weights, names in folded(graph):
            values |= {name: np.stack([given[each] for each in weights]) for name in names if name in wanted}
        self._refitter.owner = weakref.ref(self)
        for name, value in values.items():
            if not self._refitter.set_named_weights(name, value):
                return self._failed("Failed to set named weights")
        if len(values) < len(wanted):
            return self._failed(f"Only successfully refitted {len(values)} weights out of {len(wanted)}")
        return True

    def get_error(self, index: int) -> Any:
        return trt.ParserError(self._errors[index])

    def _failed(self, text: str) -> bool:
        self._errors.append(text)
        self.num_errors = len(self._errors)
        return False
