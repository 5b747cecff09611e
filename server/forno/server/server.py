"""The life of a server, in order: load, warm up, SERVING, wait, NOT_SERVING, drain, close."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server

from forno.kernels.nvml import Nvml
from forno.server import banner, fixed, logs
from forno.server.cache import CachedModel
from forno.server.catalog import Catalog
from forno.server.clock import clock_us
from forno.server.errors import NotReady
from forno.server.metrics import Metrics
from forno.server.security import guard
from forno.server.servicers import tracing
from forno.server.servicers.health import HealthServicer
from forno.server.servicers.hot import ITEM_LAYOUT, LAYOUT, HotPredict
from forno.server.servicers.hot_rest import HotRest
from forno.server.servicers.predictor import PredictorServicer
from forno.server.servicers.rest import RestServicer
from forno.server.servicers.symbols import Symbols
from forno.server.telemetry import Telemetry
from forno.v1 import predictor_pb2, predictor_pb2_grpc, rest_pb2, rest_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from forno.server.config import Config
    from forno.server.model import Model
    from forno.server.repository import ModelSpec

log = logging.getLogger("forno")

SERVICE = predictor_pb2.DESCRIPTOR.services_by_name["Predictor"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_LINGER_S = 1.0
"""How long a model that was replaced goes on for calls that have found it and are still being read."""
REST_SERVICE = rest_pb2.DESCRIPTOR.services_by_name["Rest"].full_name


class Host(Protocol):
    """A transport: how calls reach the servicers."""

    @property
    def grpc(self) -> Any:
        """What generated `add_XServicer_to_server` functions are given."""

    async def start(self) -> int:
        """Opens the doors; returns the port where it is the host that knows it, else 0."""

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets those in flight end, cuts off what is left after `grace_s`."""


