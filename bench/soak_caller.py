"""One caller of the soak: many calls of every kind at once, each answer checked. A process of its own.

It prints a line of JSON each second, and a last one: how many calls of each kind ended how, and what was wrong.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import uvloop

from bench import limit, models
from forno.v1 import predictor_pb2, tensors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Array = np.ndarray[Any, np.dtype[Any]]
    Kind = Callable[[grpc.aio.Channel], Awaitable[str]]

PREDICT = "/forno.v1.Predictor/Predict"
STREAM = "/forno.v1.Predictor/PredictStream"
AT_ONCE = 48
CHANNEL_S = 5.0  # so long a connection lives, and ends with calls in flight
LIMIT_S = 60.0
POOL = 64
STREAM_ITEMS = 32
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
)
# What each kind may end with; an answer is checked besides.
EXPECTED = {
    "small": {"OK"},
    "gzip": {"OK"},
    "echo": {"OK"},
    "stream": {"OK"},
    "cut stream": {"CANCELLED", "OK"},
    "deadline": {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"},
    "cancel": {"OK", "CANCELLED", "RESOURCE_EXHAUSTED"},
    "no model": {"NOT_FOUND"},
    "wrong shape": {"INVALID_ARGUMENT"},
    "garbage": {"INTERNAL"},
    "no method": {"UNIMPLEMENTED"},
    "rest": {"200"},
    "rest error": {"400", "404"},
    "cut rest": {"CUT"},
    "hung up": {"CANCELLED", "UNAVAILABLE"},
}
WEIGHTS = {
    "small": 40, "gzip": 2, "echo": 8, "stream": 1, "cut stream": 0.5, "deadline": 8, "cancel": 10, "no model": 3,
    "wrong shape": 3, "garbage": 1, "no method": 1, "rest": 16, "rest error": 4, "cut rest": 1, "hung up": 0.02,
}  # fmt: skip


class WrongError(Exception):
    """An answer is not what it should be."""


@dataclass
class Caller:
    """Makes calls until told to stop. Owned by its process; event loop only."""

    port: int
    random: random.Random
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    items: int = 0  # of streams, answered right
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        session = limit.session_of(models.path_of("tiny"), 1)
        self._pool = []
        for seed in range(POOL):
            rows = models.rows_of("tiny", 1 + seed % 4 * 3, seed)
            self._pool.append((rows, np.asarray(session.run(None, {"x": rows})[0])))
        self._kinds: dict[str, Kind] = {name: getattr(self, "_" + name.replace(" ", "_")) for name in WEIGHTS}
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, channels: int) -> None:
        """Calls for ever."""
        async with asyncio.TaskGroup() as group:
            for _ in range(channels):
                group.create_task(self._keep_channel())

    async def _keep_channel(self) -> None:
        while True:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=OPTIONS)
            until = time.monotonic() + self.random.uniform(0.5, 1.5) * CHANNEL_S
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE // 4):
                    group.create_task(self._call_until(channel, until))
            await self._count("hung up", channel)  # closes it
            await channel.close(None)

    async def _call_until(self, channel: grpc.aio.Channel, until: float) -> None:
        names = [name for name in WEIGHTS if name != "hung up"]
        weights = [WEIGHTS[name] for name in names]
        while time.monotonic() < until:
            await self._count(self.random.choices(names, weights)[0], channel)

    async def _count(self, name: str, channel: grpc.aio.Channel) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                outcome = await self._kinds[name](channel)
        except grpc.RpcError as error:
            outcome = error.code().name
            if outcome not in EXPECTED[name]:
                self.wrong.append(f"{name}: {outcome} {error.details()}")
        except (WrongError, TimeoutError, OSError) as error:
            outcome = type(error).__name__
            self.wrong.append(f"{name}: {outcome} {error}")
        else:
            if outcome not in EXPECTED[name]:
                self.wrong.append(f"{name}: ended with {outcome}")
        self.ended[name, outcome] += 1

    def _sample(self) -> tuple[bytes, Array]:
        rows, wanted = self.random.choice(self._pool)
        request = predictor_pb2.PredictRequest(model="tiny", inputs=[tensors.encode("x", rows)])
        return request.SerializeToString(), wanted

    async def _small(self, channel: grpc.aio.Channel) -> str:
        message, wanted = self._sample()
        check(await channel.unary_unary(PREDICT, bytes, bytes)(message), wanted)
        return "OK"

    async def _gzip(self, channel: grpc.aio.Channel) -> str:
        message, wanted = self._sample()
        call = channel.unary_unary(PREDICT, bytes, bytes)(
            message, compression=grpc.Compression.Gzip, metadata=(("x-soak", "1"),)
        )
        check(await call, wanted)
        return "OK"

    async def _echo(self, channel: grpc.aio.Channel) -> str:
        width = int(2 ** self.random.uniform(0, 18 if self.random.random() < 0.05 else 10))
        rows = np.full((self.random.choice((1, 1, 2, 5)), width), self.random.random(), np.float32)
        check(await channel.unary_unary(PREDICT, bytes, bytes)(request_of("echo", rows)), rows)
        return "OK"

    async def _deadline(self, channel: grpc.aio.Channel) -> str:
        rows = np.full((1, 4), self.random.random(), np.float32)
        timeout_s = self.random.uniform(0.0005, 0.05)
        check(await channel.unary_unary(PREDICT, bytes, bytes)(request_of("slow", rows), timeout=timeout_s), rows)
        return "OK"

    async def _cancel(self, channel: grpc.aio.Channel) -> str:
        rows = np.full((1, 4), self.random.random(), np.float32)
        model = self.random.choice(("slow", "echo"))
        call = channel.unary_unary(PREDICT, bytes, bytes)(request_of(model, rows))
        await asyncio.sleep(self.random.choice((0, 0, 0.001, 0.003, 0.01)))
        call.cancel()
        try:
            check(await call, rows)
        except asyncio.CancelledError:
            return "CANCELLED"
        return "OK"

    async def _stream(self, channel: grpc.aio.Channel) -> str:
        wanted = {}

        async def requests() -> AsyncIterator[bytes]:
            for number in range(STREAM_ITEMS):
                rows, wanted[str(number)] = self.random.choice(self._pool)
                inputs = [tensors.encode("x", rows)]
                request = predictor_pb2.PredictRequest(model="tiny", inputs=inputs, request_id=str(number))
                yield predictor_pb2.PredictStreamRequest(request=request).SerializeToString()

        seen = set()
        async for data in channel.stream_stream(STREAM, bytes, bytes)(requests()):
            item = predictor_pb2.PredictStreamResponse.FromString(data)
            check(item.response, wanted[item.request_id])
            seen.add(item.request_id)
        if len(seen) != STREAM_ITEMS:
            raise WrongError(f"{len(seen)} of {STREAM_ITEMS} items were answered")
        self.items += len(seen)
        return "OK"

    async def _cut_stream(self, channel: grpc.aio.Channel) -> str:
        call: Any = channel.stream_stream(STREAM, bytes, bytes)()  # type: ignore[call-arg]  # wrong in its stubs
        stop = self.random.randrange(STREAM_ITEMS)
        for number in range(stop):
            rows, _ = self._pool[number]
            request = predictor_pb2.PredictRequest(model="tiny", inputs=[tensors.encode("x", rows)])
            await call.write(predictor_pb2.PredictStreamRequest(request=request).SerializeToString())
            if number % 3 == 0:
                data = await call.read()
                check(predictor_pb2.PredictStreamResponse.FromString(data).response, None)
        call.cancel()
        return "CANCELLED"

    async def _no_model(self, channel: grpc.aio.Channel) -> str:
        await channel.unary_unary(PREDICT, bytes, bytes)(request_of("tinny", np.zeros((1, 64), np.float32)))
        return "OK"

    async def _wrong_shape(self, channel: grpc.aio.Channel) -> str:
        await channel.unary_unary(PREDICT, bytes, bytes)(
            request_of("tiny", np.zeros((1, self.random.randrange(1, 60)), np.float32))
        )
        return "OK"

    async def _garbage(self, channel: grpc.aio.Channel) -> str:
        await channel.unary_unary(PREDICT, bytes, bytes)(b"\xff" * self.random.randrange(1, 200))
        return "OK"

    async def _no_method(self, channel: grpc.aio.Channel) -> str:
        await channel.unary_unary("/forno.v1.Predictor/Predicted", bytes, bytes)(b"")
        return "OK"

    async def _hung_up(self, channel: grpc.aio.Channel) -> str:
        """Closes the connection with calls in flight."""
        rows = np.zeros((1, 4), np.float32)
        calls = [channel.unary_unary(PREDICT, bytes, bytes)(request_of("slow", rows)) for _ in range(8)]
        await asyncio.sleep(self.random.choice((0, 0.002)))
        await channel.close(None)
        await asyncio.gather(*calls, return_exceptions=True)
        return "CANCELLED"

    async def _rest(self, _: grpc.aio.Channel) -> str:
        rows, wanted = self.random.choice(self._pool)
        status, body = await self._post("tiny", {"instances": rows.tolist()})
        if status == "200":
            same(np.array(json.loads(body)["predictions"], np.float32), wanted)
        return status

    async def _rest_error(self, _: grpc.aio.Channel) -> str:
        model, rows = self.random.choice((("tinny", [[0.0] * 64]), ("tiny", [[0.0] * 3]), ("tiny", [["a"] * 64])))
        status, body = await self._post(model, {"instances": rows})
        if not json.loads(body)["message"]:
            raise WrongError(f"an error without a message: {body!r}")
        return status

    async def _cut_rest(self, _: grpc.aio.Channel) -> str:
        """Leaves in the middle of a request, or of its answer."""
        _reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = http_request("tiny", {"instances": self._pool[0][0].tolist()})
        writer.write(data[: self.random.choice((10, len(data) // 2, len(data)))])
        await asyncio.sleep(self.random.choice((0, 0.001)))
        writer.transport.abort()
        return "CUT"

    async def _post(self, model: str, value: object) -> tuple[str, bytes]:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(http_request(model, value))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(fields["content-length"]))
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return head.split(" ", 2)[1], body


def request_of(model: str, rows: Array) -> bytes:
    """A serialized PredictRequest."""
    return predictor_pb2.PredictRequest(model=model, inputs=[tensors.encode("x", rows)]).SerializeToString()


def http_request(model: str, value: object) -> bytes:
    """A whole POST request."""
    body = json.dumps(value).encode()
    head = f"POST /v1/models/{model}:predict HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def check(answer: Any, wanted: Array | None) -> None:
    """Compares a response, or the bytes of one, with what it should hold.

    Raises:
        WrongError: It holds something else.
    """
    if isinstance(answer, bytes):
        answer = predictor_pb2.PredictResponse.FromString(answer)
    seen = tensors.decode(answer.outputs[0])
    if wanted is not None:
        same(seen, wanted)


def same(seen: Array, wanted: Array) -> None:
    """Compares two arrays.

    Raises:
        WrongError: They differ by more than rounding.
    """
    if seen.shape != wanted.shape or not np.allclose(seen, wanted, rtol=1e-3, atol=1e-4):
        raise WrongError(f"got {seen!r}, expected {wanted!r}")


async def _main(port: int, seed: int) -> None:
    caller = Caller(port, random.Random(seed))  # noqa: S311  (repeatable, not secret)
    loop = asyncio.get_running_loop()
    calling = asyncio.create_task(caller.run(4))
    stdin = loop.run_in_executor(None, sys.stdin.read)  # whoever closes it ends the calls
    while not stdin.done() and not calling.done():
        await asyncio.wait((stdin, calling), timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        ended = [[*key, count] for key, count in caller.ended.items()]
        print(json.dumps({"ended": ended, "items": caller.items, "wrong": caller.wrong[:20]}), flush=True)
    if calling.done():
        await calling
    calling.cancel()
    await asyncio.wait((calling,))


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), int(sys.argv[2])))
