"""ONNX Runtime on the CPU.

A run with fixed shapes uses an IO binding kept for each count of rows: it costs 2.2 us for a model that does nothing,
against 3.7 us with arrays passed by name; making a binding costs 10 us. What has an open shape or strings is passed by
name. Bindings are trusted only after one run both ways gave the same answer, because the runtime leaves a bound output
untouched where a model hands an input straight through.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from forno.server.errors import ConfigError
from forno.server.profiles import Profiles
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.host import HostSlot
from forno.v1 import tensors

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, at the start; it would tell its maker of every model
try:
    import onnxruntime as ort
except ImportError as error:
    raise ConfigError("serving ONNX models needs ONNX Runtime; install it: pip install 'forno[server]'") from error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forno.server.config import OnnxSettings

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.engine.onnx")

_NAME_OF_TYPE = {"float": "float32", "double": "float64"} | {
    row.name: row.name for row in tensors.TABLE if row.name not in ("float32", "float64")
}
_BFLOAT16 = 16  # number of the type in ONNX
_FATAL_ONLY = 4  # what is less arrives as an exception
_MOST_BINDINGS = 256
_SMALL_BYTES = 4 * 1024 * 1024
_UNTOUCHED = 0xA5


class _Binding(NamedTuple):
    """Inputs and outputs of one slot, bound for one count of rows."""

    io: Any  # onnxruntime.IOBinding
    outputs: tuple[Array, ...]  # views into the slot's own outputs


class OnnxSlot(HostSlot):
    """A host slot with places for the outputs too, and the bindings onto all of them.

    Args:
        signature: Inputs and outputs; `batched` says whether axis 0 counts rows.
        max_rows: Most rows of a batch.
    """

    def __init__(self, signature: Signature, max_rows: int) -> None:
        super().__init__(signature, max_rows)
        self.bindings: dict[int, _Binding] = {}
        outputs = HostSlot(Signature(signature.outputs, (), signature.batched, signature.padding), max_rows).places
        places = [place for place in (*self.places, *outputs) if place is not None and place.size]
        self.bindable = len(places) == len(self.places) + len(outputs)
        self.outputs: list[Array] = [place for place in outputs if place is not None] if self.bindable else []


class OnnxEngine:
    """One ONNX model in an ONNX Runtime session. Owned by a Model; ends with `close`.

    Args:
        path: The model file; external data is found beside it.
        settings: Threads.
        instances: Threads that will call `run` at once; each takes part in its run, so that the session needs fewer.

    Raises:
        ConfigError: The file is not a readable model, or takes or gives what is not a tensor of a known element type.
    """

    name = "onnx"
    text_only = True
    profiles = Profiles()

    def __init__(self, path: Path, settings: OnnxSettings, instances: int = 1) -> None:
        self._path = path
        self._settings = settings
        self._most_threads = max(1, _usable_cores() - instances + 1)
        self._threads = settings.intra_op_threads or (1 if _is_small(path) else self._most_threads)
        self._session = self._open()
        self._binds: bool | None = None  # unknown until one run went both ways
        self.signature = signature_of(self._session, path)
        self._input_names = [spec.name for spec in self.signature.inputs]
        self._output_names = [spec.name for spec in self.signature.outputs]
        specs = (*self.signature.inputs, *self.signature.outputs)
        self._has_bfloat16 = any(spec.dtype.name == "bfloat16" for spec in specs)

    def new_slot(self, max_rows: int) -> OnnxSlot:
        """Buffers for one batch of up to `max_rows` rows."""
        return OnnxSlot(self.signature, max_rows)

    def run(self, slot: OnnxSlot, rows: int) -> Sequence[Array]:
        """Runs what the slot holds."""
        if not slot.fixed or not slot.bindable or self._binds is False:
            return slot.own_rows(self._run_by_name(slot.inputs))
        binding = slot.bindings.get(rows)
        if binding is None:
            if self._binds is None:
                return self._prove_binding(slot, rows)
            binding = self._bind(slot, rows)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:  # noqa: BLE001  (the runtime's errors have no common base)
            outputs = slot.own_rows(self._run_by_name(slot.inputs))  # raises too, unless it was the binding that failed
            log.warning("%s: its runs are bound no longer: %s", self._path, reason(error))
            self._binds = False
            return outputs
        return binding.outputs

    def settle(self, *, small: bool) -> bool:
        """Opens the session anew if it should have another number of threads."""
        threads = self._settings.intra_op_threads or (1 if small else self._most_threads)
        if threads == self._threads:
            return False
        self._threads = threads
        self._session = self._open()
        return True

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def _open(self) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.enable_mem_pattern = False  # keeps a plan for every shape ever seen, and gained nothing in speed
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._settings.spin else "0")
        try:
            return ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConfigError(f"{self._path} is not a readable ONNX model: {reason(error)}") from error

    def _run_by_name(self, inputs: Sequence[Array]) -> Sequence[Array]:
        if self._has_bfloat16:
            return self._run_values(inputs)
        return self._session.run(self._output_names, dict(zip(self._input_names, inputs, strict=True)))  # type: ignore[no-any-return]

    def _run_values(self, inputs: Sequence[Array]) -> list[Array]:
        """As `_run_by_name`, through the runtime's own values, since NumPy does not know bfloat16."""
        values = {name: _value(array) for name, array in zip(self._input_names, inputs, strict=True)}
        outputs = self._session.run_with_ort_values(self._output_names, values)
        return [_array(value) for value in outputs]

    def _prove_binding(self, slot: OnnxSlot, rows: int) -> Sequence[Array]:
        """The first run of fixed shapes: by name and bound; bindings are used only if both gave the same."""
        plain = slot.own_rows(self._run_by_name(slot.inputs))
        try:
            for place in slot.outputs:
                place.reshape(-1).view(np.uint8)[:] = _UNTOUCHED
            binding = self._bind(slot, rows)
            self._session.run_with_iobinding(binding.io)
            self._binds = all(map(_equal, plain, binding.outputs))
        except Exception as error:  # noqa: BLE001  (the runtime's errors have no common base)
            log.debug("%s: its runs cannot be bound: %s", self._path, reason(error))
            self._binds = False
        if not self._binds:
            slot.bindings.clear()
        return plain

    def _bind(self, slot: OnnxSlot, rows: int) -> _Binding:
        io = self._session.io_binding()
        batched = self.signature.batched
        run_rows = slot.inputs[0].shape[0] if batched else rows
        outputs = [place[:run_rows] if batched else place for place in slot.outputs]
        for name, array in zip(self._input_names, slot.inputs, strict=True):
            io.bind_input(name, "cpu", 0, element_type(array), array.shape, array.ctypes.data)
        for name, array in zip(self._output_names, outputs, strict=True):
            io.bind_output(name, "cpu", 0, element_type(array), array.shape, array.ctypes.data)
        if len(slot.bindings) >= _MOST_BINDINGS:
            slot.bindings.clear()
        binding = slot.bindings[rows] = _Binding(io, tuple(slot.own_rows(outputs)))
        return binding


