"""One version of one model: an engine with its batcher, slots and worker, and a state."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from forno.server.batcher import Batcher
from forno.server.clock import clock_us
from forno.server.engines import device_name, engine_name, open_engine
from forno.server.errors import ConfigError, FornoError, InvalidArgument, NotReady
from forno.server.processing import Processing
from forno.server.processing import plan as processing_plan
from forno.server.profiles import ShapeCheck, limited
from forno.server.proof import proven
from forno.server.shapes import plan, rows_limit
from forno.server.sharing import weigh_this_thread
from forno.server.signature import Signature
from forno.server.slots import rings_of
from forno.server.splitting import parts_of
from forno.server.warmup import WarmUp, warm_up
from forno.server.worker import SPARE_SLOTS, Worker
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from forno.server.config import ModelSettings
    from forno.server.engines import Engine
    from forno.server.metrics import ModelMetrics
    from forno.server.request import Answer, Request, RowShapes
    from forno.server.shapes import Cut, Fit
    from forno.server.slots import Slot

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.model")
T = TypeVar("T")

_MOST_FITS = 4096


class ModelState(Enum):
    """Where a model is in its life: LOADING -> READY -> DRAINING -> UNLOADED; LOADING or READY -> FAILED."""

    LOADING = "loading"
    """Its file is read, or its first runs are under way; also before `load` was called."""
    READY = "ready"
    """Its first runs have passed, and it takes requests."""
    DRAINING = "draining"
    """It finishes what it holds and takes nothing new."""
    UNLOADED = "unloaded"
    """It holds nothing any more."""
    FAILED = "failed"
    """It could not be loaded, or its device is lost; `error` says why."""


class Gpu(NamedTuple):
    """Which one."""

    name: str  # as settings call it, with its number: cuda:0
    bus_id: str  # as the driver calls it


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """A glance at a model."""

    pending_requests: int = 0
    pending_rows: int = 0
    running_rows: int = 0
    inline: bool = False
    rows_cap: int = 1  # rows of a batch now
    delay_us: int = 0  # longest wait for company now
    one_row_us: float = 0.0  # what a run of one row is expected to take; 0 while unknown, as the next
    cap_us: float = 0.0  # what a run of `rows_cap` rows is expected to take
    elements: int = 0  # that ran so far, where the model has padding
    padded_elements: int = 0  # of those, the ones that no request has


class Model:
    """One version of one model. Owned by the server; event loop only; `load` once, and end with `close`.

    Args:
        name: What callers call it.
        version: Which of its versions this is.
        path: Its file; None for an engine that needs none.
        settings: Its settings.
        metrics: Told once per batch, and of what is refused.
        clock: Monotonic microseconds; the default of a request's arrival and what expiries are compared with.
    """

    def __init__(
        self,
        name: str,
        version: str,
        path: Path | None,
        settings: ModelSettings,
        metrics: ModelMetrics,
        clock: Callable[[], int] = clock_us,
    ) -> None:
        self.name = name
        self.version = version
        self.path = path
        self.settings = settings
        self.state = ModelState.LOADING
        self.error = ""
        self.note = ""  # what the first runs have shown that a person should know
        self.engine_name = ""
        self.signature = Signature((), (), batched=False)
        self.max_rows = 1
        self.processing = Processing(None, None)  # what is done around its runs
        self.gpus: tuple[Gpu, ...] = ()  # where it runs; none = on the CPU
        self.example_shapes: tuple[tuple[int, ...], ...] = ()  # of inputs that passed the first runs; empty if none did
        self.on_failed: Callable[[], None] = lambda: None
        """Called when it fails after it was ready; `error` says why."""
        self._metrics = metrics
        self._clock_us = clock
        self._worker: Worker | None = None
        self._batcher: Batcher | None = None
        self._text_inputs: tuple[int, ...] = ()  # inputs whose strings must be text
        self._fits: dict[RowShapes, Fit] = {}  # of shapes seen lately, where shapes are padded
        self._pads = False  # whether shapes are padded
        self._shape_check: ShapeCheck | None = None  # where the engine does not run all shapes of its signature
        self.stopping = threading.Event()  # once set, `load` gives up what would take long
        self._settled = asyncio.Event()  # LOADING is over, or was never begun
        self._settled.set()
        self._ended = asyncio.Event()

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    async def load(self) -> None:
        """Reads the file and makes the first runs, on another thread; READY or FAILED afterwards.

        Raises:
            ConfigError: The model cannot be served; the text says why.
            NotReady: `close` was called meanwhile.
        """
        self._settled.clear()
        try:
            engine, warm, slots = await self._on_own_thread(self._open)
        except BaseException as error:
            self.error = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            self.state = ModelState.FAILED
            if self.stopping.is_set():
                raise NotReady(f"model '{self}' was stopped while it was loading") from error
            if isinstance(error, ConfigError) or not isinstance(error, Exception):
                raise
            raise ConfigError(f"model '{self}' cannot be loaded: {self.error}") from error
        finally:
            self._settled.set()
        if self.state is not ModelState.LOADING:
            engine.close()
            raise NotReady(f"model '{self}' was stopped while it was loading")
        self._begin(engine, warm, slots)

    def submit(self, request: Request) -> None:
        """Queues a request; later its future holds what `finish` returned, or an error of the table in errors.py.

        The inputs must have passed `signature.arrange` and `signature.validate`.

        Raises:
            NotReady: The model does not serve now.
            DeadlineExceeded, InvalidArgument, Overloaded: See `Batcher.submit`.
            InvalidArgument: It has more rows than may wait, or sizes that should be equal are not.
        """
        worker = self._worker
        if worker is None or self.state is not ModelState.READY:
            raise self.not_ready()
        if self._text_inputs:
            request.inputs = self.signature.as_text(request.inputs, self._text_inputs)
        image = self.processing.image
        if image is not None:
            image.check(request.inputs[image.index].shape)
            if len(request.inputs) > 1:
                request.shape_key = image.run_shapes(request.row_shapes)  # the others decide what runs together
        if self._shape_check is not None:
            self._shape_check(request.inputs, self.signature.padding)
        if request.rows > self.max_rows:
            self._submit_parts(worker, request)
            return
        if self._pads:
            self._fit(request)
        worker.submit(request)

    async def close(self, grace_s: float) -> None:
        """Finishes what it holds for up to `grace_s`, fails the rest with NotReady, and frees the model. Idempotent."""
        if self.state in (ModelState.DRAINING, ModelState.UNLOADED):
            await self._ended.wait()
            return
        self.stopping.set()
        self.state = ModelState.DRAINING
        try:
            await self._settled.wait()
            if self._worker is not None:
                await self._worker.close(grace_s)
        finally:
            self.state = ModelState.UNLOADED
            self._worker = None
            self._ended.set()

    def not_ready(self) -> NotReady:
        """The error for a caller who comes at the wrong time."""
        why = f" ({self.error})" if self.error else ""
        return NotReady(f"model '{self.name}' version '{self.version}' is {self.state.value}, not ready to serve{why}")

    def statistics(self) -> ModelStatistics:
        """What waits and runs now."""
        if self._worker is None or self._batcher is None:
            return ModelStatistics()
        waiting = self._batcher.statistics()
        return ModelStatistics(
            waiting.pending_requests,
            waiting.pending_rows,
            self._worker.running_rows,
            self._worker.inline,
            waiting.rows_cap,
            waiting.delay_us,
            waiting.one_row_us,
            waiting.cap_us,
            self._metrics.elements,
            self._metrics.padded_elements,
        )

    async def _on_own_thread(self, function: Callable[[], T]) -> T:
        """Calls it on a thread that has this model's share of the processor, as have the threads the engine starts."""
        pool = ThreadPoolExecutor(1, f"forno loads {self}", weigh_this_thread, (self.settings.cpu_weight,))
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function)
        finally:
            pool.shutdown(wait=False)

    def _open(self) -> tuple[Engine[Any], WarmUp, list[Slot]]:
        """The blocking part of `load`: pinned memory, too, takes a while to get."""
        self.engine_name = engine_name(self.path, self.settings)
        engine = open_engine(self.path, self.settings, self.stopping)
        try:
            devices = [ring.device for ring in rings_of(engine)]
            self.gpus = tuple([Gpu(f"{device.name}:{device.ordinal}", device.bus_id) for device in devices])
            warm = self._prove(engine)
            if not warm.signature.batched:
                self.max_rows = 1
            settings = self.settings
            processing = processing_plan(engine.signature, settings.preprocess, settings.postprocess)
            if processing is not None:
                from forno.server.engines.processed import processed  # noqa: PLC0415  (loading Pillow takes a while)

                self.processing = processing
                engine, warm = processed(engine, processing, warm)
            slots = [engine.new_slot(self.max_rows) for _ in range(self.settings.runs_at_once + SPARE_SLOTS)]
            return engine, warm, slots
        except ConfigError as error:
            engine.close()
            raise ConfigError(f"model '{self.name}': {error}") from error
        except BaseException:
            engine.close()
            raise

    def _prove(self, engine: Engine[Any]) -> WarmUp:
        """Makes the first runs, and decides with them which rows run together, and padded."""
        settings, batching = self.settings.padding, self.settings.batching
        engine_rows = engine.profiles.rows if engine.signature.batched else ()
        allowed_rows, most_rows = limited(settings.allowed_rows, batching.max_rows, engine_rows)
        self.max_rows = rows_limit(most_rows, allowed_rows)
        settings = settings.model_copy(update={"allowed_rows": allowed_rows})
        batching = batching.model_copy(update={"max_rows": self.max_rows})
        padding = plan(engine.signature, settings)
        if padding is not None:
            engine.signature = replace(engine.signature, padding=padding.only(()))  # of the count of rows alone
        on_cpu = device_name(self.path, self.settings) == "cpu"
        inline_below_us = self.settings.inline_below_us if on_cpu else 0  # the loop never waits
        warm = warm_up(engine, batching, inline_below_us)
        if padding is None or not (warm.signature.batched and padding.names):
            return warm
        held, why = proven(engine, padding, warm.shapes) if warm.passed else (None, "no run has passed")
        note = ""
        if settings.enabled == "auto":
            note = f"rows of these dimensions are not padded: {why}" if why else ""
            padding = held or (padding.only(()) if allowed_rows else None)
        elif why:
            note = f"padding is on because padding.enabled is true, but it may change answers: {why}"
        engine.signature = replace(warm.signature, padding=padding)
        return replace(warm, signature=engine.signature, note="; ".join(filter(None, (warm.note, note))))

    def _begin(self, engine: Engine[Any], warm: WarmUp, slots: Sequence[Slot]) -> None:
        batching = self.settings.batching
        self.signature = engine.signature
        self.note = warm.note
        if engine.profiles.ranges:
            image = self.processing.image
            run_shapes = None if image is None else image.run_shapes
            self._shape_check = ShapeCheck(engine.profiles, warm.signature.batched, run_shapes)
        self.example_shapes = warm.shapes
        self._pads = warm.signature.padding is not None and bool(warm.signature.padding.names)
        if engine.text_only:
            specs = enumerate(warm.signature.inputs)
            self._text_inputs = tuple([index for index, spec in specs if spec.dtype == OBJECT])
        open_shapes = any(size < 0 for spec in warm.signature.inputs for size in spec.shape[1:])
        self._batcher = Batcher(
            batching,
            self.max_rows,
            by_shape=warm.signature.batched and open_shapes,
            instances=self.settings.runs_at_once,
            refused=self._metrics.refused,
            samples=warm.samples,
        )
        self._worker = Worker(
            str(self),
            engine,
            self._batcher,
            self._metrics,
            slots=slots,
            run_us=warm.run_us,
            inline_below_us=self.settings.inline_below_us if warm.inline and self.settings.cpu_weight == 1 else 0,
            instances=self.settings.runs_at_once,
            cpu_weight=self.settings.cpu_weight,
            clock_us=self._clock_us,
            loop=asyncio.get_running_loop(),
            on_lost=self._fail,
        )
        if warm.note:
            log.log(logging.INFO if warm.passed else logging.WARNING, "%s: %s", self, warm.note)
        self.state = ModelState.READY

    def _fail(self, why: str) -> None:
        """Ends its service, while the server goes on."""
        if self.state is ModelState.READY:
            self.state, self.error = ModelState.FAILED, why
            log.error("%s: %s; start the server anew", self, why)
            self.on_failed()

    def _fit(self, request: Request) -> None:
        """Puts the request into its bucket, and has its own part cut out of what a padded run gives."""
        shapes = request.row_shapes
        fit = self._fits.get(shapes)
        if fit is None:
            padding = self.signature.padding
            if padding is None:
                return
            fit = padding.fit(shapes)
            if len(self._fits) >= _MOST_FITS:  # a caller chooses shapes, and must not choose our memory
                self._fits.clear()
            self._fits[shapes] = fit
        request.shape_key = fit.key
        if fit.cuts is not None:
            request.finish = _cutting(fit.cuts, request.finish)

    def _submit_parts(self, worker: Worker, request: Request) -> None:
        most_rows = self.settings.batching.max_pending_rows
        if request.rows > most_rows:
            raise InvalidArgument(
                f"the request has {request.rows} rows, but at most batching.max_pending_rows = {most_rows} may wait; "
                "send fewer rows a request",
                "inputs",
            )
        arrived_us = request.arrived_us or self._clock_us()

        def count(outcome: str, queue_us: int) -> None:
            if outcome == "ok":
                self._metrics.answered(queue_us, self._clock_us() - arrived_us)
            else:
                self._metrics.refused(outcome)

        whole, parts = parts_of(request, self.max_rows, count)
        try:
            for part in parts:
                if self._pads:
                    self._fit(part)
                worker.submit_part(part)
        except FornoError:
            whole.give_up()
            raise


def _cutting(cuts: tuple[Cut, ...], finish: Callable[[Answer], Any]) -> Callable[[Answer], Any]:
    def cut(answer: Answer) -> Any:
        answer.outputs = [output[index] for output, index in zip(answer.outputs, cuts, strict=True)]
        return finish(answer)

    return cut
