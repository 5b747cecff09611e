"""The only door between the event loop and the threads that run a model."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from forno.server import turn
from forno.server.errors import EngineFailed, EngineLost, FornoError, NotReady
from forno.server.request import NEVER_US, Answer
from forno.server.sharing import weigh_this_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np

    from forno.server.batcher import Batcher
    from forno.server.engines import Engine
    from forno.server.metrics import ModelMetrics
    from forno.server.request import Batch, Request
    from forno.server.slots import Slot

    Array = np.ndarray[Any, np.dtype[Any]]

log = logging.getLogger("forno.model")

SPARE_SLOTS = 1
"""Filled, or encoded from, while the others run."""
_INLINE_BATCHES = 2
"""Most runs in one pass of the event loop, so that it also sees to its sockets."""
_SHORT_US = 500
_LONG_US = 5_000
"""Handing a batch over to the thread costs about 100 us. Behind a short run, the next batch is therefore closed at once
and waits at the thread's door; behind one that is neither short nor long only if it is full, since it would find more
company; and behind a long one no batch is: until the engine is free requests can be overtaken and cancelled."""
_SLOW_RUNS = 8
"""So many slow runs in a row on the event loop move a model to a thread for good."""
_SLOW_FACTOR = 4
_EXPIRY_GRAIN_US = 1_000
"""Requests whose time runs out while they wait are answered at most this much later, many in one go."""
_LAG_RISE, _LAG_FALL = 2, 16
"""How fast a longer and a shorter way back from the thread are believed: what is told to the batcher is seldom
exceeded."""


@dataclass(slots=True, eq=False)
class _Run:
    """A batch on its way through the engine, and what came of it."""

    batch: Batch
    slot: Slot
    outputs: Sequence[Array] = ()
    error: Exception | None = None
    started_us: int = 0  # 0 = not yet
    ended_us: int = 0


class Worker:
    """Takes batches from a batcher to an engine and answers to the futures that wait. Owned by one Model.

    Every method is for the event loop only. Runs happen on the loop itself (`inline`) or on the threads that this
    object starts, one an instance; ends with `close`, which also closes the engine.

    Args:
        name: The model, for logs and thread names.
        engine: What runs; nobody else uses it from now on.
        batcher: Where requests wait; nobody else uses it from now on.
        metrics: Told once per batch.
        slots: Of the engine, one for each run at once and one to be filled or encoded from meanwhile.
        run_us: How long a full run took at warm-up.
        inline_below_us: Runs on the event loop while they stay near this; 0 = always on a thread.
        instances: Most runs at once.
        cpu_weight: Each thread's share of the processor, see `sharing.py`.
        clock_us: Monotonic time; called on both threads.
        loop: Where every method is called, and futures resolve.
        on_lost: Told why, once the engine can run nothing any more; from then on every request is refused.
    """

    def __init__(
        self,
        name: str,
        engine: Engine[Any],
        batcher: Batcher,
        metrics: ModelMetrics,
        *,
        slots: Sequence[Slot],
        run_us: int,
        inline_below_us: int,
        instances: int = 1,
        cpu_weight: float = 1.0,
        clock_us: Callable[[], int],
        loop: asyncio.AbstractEventLoop,
        on_lost: Callable[[str], None] = lambda _why: None,
    ) -> None:
        self._name = name
        self._engine = engine
        self._batcher = batcher
        self._metrics = metrics
        self._clock_us = clock_us
        self._run_us = run_us
        self._instances = instances
        self._cpu_weight = cpu_weight
        self._slow_us = inline_below_us * _SLOW_FACTOR
        self._slow_runs = 0
        self._loop = loop
        self._on_lost = on_lost
        self._free = [*slots]
        self._runs: list[_Run] = []  # handed to the threads and not yet answered, the oldest first
        self._door: SimpleQueue[_Run | None] | None = None  # None while runs are inline
        self._closed = False
        self._split = False  # whether parts of requests came
        self._quiet: asyncio.Future[None] | None = None  # somebody waits for the last answer
        self._threads = 0  # that have not ended; counted down under `_leaving`, and the last closes the engine
        self._leaving = threading.Lock()
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._pump_is_due = False
        self._now_us = clock_us()  # when the pump became due
        self._timer: asyncio.TimerHandle | None = None
        self._timer_us = 0
        if not inline_below_us or instances > 1:
            self._start_threads()

    @property
    def inline(self) -> bool:
        """Whether runs happen on the event loop."""
        return self._door is None

    @property
    def running_rows(self) -> int:
        """Rows that are with the engine now."""
        return sum(run.batch.rows for run in self._runs)

    def submit(self, request: Request) -> None:
        """Queues a request; its future resolves after its run.

        Raises:
            DeadlineExceeded, InvalidArgument, Overloaded: See `Batcher.submit`.
        """
        if not self._pump_is_due:
            self._pump_soon()
        if not request.arrived_us:
            request.arrived_us = self._now_us
        self._batcher.submit(request)

    def submit_part(self, request: Request) -> None:
        """As `submit`, for a part of a request; the metrics leave it out from now on, wherever it ends."""
        self._split = True
        self.submit(request)

    async def close(self, grace_s: float) -> None:
        """Finishes what was submitted, fails what is left after `grace_s`, and stops. To be called once.

        A run that hangs keeps its thread, which frees the engine when it ends; nobody waits for it.
        """
        try:
            if self._batcher.pending_requests or self._runs:
                self._batcher.hurry()
                self._pump_soon()
                self._quiet = self._loop.create_future()
                await asyncio.wait([self._quiet], timeout=grace_s)
        finally:
            self._stop()
        if self._door is not None and not self._runs:
            await self._stopped

    def _stop(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        left = [request for run in self._runs for request in run.batch.requests] + self._batcher.take_all()
        _refuse(left, NotReady, f"model '{self._name}' stopped before the request had run")
        if self._door is None:
            self._engine.close()
        else:
            for _ in range(self._instances):
                self._door.put(None)

    def _pump_soon(self) -> None:
        self._pump_is_due = True
        self._now_us = self._clock_us()
        turn.soon(self._loop, self._pump)

    def _pump(self) -> None:
        """Gives the engine what it can take; once per pass of the event loop, however many requests came in it."""
        self._pump_is_due = False
        if self._closed:
            return
        now_us = self._run_inline() if self._door is None else self._hand_over(self._door)
        if self._batcher.pending_requests:
            self._set_timer(now_us)
        elif self._quiet is not None and not self._runs and not self._quiet.done():
            self._quiet.set_result(None)

    def _run_inline(self) -> int:
        """Runs a few batches right here; what is left gets its turn after the loop has seen to its sockets."""
        now_us = self._clock_us()
        for _ in range(_INLINE_BATCHES):
            batch = self._batcher.try_close(now_us)
            if batch is None:
                return now_us
            run = _Run(batch, self._free[0])
            self._execute(run, now_us)
            now_us = run.ended_us
            self._learn(run)
            self._answer(run, now_us)
            if now_us - run.started_us <= self._slow_us:
                self._slow_runs = 0
            elif self._slow_runs + 1 < _SLOW_RUNS:
                self._slow_runs += 1
            else:
                log.info("%s: its runs are too long for the event loop; it has a thread of its own now", self._name)
                self._start_threads()
                break
            if not self._batcher.pending_requests:
                return now_us
            now_us = self._clock_us()
        if self._batcher.pending_requests and not self._pump_is_due:
            self._pump_soon()
        return now_us

    def _hand_over(self, door: SimpleQueue[_Run | None]) -> int:
        """Closes batches while the threads can use them, and no earlier."""
        now_us = self._clock_us()
        while self._free:
            only_full = len(self._runs) >= self._instances and self._run_us >= _SHORT_US
            if only_full and self._run_us >= _LONG_US:
                break
            batch = self._batcher.try_close(now_us, only_full=only_full)
            if batch is None:
                break
            run = _Run(batch, self._free.pop())
            self._runs.append(run)
            door.put(run)
            self._expect(now_us)
        return now_us

    def _start_threads(self) -> None:
        self._door = SimpleQueue()
        self._threads = self._instances
        for number in range(1, self._threads + 1):
            name = f"forno {self._name}" if self._threads == 1 else f"forno {self._name} {number}"
            threading.Thread(target=self._serve, args=(self._door,), name=name, daemon=True).start()

    def _serve(self, door: SimpleQueue[_Run | None]) -> None:
        """A thread of the engine: runs what comes through the door, until None."""
        weigh_this_thread(self._cpu_weight)
        with suppress(RuntimeError):  # the loop was closed while a run went on: nobody is left to answer to
            while (run := door.get()) is not None:
                self._execute(run, self._clock_us())
                self._loop.call_soon_threadsafe(self._completed, run)
        with self._leaving:
            self._threads -= 1
            if self._threads:
                return
        try:
            self._engine.close()
        finally:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopped.set_result, None)

    def _execute(self, run: _Run, started_us: int) -> None:
        """Copies the rows together and runs them. On whichever thread runs the engine."""
        run.started_us = started_us
        batch = run.batch
        try:
            run.slot.load([request.inputs for request in batch.requests], batch.rows)
            run.outputs = self._engine.run(run.slot, batch.rows)
        except Exception as error:  # noqa: BLE001  (engines raise what they like; the server goes on)
            run.error = error
        run.ended_us = self._clock_us()

    def _completed(self, run: _Run) -> None:
        """Receives a run from the thread."""
        self._runs.remove(run)
        if not self._closed:
            now_us = self._clock_us()
            self._run_us = run.ended_us - run.started_us
            self._learn(run)
            self._expect(now_us)
            if self._door is not None:
                self._hand_over(self._door)  # the engine first: it works on while answers are encoded
            self._answer(run, self._clock_us())
            self._loop.call_soon(self._notice_lag, run.ended_us)  # behind those who wait for the answers
        self._free.append(run.slot)
        self._pump()

    def _expect(self, now_us: int) -> None:
        self._batcher.expect([(run.batch, run.started_us) for run in self._runs], now_us)

    def _notice_lag(self, ended_us: int) -> None:
        """Learns how long answers are on their way after a run."""
        more_us = self._clock_us() - ended_us - self._batcher.lag_us
        self._batcher.lag_us += more_us // (_LAG_RISE if more_us > 0 else _LAG_FALL)

    def _learn(self, run: _Run) -> None:
        if run.error is None:
            self._batcher.ran(run.batch, run.ended_us - run.started_us, run.ended_us)

    def _answer(self, run: _Run, now_us: int) -> None:
        """Resolves the futures of a batch, lets its slot go, and counts it."""
        batch, started_us = run.batch, run.started_us
        requests, rows = batch.requests, batch.rows
        if run.error is not None and len(requests) > 1 and not isinstance(run.error, EngineLost):
            why = f"{len(requests)} requests failed to run together, each runs alone now: {run.error}"
            log.warning("%s: %s", self._name, why)
            run.slot.release()
            self._batcher.take_back(batch)
            return
        compute_us = run.ended_us - started_us
        queue_us = [started_us - request.arrived_us for request in requests]
        try:
            if run.error is not None:
                raise run.error
            parts = batch.split(run.outputs)
        except Exception as error:  # noqa: BLE001  (whatever the engine raised)
            self._fail(requests, "the model failed to run", error)
        else:
            for request, outputs, waited_us in zip(requests, parts, queue_us, strict=True):
                future = request.future
                if future.done():
                    continue
                try:
                    result = request.finish(Answer(outputs, waited_us, compute_us, rows))
                    if not future.done():
                        future.set_result(result)
                except FornoError as error:
                    future.set_exception(error)
                except Exception as error:  # noqa: BLE001  (an encoder's fault is its own request's alone)
                    self._fail([request], "the answer could not be encoded", error)
        if isinstance(run.error, EngineLost):
            self._lose(str(run.error))
        run.slot.release()
        if run.slot.elements:
            self._metrics.padding(run.slot.elements, run.slot.padded_elements)
        if self._split:
            whole = [index for index, request in enumerate(requests) if not request.is_part]
            requests, queue_us = [requests[index] for index in whole], [queue_us[index] for index in whole]
        total_us = [now_us - request.arrived_us for request in requests]
        self._metrics.batch(queue_us, total_us, rows, compute_us, failed=run.error is not None)

    def _lose(self, why: str) -> None:
        """Refuses what waits: others may still answer it."""
        self._on_lost(why)
        _refuse(self._batcher.take_all(), NotReady, f"model '{self._name}' cannot run any more: its device is lost")

    def _fail(self, requests: Iterable[Request], what: str, error: Exception) -> None:
        """Answers without internals, and logs them under an id that the answer carries."""
        log_id = secrets.token_hex(4)
        log.error("%s: %s [%s]", self._name, what, log_id, exc_info=error)
        _refuse(requests, EngineFailed, f"{what}; the server's log has more under {log_id}")

    def _set_timer(self, now_us: int) -> None:
        """Wakes the pump when a batch falls due or requests expire, whichever comes first."""
        expiry_us, close_us = self._batcher.next_expiry_us(), None
        if not self._pump_is_due and (self._door is None or len(self._runs) < self._instances):
            close_us = self._batcher.next_close_us()
        wake_us = min(
            NEVER_US if expiry_us is None else expiry_us + _EXPIRY_GRAIN_US,
            NEVER_US if close_us is None else close_us,
        )
        if wake_us == NEVER_US or (self._timer is not None and self._timer_us <= wake_us):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_us = wake_us
        self._timer = self._loop.call_later(max(wake_us - now_us, 0) / 1e6, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if not self._closed:
            self._batcher.expire(self._clock_us())
            self._pump()


def _refuse(requests: Iterable[Request], kind: type[FornoError], why: str) -> None:
    """Answers those that still wait, each with an error of its own."""
    for request in requests:
        if not request.future.done():
            request.future.set_exception(kind(why))
