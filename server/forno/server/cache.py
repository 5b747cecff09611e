"""Answers given again to equal requests, and equal requests in the air that share one run.

    request --- kept answer? -- yes --> answered at once                     "hit"
                     |
                     no --- equal one in the air? -- yes --> shares its run   "joined"
                                       |
                                       no --> runs; its answer is kept        "miss"

A request is known by a SHA-256 of its model, version and inputs. Which outputs a caller wants is no part of that: a run
makes them all, all are kept, and each caller's own `finish` picks.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import secrets
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from forno.server.clock import clock_us
from forno.server.errors import ConfigError, DeadlineExceeded, EngineFailed, FornoError, Overloaded
from forno.server.metrics import CACHE_RESULTS
from forno.server.model import Model, ModelState
from forno.server.request import NEVER_US, Answer, Request
from forno.server.warmup import WarmUp, unrepeatable
from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from asyncio import TimerHandle
    from collections.abc import Callable, MutableMapping, Sequence
    from pathlib import Path

    from forno.server.config import CacheSettings, ModelSettings
    from forno.server.engines import Engine
    from forno.server.metrics import ModelMetrics
    from forno.server.slots import Slot

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.model")

_ENTRY_BYTES = 448
"""Memory of a kept answer without its outputs: key, places in the map, the objects that hold it together."""
_ARRAY_BYTES = 192
"""Memory of an array without its elements."""


class CachedModel(Model):
    """A model whose answers are kept. Made where `cache.max_bytes` is set; otherwise as `Model`.

    Raises:
        ConfigError: At `load`, where the same input gives different answers.
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
        super().__init__(name, version, path, settings, metrics, clock)
        self.cache = ResponseCache(str(self), settings.cache, super().submit, metrics.cache, clock)

    def submit(self, request: Request) -> None:
        """As `Model.submit`; a request whose answer is kept has it on return."""
        if self.state is not ModelState.READY:
            raise self.not_ready()
        self.cache.submit(request)

    async def close(self, grace_s: float) -> None:
        """As `Model.close`; what is kept goes with the model."""
        try:
            await super().close(grace_s)
        finally:
            self.cache.clear()

    def _open(self) -> tuple[Engine[Any], WarmUp, list[Slot]]:
        engine, warm, slots = super()._open()
        try:
            difference = unrepeatable(engine)
            if difference:
                raise ConfigError(
                    f"model '{self.name}': cache.max_bytes is {self.settings.cache.max_bytes}, but {difference}; "
                    "a model that is not deterministic cannot be cached: remove `cache`, or set it to 0 bytes"
                )
        except BaseException:
            engine.close()
            raise
        return engine, warm, slots


@dataclass(slots=True)
class _Entry:
    """One kept answer. The outputs are its own, and read-only."""

    outputs: tuple[Array, ...]
    expires_us: int
    size_bytes: int


class _Flight:
    """Equal requests in the air; stands where the run that they share has its future. Held by that run alone.

    It is done as soon as nobody waits for it any more, whether or not anybody has told.
    """

    __slots__ = ("__weakref__", "_crash", "expires_us", "key", "waiters")

    def __init__(self, key: bytes, leader: Request, crash: Callable[[_Flight, Exception], None]) -> None:
        self.key = key
        self.expires_us = leader.expires_us
        self.waiters: dict[Request, TimerHandle | None] = {leader: None}  # the batcher sees to the leader's time
        self._crash = crash

    def done(self) -> bool:
        """Whether it has ended, or nobody waits."""
        return all(request.future.done() for request in self.waiters)

    def set_result(self, _result: None) -> None:
        """Has nothing to tell: `finish` has told everybody."""

    def set_exception(self, error: Exception) -> None:
        """Tells everybody."""
        self._crash(self, error)

    def end(self) -> list[Request]:
        """Lets everybody go.

        Returns:
            Those who wait for an answer.
        """
        for timer in self.waiters.values():
            if timer is not None:
                timer.cancel()
        waiting = [request for request in self.waiters if not request.future.done()]
        self.waiters.clear()
        return waiting


