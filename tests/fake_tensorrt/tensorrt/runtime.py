"""Loads and runs the fake plans."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import tensorrt as trt

HEADER_BYTES = 28
_NAMES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16"}
_NUMPY = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "INT32": "i4", "INT64": "i8", "BOOL": "?", "UINT8": "u1"}


def plan_bytes(model: bytes, profiles: list[dict[str, list[list[int]]]], **more: Any) -> bytes:
    """A plan; `more` says what differs from one built here: `release`, `sm`, `version_compatible`, `weights`."""
    release = more.get("release", trt.__version__)
    header = b"ftrt" + bytes(20) + bytes([int(part) % 256 for part in release.split(".")])
    told = {"sm": "9.0", "release": release, "profiles": profiles, "scratch_bytes": 4096, **more}
    return header + json.dumps(told).encode() + b"\n" + model


class Runtime:
    logger: Any
    engine_host_code_allowed: bool

    def __init__(self, logger: Any) -> None:
        trt.need_device()
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        trt.need_device()
        content = bytes(memoryview(serialized_engine))
        if content[:4] != b"ftrt" or b"\n" not in content:
            return self._refused("Error Code 1: Serialization (Serialization assertion plan->header.magicTag failed.)")
        line, _, model = content[HEADER_BYTES:].partition(b"\n")
        told = json.loads(line)
        compatible = told.get("version_compatible")
        if told["release"].split(".")[:3] != trt.__version__.split(".")[:3] and not compatible:
            return self._refused("Error Code 1: Serialization (Version tag does not match.)")
        if compatible and not self.engine_host_code_allowed:
            return self._refused("Error Code 4: engine_host_code_allowed is not set")
        if told["sm"] != "9.0":
            return self._refused(
                "The engine plan file is generated on an incompatible device, "
                f"expecting compute 9.0 got compute {told['sm']}, please rebuild."
            )
        return ICudaEngine(told, model, self.logger)

    def _refused(self, text: str) -> None:
        self.logger.tell(f"IRuntime::deserializeCudaEngine: {text}")


class ICudaEngine:
    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int
    refittable: bool

    def __init__(self, told: dict[str, Any], model: bytes, logger: Any) -> None:
        self.told, self.logger = told, logger
        self.refittable = "weights" in told
        self.under_way = 0
        self.take(model)
        self.num_optimization_profiles = len(told["profiles"])
        self.device_memory_size_v2 = told["scratch_bytes"]
        self.contexts = 0

    def take(self, model: bytes) -> None:
        self.model = model
        graph = onnx.load_from_string(model).graph
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        constants = {each.name for each in graph.initializer}
        inputs = [each for each in graph.input if each.name not in constants]
        self._values = {each.name: each for each in (*inputs, *graph.output)}
        self.inputs = [each.name for each in inputs]
        self.outputs = [each.name for each in graph.output]
        reshaping = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
        self.shape_inputs = [name for name in self.inputs if name in reshaping]
        self.num_io_tensors = len(self._values)

    def serialize(self) -> Any:
        trt.need_device()
        return bytearray(plan_bytes(self.model, **self.told))

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.HOST if name in self.shape_inputs else trt.TensorLocation.DEVICE

    def get_tensor_vectorized_dim(self, name: str) -> int:
        return 1 if name in self.told.get("vectorized", ()) else -1

    def get_tensor_format_desc(self, name: str) -> str:
        if name in self.told.get("vectorized", ()):
            return "Four wide channel vectorized row major Int8 format"
        return "Channel major FP16 format" if name in self.told.get("channel_major", ()) else "Row major linear format"

    def get_tensor_dtype(self, name: str) -> Any:
        if name in self.told.get("fp8", ()):
            return trt.DataType.FP8
        onnx_name = onnx.TensorProto.DataType.Name(self._values[name].type.tensor_type.elem_type)
        return trt.DataType[_NAMES.get(onnx_name, onnx_name)]

    def get_tensor_shape(self, name: str) -> Any:
        dims = self._values[name].type.tensor_type.shape.dim
        return trt.Dims([dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [trt.Dims(shape) for shape in self.told["profiles"][profile_index][name]]

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        trt.need_device()
        if strategy is not trt.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Undefined("memory of its own that nobody counts")
        self.contexts += 1
        return IExecutionContext(self)

    def _dtype(self, name: str) -> Any:
        return np.dtype(_NUMPY[self.get_tensor_dtype(name).name])


Undefined = trt.Undefined


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._scratch = (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._epoch = 0  # of what it was told of shapes
        self._ran_epoch = -1

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._epoch += 1
        if not 0 <= profile_index < self._engine.num_optimization_profiles or not stream_handle:
            return self._failed(f"setOptimizationProfileAsync: there is no profile {profile_index}")
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if self._profile < 0:
            raise Undefined("a shape without a profile")
        if name not in self._engine.inputs:
            return self._failed(f"setInputShape: there is no input {name}")
        self._epoch += 1
        declared = self._engine.get_tensor_shape(name)
        least = most = declared
        if -1 in declared:
            least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(declared) and all(
            low <= at <= high for low, at, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            return self._failed(f"setInputShape: {name} of {shape} is not within {least} and {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in (*self._engine.inputs, *self._engine.outputs) or not isinstance(memory, int) or not memory:
            return self._failed(f"setTensorAddress: {name} at {memory!r}")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        if not isinstance(output_allocator, trt.IOutputAllocator) or not output_allocator.ready:
            raise Undefined("an allocator that is none")
        self._allocators[name] = output_allocator
        return name in self._engine.outputs

    def infer_shapes(self) -> list[str]:
        engine = self._engine
        missing = [name for name in engine.inputs if name not in self._shapes]
        missing += [name for name in engine.shape_inputs if name not in self._addresses and name not in missing]
        if missing:
            return missing
        zeros, ones = [engine.session.run(None, self._made_up(value)) for value in (0, 1)]
        for name, zero, one in zip(engine.outputs, zeros, ones, strict=True):
            sizes = zip(zero.shape, one.shape, strict=True)
            self._shapes[name] = tuple([size if size == other else -1 for size, other in sizes])
        return []

    def get_tensor_shape(self, name: str) -> Any:
        return trt.Dims(self._shapes.get(name, self._engine.get_tensor_shape(name)))

    def execute_async_v3(self, stream_handle: int) -> bool:
        device, engine = trt.need_device(), self._engine
        if not stream_handle:
            raise Undefined("the default stream, for which all others wait")
        if self.infer_shapes():
            return self._failed("enqueueV3: not all shapes are known")
        names = [*engine.inputs, *[name for name in engine.outputs if name not in self._allocators]]
        unknown = [name for name in names if name not in self._addresses]
        if unknown:
            return self._failed(f"enqueueV3: Neither address or allocator is set for tensor {unknown[0]}")
        if engine.told["scratch_bytes"]:
            device.check("scratch", self._scratch[0], engine.told["scratch_bytes"])
            if self._scratch[1] < engine.told["scratch_bytes"] or self._scratch[0] % 256:
                raise Undefined("less scratch memory than the engine needs")
        capturing = stream_handle in device.captures()
        if capturing and (self._ran_epoch != self._epoch or engine.told.get("unrecordable")):
            return self._failed("enqueueV3: operation not permitted when stream is capturing")
        if self._allocators:
            return not capturing and self._run_with_allocators(stream_handle)
        shapes, addresses, epoch = dict(self._shapes), dict(self._addresses), self._epoch
        for name in names:
            if name not in engine.shape_inputs:
                device.check(name, addresses[name], self._bytes(name, shapes[name]))

        def run() -> None:
            if capturing and epoch != self._epoch:
                raise Undefined("a graph whose context was told another shape since")
            outputs = engine.session.run(None, {name: self._view(name, addresses, shapes) for name in engine.inputs})
            for name, output in zip(engine.outputs, outputs, strict=True):
                self._view(name, addresses, shapes)[...] = output
            engine.under_way -= 0 if capturing else 1

        engine.under_way += 0 if capturing else 1
        device.enqueue(stream_handle, run)
        self._ran_epoch = self._epoch
        return True

    def _run_with_allocators(self, stream: int) -> bool:
        """Waits for the inputs, because sizes follow from them."""
        device, engine = trt.need_device(), self._engine
        device.finish(stream)
        given = {name: self._view(name, self._addresses, self._shapes) for name in engine.inputs}
        for name, output in zip(engine.outputs, engine.session.run(None, given), strict=True):
            address = self._allocators[name].reallocate_output_async(name, 0, output.nbytes, 256, stream)
            if output.nbytes:
                device.check(name, address, output.nbytes)
            self._allocators[name].notify_shape(name, trt.Dims(output.shape))
            copy = np.ascontiguousarray(output)
            device.enqueue(stream, lambda to=address, copy=copy: ctypes.memmove(to, copy.ctypes.data, copy.nbytes))
        return True

    def _made_up(self, value: int) -> dict[str, Any]:
        engine = self._engine
        filled = {name: np.full(self._shapes[name], value, engine._dtype(name)) for name in engine.inputs}
        real = {name: self._view(name, self._addresses, self._shapes) for name in engine.shape_inputs}
        return {**filled, **real}

    def _view(self, name: str, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> Any:
        room = (ctypes.c_char * self._bytes(name, shapes[name])).from_address(addresses[name])
        return np.frombuffer(room, self._engine._dtype(name)).reshape(shapes[name])

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * int(self._engine._dtype(name).itemsize)

    def _failed(self, text: str) -> bool:
        self._engine.logger.tell(f"IExecutionContext::{text}")
        return False
