"""Calls at a steady rate, whether or not earlier ones have been answered, each answer checked.

Used by bench/chaos.py and by tests/e2e/test_fleet_faults.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from forno.v1 import fleet_pb2, fleet_pb2_grpc, predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

OK = "OK"
WRONG = "WRONG ANSWER"


@dataclass
class Outcomes:
    """What became of the calls."""

    took_ms: list[float] = field(default_factory=list)  # of those that were answered
    failed: dict[str, int] = field(default_factory=dict)  # by status and message
    retry_hints: int = 0  # of those that failed, the ones that were told when to come again
    finished_s: list[float] = field(default_factory=list)  # when each of `took_ms` was

    @property
    def calls(self) -> int:
        """How many there were."""
        return len(self.took_ms) + sum(self.failed.values())

    def percentile_ms(self, share: float) -> float:
        """Of the answered ones; NaN where there are none."""
        return float(np.percentile(self.took_ms, share)) if self.took_ms else math.nan

    def summary(self) -> dict[str, Any]:
        """As it is recorded."""
        return {
            "calls": self.calls,
            "failed": sum(self.failed.values()),
            "failures": dict(sorted(self.failed.items(), key=lambda item: -item[1])[:5]),
            "p50_ms": round(self.percentile_ms(50), 1),
            "p99_ms": round(self.percentile_ms(99), 1),
            "max_ms": round(max(self.took_ms, default=math.nan), 1),
        }


class Load:
    """Open-loop Predict calls of a model that answers what it is given.

    Args:
        target: The server.
        rate: Calls a second.
        model: The model's name; float32 rows of four.
        timeout_s: Deadline of each call.
        channels: Connections to spread them over.
    """

    def __init__(
        self, target: str, rate: float, model: str = "echo", timeout_s: float = 10.0, channels: int = 4
    ) -> None:
        self.outcomes = Outcomes()
        self._rate = rate
        self._model = model
        self._timeout_s = timeout_s
        # No retries of the client's own: a failure that it hides is a failure.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channels = [grpc.aio.insecure_channel(target, options) for _ in range(channels)]
        self._stubs = [predictor_pb2_grpc.PredictorStub(channel) for channel in self._channels]
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Outcomes]:
        """Calls for as long as the context lasts, and waits for the answers then."""
        calling = asyncio.create_task(self._call_steadily())
        try:
            yield self.outcomes
        finally:
            calling.cancel()
            await asyncio.gather(*self._tasks)
            for channel in self._channels:
                await channel.close(None)

    async def _call_steadily(self) -> None:
        began_s = time.perf_counter()
        while True:
            due = int((time.perf_counter() - began_s) * self._rate)
            while self._number < due:
                self._number += 1
                task = asyncio.create_task(self._call(self._number))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0.002)

    async def _call(self, number: int) -> None:
        request = predictor_pb2.PredictRequest(model=self._model)
        sent = np.array([[number, number + 0.5, -number, 1]], np.float32)
        request.inputs.append(tensors.encode("x", sent))
        began_s = time.perf_counter()
        try:
            reply = await self._stubs[number % len(self._stubs)].Predict(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            text = f"{error.code().name}: {error.details()}"
            self.outcomes.failed[text] = self.outcomes.failed.get(text, 0) + 1
            trailing: Any = error.trailing_metadata() or ()
            if "retry-after" in {key for key, _ in trailing}:
                self.outcomes.retry_hints += 1
            return
        if reply.outputs[0].data != sent.tobytes():
            self.outcomes.failed[WRONG] = self.outcomes.failed.get(WRONG, 0) + 1
            return
        now_s = time.perf_counter()
        self.outcomes.took_ms.append((now_s - began_s) * 1000)
        self.outcomes.finished_s.append(now_s)


class Controls:
    """The fleet service of a running server.

    Args:
        socket: Its control socket.
    """

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}")
        self.stub = fleet_pb2_grpc.FleetStub(self._channel)

    async def status(self) -> fleet_pb2.FleetStatus:
        """The fleet as it is."""
        status: fleet_pb2.FleetStatus = await self.stub.GetFleet(fleet_pb2.GetFleetRequest())
        return status

    async def scale(self, replicas: int) -> None:
        """Has so many replicas."""
        await self.stub.ScaleFleet(fleet_pb2.ScaleFleetRequest(replicas=replicas))

    async def restart(self) -> None:
        """Replaces all of them."""
        await self.stub.RestartFleet(fleet_pb2.RestartFleetRequest())

    async def reload(self) -> None:
        """Has settings read again."""
        await self.stub.ReloadFleet(fleet_pb2.ReloadFleetRequest())

    async def full_strength(self, count: int, gone: int = 0, limit_s: float = 30.0) -> float:
        """Waits until so many replicas take calls, none of them the process `gone`.

        Returns:
            How long that took, in seconds.

        Raises:
            TimeoutError: It took longer than `limit_s`.
        """
        began_s = time.perf_counter()
        async with asyncio.timeout(limit_s):
            while not _full(await self.status(), count, gone):  # noqa: ASYNC110  (another process cannot tell us)
                await asyncio.sleep(0.05)
        return time.perf_counter() - began_s

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close(None)


def _full(status: fleet_pb2.FleetStatus, count: int, gone: int) -> bool:
    def ready(one: fleet_pb2.Replica) -> bool:
        return one.state == fleet_pb2.REPLICA_STATE_READY and one.pid != gone

    return len(status.replicas) == count and all(map(ready, status.replicas))
