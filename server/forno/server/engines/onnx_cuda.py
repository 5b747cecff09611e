"""ONNX Runtime on a GPU: all of a model there or none of it, in our stream, from and to our memory.

The runtime puts its work into the stream `compute` of the slots and returns; copies are the slots' own. Outputs of
known shape are written where one copy brings them out; others the runtime places itself, and each is copied. Whether it
writes where it is told is proven by the first run, because it leaves a bound output untouched where a model hands an
input straight through.

With graphs, a run is captured by the runtime, once for each slot, thread (which is how it keeps them) and shape, and
replayed from then on. A graph computes in memory that the runtime believes free, so all outputs must be bound then.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from forno.kernels.devices import DeviceError, open_device
from forno.server.engines.onnx import element_type, reason, signature_of
from forno.server.engines.onnx_files import bytes_of
from forno.server.errors import ConfigError, EngineLost
from forno.server.profiles import Profiles
from forno.server.slots.cuda import Ring
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from forno.kernels.devices import Device
    from forno.server.config import CudaSettings
    from forno.server.slots.cuda import CudaSlot, Tensor

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.engine.onnx")

_FATAL_ONLY = 4  # what is less arrives as an exception
_UNTOUCHED = 0xA5
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NO_FALLBACK = "fallback to CPU EP has been explicitly disabled"
_SHAPE_OPERATORS = frozenset(
    (
        *("Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Div", "Equal"),
        *("Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual"),
        *("Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "ScatterElements", "ScatterND", "Shape", "Sign", "Size"),
        *("Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
"""What the runtime, by choice, computes of shapes on the CPU, although CUDA could: a few numbers each."""
_NO_GRAPH = -1
_MOST_GRAPHS = 1024


class OnnxCudaEngine:
    """One ONNX model in an ONNX Runtime session on a device. Owned by a Model; ends with `close`.

    Args:
        path: The model file; external data is found beside it.
        settings: Memory and arithmetic.
        device: Where it runs, attached to no thread; closed with the engine. The CPU's runs without a GPU, for tests.
        model: Gives the file that is opened, where that is not `path` itself: converted to `settings.precision`. It is
            read once.

    Raises:
        ConfigError: The file is not a readable model, does not fit, or cannot run there as a whole.
    """

    name = "onnx"
    text_only = True
    profiles = Profiles()

    def __init__(
        self, path: Path, settings: CudaSettings, device: Device, model: Callable[[], Path] | None = None
    ) -> None:
        self._path = path
        self._settings = settings
        self._device = device
        self._kind = "cpu" if device.name == "cpu" else "cuda"  # as the runtime calls it
        self._session: Any = None
        self._binds: bool | None = None  # unknown until one run went both ways
        self._opener = threading.current_thread()  # whose runs are the first ones, and are not captured
        self._graphs: dict[Any, Any] = {}  # see `_graph_key` -> the options of its runs
        self._graph_ids = itertools.count(1)
        self.ring = Ring(device, settings.slot_limit_bytes, busy_wait=settings.busy_wait)
        try:
            file = path if model is None else model()
            self._check_fits(file)
            self._session = self._open(file)
            self.signature = signature_of(self._session, path)
            texts = [spec.name for spec in (*self.signature.inputs, *self.signature.outputs) if spec.dtype == OBJECT]
            if texts:
                raise ConfigError(f"{path} cannot run on a GPU: its tensor '{texts[0]}' holds strings; set device: cpu")
            if settings.graphs:
                self._check_graphs()
        except BaseException:
            self.close()
            raise
        self._input_names = [spec.name for spec in self.signature.inputs]
        self._output_names = [spec.name for spec in self.signature.outputs]
        self._run_options = self._new_run_options(_NO_GRAPH)

    def new_slot(self, max_rows: int) -> CudaSlot:
        """Buffers for one batch of up to `max_rows` rows."""
        return self.ring.new_slot(self.signature, max_rows)

    def run(self, slot: CudaSlot, rows: int) -> Sequence[Array]:
        """Runs what the slot holds."""
        shapes = None if self._binds is False else self._output_shapes(slot, rows)
        if shapes is None:
            return slot.own_rows(self._run_free(slot))
        if self._binds is None:
            return slot.own_rows(self._prove_binding(slot, shapes))
        outputs = self._place_outputs(slot, shapes)
        try:
            return slot.own_rows(self._run_bound(slot, outputs))
        except (DeviceError, EngineLost):  # which is no fault of the binding
            raise
        except Exception as error:  # noqa: BLE001  (the runtime's errors have no common base)
            if self._settings.graphs:  # outputs of a free run are where graphs compute
                return slot.own_rows(self._run_without_graph(slot, outputs, error))
            free = slot.own_rows(self._run_free(slot))  # raises too, unless it was the binding that failed
            log.warning("%s: its outputs are bound no longer: %s", self._path, reason(error))
            self._binds = False
            return free

    def settle(self, *, small: bool) -> bool:
        """Has nothing to arrange."""
        return False

    def close(self) -> None:
        """Frees the session, all memory and the device."""
        self._session = None
        self._graphs.clear()
        self.ring.close()

    def _check_fits(self, file: Path) -> None:
        """Compares the weights with the memory that the settings allow, and that there is."""
        model_bytes = bytes_of(file)
        limit_bytes = self._settings.memory_limit_bytes
        if 0 < limit_bytes < model_bytes:
            raise ConfigError(f"{self._path} has {model_bytes} bytes, but cuda.memory_limit_bytes allows {limit_bytes}")
        self.ring.check_fits(self._path, model_bytes)

    def _open(self, file: Path) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # the work is elsewhere
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider, given = _PROVIDERS[self._kind], {}
        if self._kind == "cuda":
            if provider not in ort.get_available_providers():
                raise ConfigError(
                    "this ONNX Runtime has no CUDA; install it with 'forno[gpu]', without 'forno[server]' beside it"
                )
            given = self._provider_options()
            ort.preload_dlls()
            if not self._settings.allow_cpu:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # no node runs there unseen
        try:
            session = self._new_session(file, options, provider, given)
        except Exception as error:
            why = reason(error)
            raise ConfigError(f"{self._path} cannot be opened on '{self._device.name}': {why}") from error
        if session.get_providers()[0] != provider:  # what the runtime does where CUDA's libraries are missing
            raise ConfigError(
                f"{self._path} would run on {session.get_providers()[0]} instead of {provider}: "
                "CUDA's or cuDNN's libraries are missing; install them with 'forno[gpu]'"
            )
        return session

    def _new_session(self, file: Path, options: Any, provider: str, given: dict[str, str]) -> Any:
        """A session none of whose nodes runs elsewhere, but those of shapes."""
        try:
            return ort.InferenceSession(str(file), options, providers=[(provider, given)])
        except Exception as error:
            if _NO_FALLBACK not in str(error):
                raise
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = ort.InferenceSession(str(file), options, providers=[(provider, given)])
        if session.get_providers()[0] == provider:
            refused = strangers(session, provider)
            if refused:
                raise ConfigError(
                    f"its {', '.join(refused)} would run on the CPU, having no CUDA kernel; "
                    "set cuda.allow_cpu: true to let them, or device: cpu"
                )
        return session

    def _provider_options(self) -> dict[str, str]:
        options = {
            "device_id": str(self._device.ordinal),
            "user_compute_stream": str(self.ring.compute),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": str(int(self._settings.tf32)),
            "prefer_nhwc": str(int(self._settings.channels_last)),
            "cudnn_conv_algo_search": self._settings.conv_search.upper(),
            "enable_cuda_graph": str(int(self._settings.graphs)),
        }
        if self._settings.memory_limit_bytes:
            options["gpu_mem_limit"] = str(self._settings.memory_limit_bytes)
        return options

    def _check_graphs(self) -> None:
        """Raises ConfigError where a run has no one shape for its count of rows."""
        for spec in (*self.signature.inputs, *self.signature.outputs):
            if any(size < 0 for size in spec.shape[1:]):
                raise ConfigError(
                    f"{self._path}: cuda.graphs needs fixed row shapes, but '{spec.name}' is {spec}; set it to false"
                )
        if self._kind == "cuda" and not self._device.has_graphs:
            raise ConfigError(f"{self._path}: device '{self._device.name}' has no graphs; choose cuda")

    def _new_run_options(self, graph_id: int) -> Any:
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._settings.graphs:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        if self._settings.shrink_memory:
            place = f"{'gpu' if self._kind == 'cuda' else 'cpu'}:{self._device.ordinal}"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", place)
        return options

    def _output_shapes(self, slot: CudaSlot, rows: int) -> list[tuple[int, ...]] | None:
        """Shapes of this run's outputs; None where one is open."""
        batched = self.signature.batched
        run_rows = slot.inputs[0].shape[0] if batched else rows
        shapes = [(run_rows, *spec.shape[1:]) if batched else spec.shape for spec in self.signature.outputs]
        return None if any(size < 0 for shape in shapes for size in shape) else shapes

    def _bind_inputs(self, slot: CudaSlot) -> Any:
        io = self._session.io_binding()
        for name, array, address in zip(self._input_names, slot.inputs, slot.addresses, strict=True):
            io.bind_input(name, self._kind, self._device.ordinal, element_type(array), array.shape, address)
        return io

    def _prove_binding(self, slot: CudaSlot, shapes: list[tuple[int, ...]]) -> Sequence[Array]:
        """The first run: free and bound; outputs are bound from then on only if both gave the same."""
        plain = [np.array(array) for array in self._run_free(slot)]
        try:
            bound = self._run_bound(slot, self._place_outputs(slot, shapes), wipe=True)
            self._binds = all(map(_equal, plain, bound))
        except Exception as error:  # noqa: BLE001  (the runtime's errors have no common base)
            log.debug("%s: its outputs cannot be bound: %s", self._path, reason(error))
            self._binds = False
        return plain

    def _place_outputs(self, slot: CudaSlot, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return slot.place_outputs(shapes, [spec.dtype for spec in self.signature.outputs])

    def _run_bound(self, slot: CudaSlot, outputs: list[Tensor], *, wipe: bool = False) -> Sequence[Array]:
        """A run whose outputs come to their places in the slot; with `wipe`, over bytes that no model makes."""
        graph = self._graph_key(slot, outputs)
        known = self._graphs.get(graph)
        is_new = graph is not None and known is None and len(self._graphs) < _MOST_GRAPHS

        def enqueue() -> list[Array]:
            io = self._bind_inputs(slot)
            for name, (array, address) in zip(self._output_names, outputs, strict=True):
                if wipe and array.nbytes:
                    self._device.fill(address, _UNTOUCHED, array.nbytes, self.ring.compute)
                io.bind_output(name, self._kind, self._device.ordinal, element_type(array), array.shape, address)
            self._enqueue(io, options)
            slot.kept = io
            return [array for array, _ in outputs]

        options = known or (self._new_run_options(next(self._graph_ids)) if is_new else self._run_options)
        found = self.ring.run(slot, enqueue, alone=is_new)
        if is_new:
            self._graphs[graph] = options
        return found

    def _run_without_graph(self, slot: CudaSlot, outputs: list[Tensor], error: Exception) -> Sequence[Array]:
        """Runs again what could not be captured; raises what went wrong if that was something else."""
        graph = self._graph_key(slot, outputs)
        if graph is None or graph in self._graphs:
            raise error
        self._graphs[graph] = self._run_options
        log.warning("%s: runs of %d rows go without a graph: %s", self._path, slot.inputs[0].shape[0], reason(error))
        return self._run_bound(slot, outputs)

    def _graph_key(self, slot: CudaSlot, outputs: list[Tensor]) -> Any:
        """What a graph is tied to; None where there is to be none."""
        thread = threading.current_thread()
        if not self._settings.graphs or not self._binds or thread is self._opener:
            return None
        addresses = (*slot.addresses, *[address for _, address in outputs])  # some of processed slots are in no slab
        return thread, addresses, tuple([array.shape for array in slot.inputs])

    def _run_free(self, slot: CudaSlot) -> Sequence[Array]:
        """A run whose outputs the runtime places; they are copied one by one."""

        def enqueue() -> list[Array]:
            io = self._bind_inputs(slot)
            for name in self._output_names:
                io.bind_output(name, self._kind, self._device.ordinal)
            self._enqueue(io, self._run_options)
            values = io.get_outputs()
            slot.kept = (io, values)
            dtypes = [spec.dtype for spec in self.signature.outputs]
            shapes = [tuple(value.shape()) for value in values]
            return slot.bring_out(shapes, dtypes, [value.data_ptr() for value in values])

        return self.ring.run(slot, enqueue)

    def _enqueue(self, io: Any, options: Any) -> None:
        if self._kind == "cpu":  # whose runtime does not know our stream
            self._device.finish(self.ring.compute)
        self._session.run_with_iobinding(io, options)


def open_on_device(
    path: Path, settings: CudaSettings, device: str, model: Callable[[], Path] | None = None
) -> OnnxCudaEngine:
    """Opens a model on `cuda`, `pycuda`, or one of several: `cuda:1`; see `OnnxCudaEngine`. Blocks; any thread.

    Raises:
        ConfigError: There is no such device, or see `OnnxCudaEngine`.
    """
    name, _, ordinal = device.partition(":")
    try:
        return OnnxCudaEngine(path, settings, open_device(name, int(ordinal or 0)), model)
    except DeviceError as error:
        raise ConfigError(str(error)) from error


def strangers(session: Any, provider: str) -> list[str]:
    """Operators of nodes that another provider runs and that do more than compute shapes."""
    found = {node.op_type for part in session.get_provider_graph_assignment_info() if part.ep_name != provider
             for node in part.get_nodes()}  # fmt: skip
    return sorted(found - _SHAPE_OPERATORS)


def _equal(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()
