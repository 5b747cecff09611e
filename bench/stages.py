"""Times the stages of a call in Python, inside a server: wraps the functions that each stage begins with.

`bench.profile` puts it there: a `sitecustomize.py` on the server's path calls `watch`. A stage's time is its own,
without the stages that it calls, and without what the two readings of the clock cost.
"""

from __future__ import annotations

import functools
import importlib
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# stage -> where it begins: "module:attribute" or "module:class.method"
STAGES = {
    "events: take what waits from the module": ("_forno_envoy:take",),
    "host: each event to its call": ("forno.server.transport.envoy.host:EnvoyHost._drain",),
    "plan: key to arrays and request": ("forno.server.servicers.hot:HotPredict.__call__",),
    "model: fit and queue": ("forno.server.model:Model.submit",),
    "batcher: admit, order, close": (
        "forno.server.batcher:Batcher.submit",
        "forno.server.batcher:Batcher.try_close",
        "forno.server.batcher:Batcher.ran",
    ),
    "worker: batches and futures": ("forno.server.worker:Worker._pump",),
    "slot: copy the rows in": ("forno.server.slots.host:HostSlot.load",),
    "engine: run": ("forno.server.engines.onnx:OnnxEngine.run",),
    "encode: answer to bytes": ("forno.server.servicers.wire:AnswerWriter.parts",),
    "send: all answers to the worker": ("_forno_envoy:flush",),
    "metrics: once a batch": ("forno.server.metrics:ModelMetrics.batch",),
}
WRITE_S = 0.25
_CALIBRATION = 20_000


class Clock:
    """Self times and counts of stages. Event loop only; a thread writes them to a file."""

    def __init__(self) -> None:
        self.own_ns = dict.fromkeys(STAGES, 0)
        self.calls = dict.fromkeys(STAGES, 0)
        self.inner = dict.fromkeys(STAGES, 0)  # stages begun within
        self._within = [[0, 0]]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""
        within, own_ns, calls, inner, now = self._within, self.own_ns, self.calls, self.inner, time.perf_counter_ns

        @functools.wraps(function)
        def wrapper(*args: Any, **named: Any) -> Any:
            mine = [0, 0]
            within.append(mine)
            began = now()
            try:
                return function(*args, **named)
            finally:
                took = now() - began
                within.pop()
                own_ns[stage] += took - mine[0]
                calls[stage] += 1
                inner[stage] += mine[1]
                outer = within[-1]
                outer[0] += took
                outer[1] += 1

        return wrapper


def _overhead_ns() -> tuple[float, float]:
    """What timing adds to a stage itself, and to the one that calls it."""
    clock = Clock()
    stage = next(iter(STAGES))
    timed = clock.timed(stage, lambda: None)
    began = time.perf_counter_ns()
    for _ in range(_CALIBRATION):
        timed()
    whole = (time.perf_counter_ns() - began) / _CALIBRATION
    own = clock.own_ns[stage] / _CALIBRATION
    return own, whole - own


def watch(file: str) -> None:
    """Wraps every stage and keeps writing their times to a file.

    Raises:
        RuntimeError: A stage begins nowhere any more: `STAGES` is out of date.
    """
    own_ns, outer_ns = _overhead_ns()
    clock = Clock()
    for stage, places in STAGES.items():
        for place in places:
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            try:
                owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
                setattr(owner, name, clock.timed(stage, getattr(owner, name)))
            except (ImportError, AttributeError) as error:
                raise RuntimeError(f"stage {stage!r} begins nowhere: {place}: {error}") from None

    def write() -> None:
        while True:
            time.sleep(WRITE_S)
            times = {
                stage: (clock.own_ns[stage] - clock.calls[stage] * own_ns - clock.inner[stage] * outer_ns) / 1e3
                for stage in STAGES
            }
            text = json.dumps({"own_us": times, "calls": clock.calls})
            new = Path(f"{file}.new")
            new.write_text(text)
            new.replace(file)

    threading.Thread(target=write, name="stages", daemon=True).start()