class Server:
    """Models, endpoints and servicers on one transport. One a process; event loop only; ends when `run` returns.

    Args:
        config: All settings.
        specs: The models to serve.
        address: HOST:PORT for people, with the port that was asked for.
        rest: Whether REST is served at that address.
        show: Prints a text for people; None = print nothing.
        rates: Of a replica, the file in which all of them count clients' rates.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[ModelSpec],
        address: str,
        *,
        rest: bool,
        show: Callable[[str], None] | None = print,
        rates: Path | None = None,
    ) -> None:
        self._config = config
        self._address = address
        self._rest = rest
        self._show = show or (lambda _text: None)
        self.metrics = Metrics()
        self._catalog = Catalog(config, specs, self.metrics)
        self.registry = self._catalog.registry
        self.guard = guard.make(config, address, rates)
        """Admits the transport's calls; None where all may come in."""
        self._health = HealthServicer(self.registry)
        self._nvml = Nvml()
        self._stop = asyncio.Event()
        self._telemetry: Telemetry | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopted: WeakSet[Model] = WeakSet()  # by a reload, which may be under way

    def stop(self) -> None:
        """Begins the end: `run` drains and returns, and gives up what it is loading."""
        self._stop.set()
        for model in (*self.registry.models(), *self._adopted):
            model.stopping.set()

    async def run(self, host: Host, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serves until `stop`.

        Raises:
            ConfigError: A model cannot be loaded, or the address cannot be listened on.
        """
        telemetry = self._telemetry = Telemetry.start(self._config.telemetry, self.metrics)
        self._mount(host, telemetry)
        self.metrics.watch(self._gauges)
        self._set_health(serving=False)
        port = await host.start()
        export = asyncio.create_task(telemetry.export_metrics()) if telemetry else None
        try:
            async with self._changing:
                if not await self._load():
                    return
            self._set_health(serving=True)
            if port:
                self._address = f"{self._address.rpartition(':')[0]}:{port}"
            colour = sys.stdout.isatty()
            models, named = self.registry.models(), self._catalog.endpoints.values()
            security = self._config.security
            self._show(
                banner.render(
                    self._address,
                    self._rest,
                    models,
                    named,
                    colour,
                    settings=self._config.endpoints,
                    tls=security.tls.certificate_file is not None,
                    credential=bool(security.keys_file or security.jwt.jwks_file) and not security.anonymous,
                )
            )
            on_ready()
            await self._stop.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            self._health.shut_down()
            await host.stop(self._config.server.drain_s)
            for model in self.registry.models():
                await model.close(0.0)
            self._nvml.close()
            if telemetry and export:
                export.cancel()
                await telemetry.close(2.0)

    def _mount(self, host: Host, telemetry: Telemetry | None) -> None:
        """Adds every servicer to the transport."""
        predictor = PredictorServicer(self.registry, self._catalog.endpoints)
        rest = RestServicer(self.registry, self._catalog.endpoints, self.metrics)
        if telemetry:
            tracing.watch_servicer(predictor, SERVICE, telemetry)
            tracing.watch_servicer(rest, REST_SERVICE, telemetry)
        for model in self.registry.models():
            self._adopt(model)
        predictor_pb2_grpc.add_PredictorServicer_to_server(predictor, host.grpc)
        add_hot_handler = getattr(host.grpc, "add_hot_handler", None)
        if add_hot_handler and not telemetry:  # a traced call needs its metadata, and a task to carry its trace
            hot = HotPredict(self.registry, clock_us)
            add_hot_handler(f"/{SERVICE}/Predict", hot, LAYOUT)
            add_hot_handler(f"/{SERVICE}/PredictStream", hot, ITEM_LAYOUT)
        rest_pb2_grpc.add_RestServicer_to_server(rest, host.grpc)
        if add_http_handler := getattr(host.grpc, "add_http_handler", None):
            add_http_handler(f"/{REST_SERVICE}/Predict", HotRest(self.registry, clock_us), hot=not telemetry)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, host.grpc)
        names = (SERVICE, REST_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        describer = reflection.aio.ReflectionServicer(names, Symbols())  # type: ignore[attr-defined]
        add_ServerReflectionServicer_to_server(describer, host.grpc)

    async def _load(self) -> bool:
        """Loads every model; False where it was stopped."""
        began = time.monotonic()

        def show(model: Model) -> None:
            nonlocal began
            self._show(banner.loaded(model, time.monotonic() - began))
            began = time.monotonic()

        try:
            await self._catalog.load(show)
        except NotReady:
            return False
        gc.freeze()  # what start-up has made stays; to look for garbage in it first would take longer than it saves
        gc.enable()
        return True

    def reload(self, read: Callable[[], tuple[Config, Sequence[ModelSpec]]]) -> None:
        """Begins to change to the settings and models that there are now; the log says how it went. No call is lost.

        Args:
            read: Reads both, on another thread.
        """
        task = asyncio.create_task(self._reload(read))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self, read: Callable[[], tuple[Config, Sequence[ModelSpec]]]) -> None:
        async with self._changing:
            log.info("reading the settings again")
            try:
                config, kept = fixed.keep(self._config, (found := await asyncio.to_thread(read))[0])
                config, renewed, more = guard.renew(self.guard, self._config, config, self._address)
                change = await self._catalog.change(config, found[1], self._adopt)
            except Exception as error:  # noqa: BLE001  (whatever it is, what serves goes on)
                fixed.log_refused(log, error)
                return
            self._config = config
            if self.guard and renewed:
                self.guard.become(renewed)
            logs.configure(config.server.log_level, config.server.log_format)
            for model in change.gone:
                self._health.forget(model.name)
            self._set_health(serving=True)
            if kept := [*kept, *more]:
                log.warning("%s", fixed.told(kept))
            new, gone = (", ".join(map(str, models)) or "none" for models in change)
            log.info("reloaded; models loaded: %s; let go: %s", new, gone)
            await asyncio.sleep(_LINGER_S)
            await asyncio.gather(*(model.close(config.server.drain_s) for model in change.gone))

    def _adopt(self, model: Model) -> None:
        model.on_failed = partial(self._set_failed, model)
        self._adopted.add(model)
        if self._stop.is_set():
            model.stopping.set()
        if self._telemetry:
            tracing.watch_model(model)

    def health_names(self) -> set[str]:
        """What grpc.health.v1 is asked about: the whole server as "", the service, and each model by name."""
        return {"", SERVICE, *(model.name for model in self.registry.models())}

    def _set_health(self, *, serving: bool) -> None:
        for name in self.health_names():
            self._health.set(name, serving=serving)

    def _set_failed(self, model: Model) -> None:
        """Has a model that can serve no more be noticed: whoever looks after this process is to start it anew."""
        for name in ("", SERVICE, model.name) if model in self.registry.models() else ():
            self._health.set(name, serving=False)

    def _gauges(self) -> Iterable[tuple[str, dict[str, str], float]]:
        for model in self.registry.models():
            labels = {"model": model.name, "version": model.version}
            statistics = model.statistics()
            yield "forno_pending_requests", labels, statistics.pending_requests
            yield "forno_pending_rows", labels, statistics.pending_rows
            yield "forno_running_rows", labels, statistics.running_rows
            yield "forno_batch_rows_limit", labels, statistics.rows_cap
            yield "forno_batch_delay_seconds", labels, statistics.delay_us / 1e6
            yield "forno_run_expected_seconds", {**labels, "rows": "1"}, statistics.one_row_us / 1e6
            yield "forno_run_expected_seconds", {**labels, "rows": "limit"}, statistics.cap_us / 1e6
            if isinstance(model, CachedModel):
                yield "forno_cache_bytes", labels, model.cache.kept_bytes
                yield "forno_cache_entries", labels, len(model.cache)
            yield "forno_model_state", {**labels, "state": model.state.name.lower()}, 1.0
        for gpu in sorted({gpu for model in self.registry.models() for gpu in model.gpus if gpu.bus_id}):
            reading = self._nvml.read(gpu.bus_id)
            if reading is not None:
                yield "forno_gpu_memory_used_bytes", {"gpu": gpu.name}, reading.used_bytes
                yield "forno_gpu_memory_total_bytes", {"gpu": gpu.name}, reading.total_bytes
                yield "forno_gpu_busy_ratio", {"gpu": gpu.name}, reading.busy
