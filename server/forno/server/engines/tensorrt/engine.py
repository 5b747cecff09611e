"""Runs TensorRT plans: in the stream of the slots, from and to their memory, one execution context a slot and profile.

All contexts share one block of scratch memory, because their runs follow each other in one stream. Shapes are told only
where they have changed. With `cuda.graphs`, runs of the same shapes in the same slot are recorded once, then replayed.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from forno.kernels.devices import DeviceError, attached
from forno.server.engines.tensorrt.contexts import Context, output_room_type
from forno.server.engines.tensorrt.library import sizes
from forno.server.engines.tensorrt.plans import check_release, why_not_loaded
from forno.server.errors import ConfigError
from forno.server.profiles import Profile, Profiles
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.cuda import Ring, taken_as_it_comes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from forno.kernels.devices import Device
    from forno.server.config import ModelSettings
    from forno.server.engines.tensorrt.contexts import Key
    from forno.server.engines.tensorrt.library import Library
    from forno.server.profiles import Shapes
    from forno.server.slots.cuda import CudaSlot

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.engine.tensorrt")

_MOST_GRAPHS = 16
"""Shapes of one slot that are recorded; others run without."""
_NOT_VECTORIZED = -1


class RunFailed(Exception):
    """TensorRT refused to run; the text is what it said."""


class TensorrtEngine:
    """One plan on a device. Owned by a Model; ends with `close`.

    Args:
        plan: The plan file.
        settings: Of the model.
        library: TensorRT.
        device: Where it runs, attached to no thread; closed with the engine.

    Raises:
        ConfigError: The plan cannot be loaded, does not fit, or takes or gives what is not served.
    """

    name = "tensorrt"
    text_only = False

    def __init__(self, plan: Path, settings: ModelSettings, library: Library, device: Device) -> None:
        self._plan = plan
        self._library = library
        self._device = device
        self._settings = settings
        self._logger = library.new_logger()
        self._room_type = output_room_type(library.module)
        self._runtime: Any = None
        self._engine: Any = None
        self._scratch = 0
        self._contexts: list[Context] = []
        self._idle: deque[Context] = deque()  # appended to by any thread, without a lock
        self._of_slots: WeakKeyDictionary[CudaSlot, dict[Key, Context]] = WeakKeyDictionary()
        self._graphs = settings.cuda.graphs and device.has_graphs
        try:
            self.ring = Ring(device, settings.cuda.slot_limit_bytes, busy_wait=settings.cuda.busy_wait)
        except DeviceError as error:
            raise ConfigError(f"{plan}: {error}") from error
        try:
            check_release(plan, library.release, version_compatible=settings.tensorrt.version_compatible)
            self.ring.check_fits(plan, plan.stat().st_size)
            with attached(device):
                self._engine = self._load()
                self._check_tensors()
                self._scratch_bytes = int(self._engine.device_memory_size_v2)
                self._scratch = self._take_scratch()
            self.signature = self._signature()
            self.profiles = self._profiles()
        except BaseException as error:
            self.close()
            if isinstance(error, DeviceError):
                raise ConfigError(f"{plan}: {error}") from error
            raise
        self._input_names = [spec.name for spec in self.signature.inputs]
        self._output_names = [spec.name for spec in self.signature.outputs]
        self._reads_values = bool(self._shape_inputs)

    def new_slot(self, max_rows: int) -> CudaSlot:
        """Buffers for one batch of up to `max_rows` rows."""
        slot = self.ring.new_slot(self.signature, max_rows)
        contexts: dict[Key, Context] = {}
        self._of_slots[slot] = contexts
        weakref.finalize(slot, _keep, self._idle, contexts).atexit = False
        return slot

    def run(self, slot: CudaSlot, rows: int) -> Sequence[Array]:
        """Runs what the slot holds.

        Raises:
            InvalidArgument: The plan was not built for these shapes.
            RunFailed: TensorRT refused.
        """
        shapes = tuple([array.shape for array in slot.inputs])
        profile = self.profiles.choose(shapes)
        if profile is None:
            raise self.profiles.refusal(shapes)
        return slot.own_rows(self.ring.run(slot, lambda: self._enqueue(slot, profile, shapes)))

    def settle(self, *, small: bool) -> bool:
        """Has nothing to arrange."""
        return False

    def close(self) -> None:
        """Frees the plan, all memory and the device, as far as the device still takes them. Idempotent."""
        if self._runtime is not None:
            self.ring.finish()
            with attached(self._device):
                for context in self._contexts:
                    with taken_as_it_comes("a context"):
                        context.close(self._device)
                self._contexts.clear()
                self._idle.clear()
                self._engine = None
                self._runtime = None
                if self._scratch:
                    with taken_as_it_comes("scratch memory"):
                        self._device.free(self._scratch)
                    self._scratch = 0
        self.ring.close()

    def _load(self) -> Any:
        """The plan, loaded. The thread is attached: without a driver TensorRT would end the process."""
        self._runtime = self._library.module.Runtime(self._logger)
        if self._settings.tensorrt.version_compatible:
            self._runtime.engine_host_code_allowed = True
        with self._plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise why_not_loaded(self._plan, self._logger.taken())
        return engine

    def _take_scratch(self) -> int:
        limit_bytes = self._settings.cuda.memory_limit_bytes
        if limit_bytes and self._scratch_bytes > limit_bytes:
            raise ConfigError(
                f"{self._plan} computes in {self._scratch_bytes} bytes, "
                f"but cuda.memory_limit_bytes allows {limit_bytes}"
            )
        return self._device.allocate(self._scratch_bytes) if self._scratch_bytes else 0

    def _check_tensors(self) -> None:
        """Refuses what no slot can hold, and finds the inputs that say shapes: TensorRT reads those on the host."""
        module, engine = self._library.module, self._engine
        self._shape_inputs: frozenset[str] = frozenset()
        on_host = []
        for name in self._tensor_names():
            order = str(engine.get_tensor_format_desc(name))  # the lean runtime has no other name for it
            if engine.get_tensor_vectorized_dim(name) != _NOT_VECTORIZED or order.startswith("Channel major"):
                raise ConfigError(
                    f"{self._plan} cannot be served: its tensor '{name}' is of '{order}', expected row-major order"
                )
            if engine.get_tensor_location(name) == module.TensorLocation.HOST:
                on_host.append(name)
                if engine.get_tensor_mode(name) != module.TensorIOMode.INPUT:
                    raise ConfigError(
                        f"{self._plan} cannot be served: its output '{name}' is a shape, left on the host by TensorRT"
                    )
        self._shape_inputs = frozenset(on_host)

    def _tensor_names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _signature(self) -> Signature:
        module, engine = self._library.module, self._engine
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for name in self._tensor_names():
            try:
                dtype = self._library.element_type(engine.get_tensor_dtype(name), name)
            except ConfigError as error:
                raise ConfigError(f"{self._plan} cannot be served: {error}") from None
            spec = TensorSpec(name, dtype, sizes(engine.get_tensor_shape(name)))
            (inputs if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else outputs).append(spec)
        free = all(spec.shape and spec.shape[0] < 0 for spec in (*inputs, *outputs))
        return Signature(tuple(inputs), tuple(outputs), batched=bool(inputs) and free)

    def _profiles(self) -> Profiles:
        names = tuple([spec.name for spec in self.signature.inputs])
        ranges = []
        for index in range(self._engine.num_optimization_profiles):
            bounds = [
                [sizes(shape) for shape in self._engine.get_tensor_profile_shape(name, index)]
                if min(spec.shape, default=0) < 0
                else [spec.shape] * 3
                for name, spec in zip(names, self.signature.inputs, strict=True)
            ]
            least, best, most = [tuple([bound[which] for bound in bounds]) for which in range(3)]
            ranges.append(Profile(least, best, most))
        return Profiles(names, tuple(ranges))

    def _enqueue(self, slot: CudaSlot, profile: int, shapes: Shapes) -> list[Array]:
        """Puts a run into the stream; called within the ring's turn, on an attached thread."""
        context = self._context(slot, profile, shapes)
        try:
            self._tell_inputs(context, slot, shapes)
            if any(size < 0 for shape in context.output_shapes for size in shape):
                return self._run_into_rooms(context, slot)
            placed = slot.place_outputs(context.output_shapes, [spec.dtype for spec in self.signature.outputs])
            for name, (_, address) in zip(self._output_names, placed, strict=True):
                self._tell_address(context, name, address)
            self._execute(context)
        except BaseException:
            context.forget()
            raise
        return [array for array, _ in placed]

    def _context(self, slot: CudaSlot, profile: int, shapes: Shapes) -> Context:
        """What the slot runs these shapes with: a context of their own where runs are recorded."""
        own, any_shapes = (profile, shapes), (profile, ())
        contexts = self._of_slots[slot]
        records = self._graphs and not self._reads_values
        key = own if records and (own in contexts or len(contexts) < _MOST_GRAPHS) else any_shapes
        context = contexts.get(key)
        if context is None:
            context = contexts[key] = self._idle_context(key) or self._new_context(key)
        return context

    def _idle_context(self, key: Key) -> Context | None:
        for _ in range(len(self._idle)):
            context = self._idle.popleft()
            if context.key == key:
                return context
            self._idle.append(context)
        return None

    def _new_context(self, key: Key) -> Context:
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        handle = self._engine.create_execution_context(strategy)
        if handle is None:
            raise RunFailed(f"no execution context: {self._logger.taken()}")
        if self._scratch:
            handle.set_device_memory(self._scratch, self._scratch_bytes)
        if not handle.set_optimization_profile_async(key[0], self.ring.compute):
            raise RunFailed(f"profile {key[0]} cannot be chosen: {self._logger.taken()}")
        context = Context(handle, key)
        self._contexts.append(context)
        return context

    def _tell_inputs(self, context: Context, slot: CudaSlot, shapes: Shapes) -> None:
        """Addresses and shapes of the inputs, and what shapes follow from them."""
        handle = context.handle
        for name, array, address in zip(self._input_names, slot.inputs, slot.addresses, strict=True):
            self._tell_address(context, name, array.ctypes.data if name in self._shape_inputs else address)
        if shapes == context.shapes and not self._reads_values:
            return
        for name, shape in zip(self._input_names, shapes, strict=True):
            if not handle.set_input_shape(name, shape):
                raise RunFailed(f"input '{name}' of shape {list(shape)} is refused: {self._logger.taken()}")
        unknown = handle.infer_shapes()
        if unknown:
            raise RunFailed(f"shapes do not follow from the inputs, for want of {', '.join(unknown)}")
        context.output_shapes = tuple([sizes(handle.get_tensor_shape(name)) for name in self._output_names])
        context.shapes = shapes

    def _tell_address(self, context: Context, name: str, address: int) -> None:
        if context.addresses.get(name) == address:
            return
        if not context.handle.set_tensor_address(name, address):
            raise RunFailed(f"the address of '{name}' is refused: {self._logger.taken()}")
        context.addresses[name] = address

    def _execute(self, context: Context) -> None:
        """A run whose addresses are all told: recorded where it comes a second time, replayed from then on."""
        stream = self.ring.compute
        addresses = tuple(context.addresses.values())
        fixed = bool(context.key[1])
        if fixed and context.ran_with == addresses and context.graph_addresses != addresses and self._graphs:
            if context.graph:
                self._device.close_graph(context.graph)
            context.graph, context.graph_addresses = self._record(context, stream), addresses
        if context.graph and context.graph_addresses == addresses:
            self._device.replay(context.graph, stream)
            return
        self._execute_plainly(context, stream)  # also what TensorRT asks for before a run is recorded
        context.ran_with = addresses

    def _execute_plainly(self, context: Context, stream: int) -> None:
        if not context.handle.execute_async_v3(stream):
            raise RunFailed(self._logger.taken())

    def _record(self, context: Context, stream: int) -> int:
        """A graph of the run; 0 where it cannot be recorded, and then no other is tried."""
        self._device.begin_capture(stream)
        try:
            ran = context.handle.execute_async_v3(stream)
        finally:
            try:
                graph = self._device.end_capture(stream)
            except DeviceError as error:  # what cannot be recorded has ended the recording
                graph, ran = 0, False
                log.info("%s: %s", self._plan, error)
        if ran:
            return graph
        if graph:
            self._device.close_graph(graph)
        log.warning("%s runs without CUDA graphs, since it cannot be recorded: %s", self._plan, self._logger.taken())
        self._graphs = False
        return 0

    def _run_into_rooms(self, context: Context, slot: CudaSlot) -> list[Array]:
        """A run of which only the data decide how large an output is; every output is copied by itself."""
        for name in self._output_names:
            if name not in context.rooms:
                context.rooms[name] = self._room_type(self._device)
                if not context.handle.set_output_allocator(name, context.rooms[name]):
                    raise RunFailed(f"output '{name}' takes no allocator: {self._logger.taken()}")
        self._execute_plainly(context, self.ring.compute)
        rooms = [context.rooms[name] for name in self._output_names]
        dtypes = [spec.dtype for spec in self.signature.outputs]
        return slot.bring_out([room.shape for room in rooms], dtypes, [room.address for room in rooms])


def _keep(idle: deque[Context], contexts: dict[Key, Context]) -> None:
    """Keeps the contexts of a slot that has ended for the next one. On any thread, at any time."""
    idle.extend(contexts.values())
