"""A model on a device: ONNX Runtime by itself, and Forno's batcher, slots and engine around it, in one process."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from bench import loadgen
from forno.server.config import BatchingSettings, ModelSettings
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]

LATENCY_MS = 15.0  # MLPerf's limit for ResNet-50 in its Server scenario
_MOST_PENDING = 65536
_SPARE = 0.9  # of the load that just held, for another clock's Poisson
_LOADS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def bare(path: Path, kind: str, ordinal: int, batch: Array, seconds: float) -> float:
    """Rows a second of the runtime alone: copy a batch in, run, copy out, again and again."""
    options = ort.SessionOptions()
    provider = "CPUExecutionProvider" if kind == "cpu" else "CUDAExecutionProvider"
    given = {} if kind == "cpu" else {"device_id": str(ordinal)}
    session = ort.InferenceSession(str(path), options, providers=[(provider, given)])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"ONNX Runtime has no {provider} here")
    value = ort.OrtValue.ortvalue_from_numpy(batch, kind, ordinal)
    io = session.io_binding()
    io.bind_ortvalue_input(session.get_inputs()[0].name, value)
    for node in session.get_outputs():
        io.bind_output(node.name, kind, ordinal)
    runs, began = 0, 0.0
    ends = float("inf")
    while (now := time.perf_counter()) < ends:
        if runs == 2:  # the first ones choose algorithms
            began, ends = now, now + seconds
        value.update_inplace(batch)
        session.run_with_iobinding(io)
        io.copy_outputs_to_cpu()
        runs += 1
    return (runs - 2) * len(batch) / (now - began)


async def ours(
    path: Path, device: str, rows: Array, seconds: float, instances: int, max_rows: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Rows a second with always enough waiting, and the largest load whose p99 stays within LATENCY_MS."""
    settings = ModelSettings(
        device=device,
        instances=instances,
        batching=BatchingSettings(tune="off", max_rows=max_rows, max_pending_rows=_MOST_PENDING),
        **more,
    )
    model = Model("bench", "1", path, settings, Metrics().model("bench", "1"))
    await model.load()
    caller = _Caller(model, rows)
    await caller.offline(seconds / 2, 4 * max_rows * instances)
    offline = await caller.offline(seconds, 4 * max_rows * instances)
    loads = []
    for share in _LOADS:
        p50_ms, p99_ms, reached = await caller.poisson(share * offline, seconds)
        loads.append({"share": share, "p50_ms": p50_ms, "p99_ms": p99_ms, "rows_per_s": reached})
        if p99_ms > LATENCY_MS:
            break
    kept = [load["rows_per_s"] for load in loads if load["p99_ms"] <= LATENCY_MS]
    found: dict[str, Any] = {
        "offline_rows_per_s": round(offline),
        "server_rows_per_s": max(kept, default=0),
        "loads": loads,
    }
    if loadgen.IS_THERE:
        rates = {"Server": (max(kept) if kept else offline / 2) * _SPARE, "Offline": offline}
        found["loadgen"] = {
            name: await loadgen.scenario(name, caller.ask, seconds=seconds, rate=rate, latency_ms=LATENCY_MS)
            for name, rate in rates.items()
        }
    await model.close(5)
    return found


class _Caller:
    """Asks a model for rows, one a request."""

    def __init__(self, model: Model, rows: Array) -> None:
        self._model = model
        self._rows = [rows[index : index + 1] for index in range(len(rows))]
        self._asked = 0

    def ask(self) -> asyncio.Future[int]:
        """Asks for the next row."""
        self._asked += 1
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        row = self._rows[self._asked % len(self._rows)]
        self._model.submit(Request((row,), 1, _encoded, future))
        return future

    async def offline(self, seconds: float, in_flight: int) -> float:
        """Rows a second with so many always in flight."""
        answered, ends = 0, time.perf_counter() + seconds

        async def call() -> None:
            nonlocal answered
            while time.perf_counter() < ends:
                await self.ask()
                answered += 1

        began = time.perf_counter()
        await asyncio.gather(*[call() for _ in range(in_flight)])
        return answered / (time.perf_counter() - began)

    async def poisson(self, rows_per_s: float, seconds: float) -> tuple[float, float, int]:
        """Median and p99 latency in milliseconds, and rows a second, of rows that come at random."""
        random = np.random.default_rng(3)
        due = np.cumsum(random.exponential(1 / rows_per_s, max(32, int(rows_per_s * seconds)))).tolist()
        began = time.perf_counter()
        latencies_s: list[float] = []
        waiting = []

        def answered(at: float, _future: object) -> None:
            latencies_s.append(time.perf_counter() - began - at)

        for at in due:
            while (now := time.perf_counter() - began) < at:  # noqa: ASYNC110  (timers are too coarse)
                await asyncio.sleep(0 if at - now < 0.001 else at - now - 0.001)
            future = self.ask()
            future.add_done_callback(partial(answered, at))
            waiting.append(future)
        await asyncio.gather(*waiting)
        took_s = time.perf_counter() - began
        p50, p99 = np.percentile(latencies_s, [50, 99]) * 1e3
        return round(float(p50), 3), round(float(p99), 3), round(len(due) / took_s)


def _encoded(answer: Answer) -> int:
    return len(answer.outputs[0].tobytes())