def _is_small(path: Path) -> bool:
    """A guess at whether one thread will do, which `settle` puts right: opening a large model twice takes long."""
    total_bytes = 0
    for file in path.parent.glob("*"):  # external data lies beside the model under any name
        total_bytes += file.stat().st_size if file.is_file() else 0
        if total_bytes > _SMALL_BYTES:
            return False
    return True


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: Exception) -> str:
    """The runtime's message in one line, without its code and its repetition of the path."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    return text or type(error).__name__


def signature_of(session: Any, path: Path) -> Signature:
    """What a session takes and gives.

    Raises:
        ConfigError: One of them is not a tensor of a known element type.
    """
    inputs = tuple([_spec(node, "input", path) for node in session.get_inputs()])
    outputs = tuple([_spec(node, "output", path) for node in session.get_outputs()])
    rows_names = {spec.dim_names[0] for spec in inputs if spec.shape} - {""}
    free = all(spec.shape and spec.shape[0] < 0 for spec in (*inputs, *outputs))
    return Signature(inputs, outputs, batched=bool(inputs) and free and len(rows_names) <= 1)


def _spec(node: Any, kind: str, path: Path) -> TensorSpec:
    found = re.fullmatch(r"tensor\((\w+)\)", node.type)
    name = _NAME_OF_TYPE.get(found[1]) if found else None
    if name is None:
        known = ", ".join(row.name for row in tensors.TABLE)
        raise ConfigError(
            f"{path} cannot be served: its {kind} '{node.name}' is a {node.type}, expected a tensor of {known}"
        )
    dims = list(node.shape)
    return TensorSpec(
        node.name,
        tensors.dtype_named(name),
        tuple([dim if isinstance(dim, int) and dim >= 0 else -1 for dim in dims]),
        tuple([dim if isinstance(dim, str) else "" for dim in dims]),
    )


def element_type(array: Array) -> Any:
    """How the runtime's bindings call the array's type."""
    return _BFLOAT16 if array.dtype.name == "bfloat16" else array.dtype.type


def _value(array: Array) -> Any:
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    shape = tuple(value.shape())
    bfloat16 = tensors.dtype_named("bfloat16")
    room = np.empty(shape, bfloat16)
    if room.size:
        ctypes.memmove(room.ctypes.data, value.data_ptr(), room.nbytes)
    return room


def _equal(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()