class ResponseCache:
    """Kept answers of one version of a model, and its requests in the air. Owned by it; event loop only.

    A waiter keeps its own deadline and may be cancelled by itself; the run is dropped when the last one has left. An
    error goes to all who wait, and is not kept.

    Invariant: `kept_bytes` <= max_bytes.

    Args:
        name: The model and its version.
        settings: The limits.
        run: Takes a request that has to run; raises as `Model.submit`.
        counts: Requests by `CACHE_RESULTS`; goes on from what it has.
        clock_us: Monotonic time.
    """

    def __init__(
        self,
        name: str,
        settings: CacheSettings,
        run: Callable[[Request], None],
        counts: MutableMapping[str, int],
        clock_us: Callable[[], int],
    ) -> None:
        self.kept_bytes = 0
        self._name = name
        self._max_bytes = settings.max_bytes
        self._ttl_us = int(settings.ttl_s * 1e6)
        self._run = run
        self._clock_us = clock_us
        self._counts = counts
        for result in CACHE_RESULTS:
            counts.setdefault(result, 0)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently asked for first
        self._flights: WeakValueDictionary[bytes, _Flight] = WeakValueDictionary()  # gone with their runs

    def __len__(self) -> int:
        return len(self._entries)

    def submit(self, request: Request) -> None:
        """Answers a request from what is kept, lets it share a run, or has it run.

        Raises:
            FornoError: As `run`; what can share a run is never refused.
        """
        now_us = self._clock_us()
        if not request.arrived_us:
            request.arrived_us = now_us
        key = key_of(self._name, request.inputs) if request.expires_us > now_us else None
        if key is None:  # out of time, or of elements without a key: the model itself shall judge
            self._run(request)
            return
        outputs = self._find(key, now_us)
        if outputs is None:
            self._counts[self._board(key, request, now_us)] += 1
        else:
            self._counts["hit"] += 1
            self._give(request, Answer(outputs, queue_us=0, compute_us=0, batch_rows=0))

    def clear(self) -> None:
        """Forgets every kept answer."""
        self._entries.clear()
        self.kept_bytes = 0

    def _board(self, key: bytes, request: Request, now_us: int) -> str:
        """Lets a request share the run of an equal one, or has it run; says which."""
        flight = self._flights.get(key)
        if flight is not None and not flight.done():
            timer = None
            if request.expires_us < NEVER_US:
                wait_s = (request.expires_us - now_us) / 1e6
                timer = asyncio.get_running_loop().call_later(wait_s, _expire, request)
            flight.waiters[request] = timer
            return "joined"
        flight = _Flight(key, request, self._crash)
        finish = partial(self._land, flight, request.arrived_us)
        self._run(replace(request, finish=finish, future=flight))  # type: ignore[arg-type]
        self._flights[key] = flight
        return "miss"

    def _board_again(self, key: bytes, request: Request) -> None:
        try:
            if not request.future.done():
                self._board(key, request, self._clock_us())
        except FornoError as error:
            request.future.set_exception(error)

    def _land(self, flight: _Flight, arrived_us: int, answer: Answer) -> None:
        """Receives the answer of a run, while its slot is held. `arrived_us` is what its queue time counts from."""
        outputs = self._keep(flight.key, answer.outputs)
        started_us = arrived_us + answer.queue_us
        for request in flight.end():
            queue_us = max(0, started_us - request.arrived_us)
            self._give(request, replace(answer, outputs=outputs, queue_us=queue_us))

    def _crash(self, flight: _Flight, error: Exception) -> None:
        """Receives the error of a run. If that was for want of time, those who have more of it try again."""
        out_of_time = isinstance(error, DeadlineExceeded | Overloaded)
        for request in sorted(flight.end(), key=lambda request: request.expires_us):
            if out_of_time and request.expires_us > flight.expires_us:
                # Later: whoever tells of the error may be in the middle of the queue.
                asyncio.get_running_loop().call_soon(self._board_again, flight.key, request)
            else:
                request.future.set_exception(copy.copy(error))  # one each: raising it adds to its traceback

    def _give(self, request: Request, answer: Answer) -> None:
        """Answers one request, as the worker does."""
        try:
            request.future.set_result(request.finish(answer))
        except FornoError as error:
            request.future.set_exception(error)
        except Exception:  # an encoder's fault is its own request's alone
            log_id = secrets.token_hex(4)
            log.exception("%s: the answer could not be encoded [%s]", self._name, log_id)
            text = f"the answer could not be encoded; the server's log has more under {log_id}"
            request.future.set_exception(EngineFailed(text))

    def _find(self, key: bytes, now_us: int) -> tuple[Array, ...] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_us <= now_us:
            self._forget(key)
            return None
        self._entries.move_to_end(key)
        return entry.outputs

    def _keep(self, key: bytes, outputs: Sequence[Array]) -> Sequence[Array]:
        """Keeps a copy of the outputs, if they fit; returns what can be read now."""
        size_bytes = _ENTRY_BYTES + sum(_size_bytes(output) for output in outputs)
        if size_bytes > self._max_bytes:
            return outputs
        own = tuple([np.array(output, order="C") for output in outputs])
        for array in own:
            array.flags.writeable = False  # every later caller is given these very arrays
        self._forget(key)
        while self.kept_bytes + size_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))
        expires_us = self._clock_us() + self._ttl_us if self._ttl_us else NEVER_US
        self._entries[key] = _Entry(own, expires_us, size_bytes)
        self.kept_bytes += size_bytes
        return own

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.kept_bytes -= entry.size_bytes


def key_of(name: str, inputs: Sequence[Array]) -> bytes | None:
    """What tells a request from every other: a hash of 256 bits over element types, shapes and elements.

    Every part has its length before it, so that no two requests give the same bytes to hash.

    Args:
        name: The model and its version.
        inputs: In the signature's order.

    Returns:
        The hash; None where an element is neither a number nor a string.
    """
    # `num` tells types apart that NumPy does not know itself, and `str` their byte order; `name` would cost 2 us.
    parts = [name, *[f"{array.dtype.num}{array.dtype.str}{array.shape}" for array in inputs]]
    digest = hashlib.sha256(repr(parts).encode())
    for array in inputs:
        if array.dtype == OBJECT:
            for value in array.ravel().tolist():
                if isinstance(value, str):
                    data, kind = value.encode("utf-8", "surrogatepass"), b"s"
                elif isinstance(value, bytes):
                    data, kind = value, b"b"
                else:
                    return None
                digest.update(kind + len(data).to_bytes(8, "big") + data)
        else:
            digest.update(array.reshape(-1).view(np.uint8).data)  # its type and shape, and so its length, stand before
    return digest.digest()


def _size_bytes(array: Array) -> int:
    """Memory of an array, its strings included."""
    strings = sum(map(sys.getsizeof, array.ravel().tolist())) if array.dtype == OBJECT else 0
    return _ARRAY_BYTES + array.nbytes + strings


def _expire(request: Request) -> None:
    if not request.future.done():
        text = "the deadline passed while an equal request, whose answer this one shares, had none yet"
        request.future.set_exception(DeadlineExceeded(text))
