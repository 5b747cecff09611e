"""Doubles cranked by hand: time moves, a loop turns and an engine answers only when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.profiles import Profiles
from forno.server.request import NEVER_US, Answer, Request
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.host import HostSlot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Array = np.ndarray[Any, np.dtype[Any]]

PATIENCE_S = 10


class Clock:
    """Stands still until told otherwise."""

    def __init__(self, now_us: int = 1_000_000) -> None:
        self.now_us = now_us

    def __call__(self) -> int:
        return self.now_us


class PuppetLoop(asyncio.SelectorEventLoop):
    """A real event loop that makes one pass per `turn`, on the given clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.posted: SimpleQueue[None] = SimpleQueue()  # calls from other threads
        super().__init__()

    def time(self) -> float:
        return self.clock.now_us / 1e6

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:
        handle = super().call_soon_threadsafe(*args, **options)
        self.posted.put(None)
        return handle

    def turn(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.call_soon(self.stop)
            self.run_forever()

    def turn_when_posted(self) -> None:
        """Waits for another thread to call, then makes a pass."""
        self.posted.get(timeout=PATIENCE_S)
        self.turn()


class PuppetEngine:
    """Answers `x + 1` and remembers what ran. With `gated`, each run waits for `let_run`."""

    name = "puppet"
    text_only = False
    profiles = Profiles()

    def __init__(self, *, gated: bool = False, shape: tuple[int, ...] = (-1, -1)) -> None:
        spec = TensorSpec("x", np.dtype(np.int64), shape)
        self.signature = Signature((spec,), (spec,), batched=True)
        self.runs: list[Array] = []  # that did not fail
        self.failed_runs: list[Array] = []
        self.fails = 0  # so many next runs
        self.poison: int | None = None  # fails every run with such a row
        self.closed = 0
        self.threads: set[int] = set()
        self.after: Callable[[], None] = lambda: None
        self._gate = threading.Semaphore(0) if gated else None

    def let_run(self) -> None:
        assert self._gate is not None
        self._gate.release()

    def new_slot(self, max_rows: int) -> HostSlot:
        return HostSlot(self.signature, max_rows)

    def run(self, slot: HostSlot, rows: int) -> Sequence[Array]:
        if self._gate is not None:
            assert self._gate.acquire(timeout=PATIENCE_S)
        (x,) = slot.inputs
        assert x.shape[0] == rows
        self.threads.add(threading.get_ident())
        self.after()
        if self.fails or (self.poison is not None and self.poison in x):
            self.fails -= min(self.fails, 1)
            self.failed_runs.append(x.copy())
            raise RuntimeError("secret internals")
        self.runs.append(x.copy())
        return [x + 1]

    def settle(self, *, small: bool) -> bool:
        return False

    def close(self) -> None:
        self.closed += 1


class RecordingMetrics:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], list[int], int, int, bool]] = []
        self.reasons: Counter[str] = Counter()
        self.elements = 0
        self.padded_elements = 0

    def batch(
        self,
        queue_us: Sequence[int],
        total_us: Sequence[int],
        rows: int,
        compute_us: int,
        failed: bool = False,
    ) -> None:
        self.batches.append((list(queue_us), list(total_us), rows, compute_us, failed))

    def answered(self, queue_us: int, total_us: int) -> None:
        self.reasons["ok"] += 1

    def padding(self, elements: int, padded: int) -> None:
        self.elements += elements
        self.padded_elements += padded

    def refused(self, reason: str, count: int = 1) -> None:
        self.reasons[reason] += count


def request(
    loop: asyncio.AbstractEventLoop,
    *,
    number: int = 0,
    rows: int = 1,
    width: int = 2,
    arrived_us: int = 1,
    expires_us: int = NEVER_US,
    priority: int = 0,
    finish: Callable[[Answer], Any] | None = None,
) -> Request:
    """A request whose every element says whose it is."""
    x = np.full((rows, width), number * 10, np.int64)
    future: asyncio.Future[Any] = loop.create_future()
    return Request(
        (x,),
        rows,
        finish or (lambda answer: answer.outputs[0].tolist()),
        future,
        arrived_us,
        expires_us,
        priority,
    )
