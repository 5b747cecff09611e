"""Variable-length inputs: what padding is worth against running equal shapes only, in one process and one run.

Usage: python -m bench.padding [SECONDS]

Two encoders (embedding, layers, a mean over what the mask leaves) are asked by 64 callers at once, one row each, of
lengths drawn evenly from 8 to 128: `dense` has layers of weights alone, `attention` also lets positions attend to each
other. All ways take turns, so that what else happens on the machine meets all. Writes bench/results/padding.json and
padding.md.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import report
from bench.models import IR_VERSION, OPSET, kept
from forno.server.config import ModelSettings, PaddingSettings
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]

IN_FLIGHT = 64
LEAST_LENGTH, MOST_LENGTH = 8, 128
ROUNDS = 5
WARM_S = 3.0  # the allocator has met every shape by then, and the batcher knows what runs cost
HEADS, VOCABULARY, CLASSES = 4, 1000, 8
ENCODERS = {"dense": (32, 1, False), "attention": (64, 2, True)}
"""Width, layers, and whether they attend: one where starting a run is most of its time, one where arithmetic is."""
WAYS: dict[str, PaddingSettings] = {
    "equal shapes only": PaddingSettings(),
    "padding: auto": PaddingSettings(enabled="auto"),
    "padding: auto, powers of two": PaddingSettings(enabled="auto", sizes=(8, 16, 32, 64, 128)),
}


@dataclass
class _Way:
    """One way of batching and what was measured of it."""

    model: Model
    metrics: Metrics
    rows_per_s: list[float] = field(default_factory=list)
    latencies_us: list[int] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)


def encoder(name: str) -> onnx.ModelProto:
    """The model: tokens, mask int64 [n, length] -> scores float32 [n, 8]."""
    from onnx import TensorProto, checker, helper, numpy_helper  # noqa: PLC0415  (a cached model needs no onnx)

    width, layers, attends = ENCODERS[name]
    random = np.random.default_rng(11)
    node = helper.make_node

    def weights(*shape: int) -> Array:
        return np.asarray(random.standard_normal(shape) * shape[0] ** -0.5, np.float32)

    constants: dict[str, Array] = {
        "table": weights(VOCABULARY, width) * VOCABULARY**0.5,
        "head": weights(width, CLASSES),
        "heads": np.array([0, 0, HEADS, width // HEADS]),
        "joined": np.array([0, 0, width]),
        "keys": np.array([1, 2]),
        "last": np.array([2]),
        "one": np.array([1]),
        "scale": np.array((width // HEADS) ** -0.5, np.float32),
        "1.0": np.array(1, np.float32),
        "far": np.array(-1e9, np.float32),
    }
    nodes = [
        node("Gather", ["table", "tokens"], ["x0"]),
        node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
    ]
    if attends:
        nodes += [
            node("Sub", ["1.0", "m"], ["absent"]),
            node("Mul", ["absent", "far"], ["bias2"]),
            node("Unsqueeze", ["bias2", "keys"], ["bias"]),
        ]
    for layer in range(layers):
        x = f"x{layer}"
        if attends:
            x = f"y.{layer}"
            for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
                constants[f"w{part}.{layer}"] = weights(width, width)
                nodes += [
                    node("MatMul", [f"x{layer}", f"w{part}.{layer}"], [f"{part}1.{layer}"]),
                    node("Reshape", [f"{part}1.{layer}", "heads"], [f"{part}2.{layer}"]),
                    node("Transpose", [f"{part}2.{layer}"], [f"{part}.{layer}"], perm=order),
                ]
            nodes += [
                node("MatMul", [f"q.{layer}", f"k.{layer}"], [f"products.{layer}"]),
                node("Mul", [f"products.{layer}", "scale"], [f"scaled.{layer}"]),
                node("Add", [f"scaled.{layer}", "bias"], [f"biased.{layer}"]),
                node("Softmax", [f"biased.{layer}"], [f"weights.{layer}"], axis=-1),
                node("MatMul", [f"weights.{layer}", f"v.{layer}"], [f"context.{layer}"]),
                node("Transpose", [f"context.{layer}"], [f"swapped.{layer}"], perm=[0, 2, 1, 3]),
                node("Reshape", [f"swapped.{layer}", "joined"], [f"attended.{layer}"]),
                node("Add", [f"x{layer}", f"attended.{layer}"], [x]),
            ]
        constants |= {f"in.{layer}": weights(width, 4 * width), f"out.{layer}": weights(4 * width, width)}
        nodes += [
            node("MatMul", [x, f"in.{layer}"], [f"inner.{layer}"]),
            node("Relu", [f"inner.{layer}"], [f"positive.{layer}"]),
            node("MatMul", [f"positive.{layer}", f"out.{layer}"], [f"outer.{layer}"]),
            node("Add", [x, f"outer.{layer}"], [f"x{layer + 1}"]),
        ]
    nodes += [
        node("Unsqueeze", ["m", "last"], ["wide"]),
        node("Mul", [f"x{layers}", "wide"], ["kept"]),
        node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
        node("ReduceSum", ["m", "one"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("MatMul", ["mean", "head"], ["scores"]),
    ]
    ids = [helper.make_tensor_value_info(each, TensorProto.INT64, ["n", "length"]) for each in ("tokens", "mask")]
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])
    initializers = [numpy_helper.from_array(value, each) for each, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "encoder", ids, [scores], initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model)
    return model


def sentences(count: int) -> list[tuple[Array, Array]]:
    """Rows of seeded lengths and tokens."""
    random = np.random.default_rng(5)
    return [
        (random.integers(0, VOCABULARY, (1, length)), np.ones((1, length), np.int64))
        for length in random.integers(LEAST_LENGTH, MOST_LENGTH + 1, count)
    ]


async def drive(way: _Way, rows: Sequence[tuple[Array, Array]], seconds: float) -> None:
    """Asks with so many callers at once until the time is over."""
    loop = asyncio.get_running_loop()
    ends = time.perf_counter() + seconds
    answered = 0
    number = 0

    def finish(answer: Answer) -> int:
        way.batch_rows.append(answer.batch_rows)
        return len(answer.outputs[0].tobytes())

    async def call() -> None:
        nonlocal answered, number
        while time.perf_counter() < ends:
            number += 1
            future: asyncio.Future[int] = loop.create_future()
            began_ns = time.perf_counter_ns()
            way.model.submit(Request(rows[number % len(rows)], 1, finish, future))
            await future
            way.latencies_us.append((time.perf_counter_ns() - began_ns) // 1000)
            answered += 1

    began_s = time.perf_counter()
    await asyncio.gather(*[call() for _ in range(IN_FLIGHT)])
    way.rows_per_s.append(answered / (time.perf_counter() - began_s))


async def agree(model: Model, rows: Sequence[tuple[Array, Array]], expected: Sequence[Array]) -> float:
    """The largest difference of answers of rows that run together from those of rows alone."""
    loop = asyncio.get_running_loop()
    waiting = []
    for row in rows:
        future: asyncio.Future[Array] = loop.create_future()
        model.submit(Request(row, 1, lambda answer: np.array(answer.outputs[0]), future))
        waiting.append(future)
    answers = await asyncio.gather(*waiting)
    return max(float(np.abs(one - other).max()) for one, other in zip(answers, expected, strict=True))


async def measure(encoder_name: str, seconds: float) -> dict[str, Any]:
    """Loads the model once for each way, compares their answers, and times them in turns."""
    path = kept(f"encoder-{encoder_name}", lambda: encoder(encoder_name))
    rows = sentences(4096)
    ways = {}
    for name, padding in WAYS.items():
        metrics = Metrics()
        settings = ModelSettings(padding=padding)
        model = Model("encoder", "1", path, settings, metrics.model("encoder", "1"))
        await model.load()
        ways[name] = _Way(model, metrics)
    base = ways["equal shapes only"].model
    few = rows[:128]
    alone = []
    for tokens, mask in few:
        future: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        base.submit(Request((tokens, mask), 1, lambda answer: np.array(answer.outputs[0]), future))
        alone.append(await future)
    differences = {name: await agree(way.model, few, alone) for name, way in ways.items()}
    for way in ways.values():
        await drive(way, rows, WARM_S)
        way.rows_per_s.clear()
        way.latencies_us.clear()
        way.batch_rows.clear()
    for _ in range(ROUNDS):
        for way in ways.values():
            await drive(way, rows, seconds)
    found = {}
    for name, way in ways.items():
        seen = way.model.statistics()
        latencies = np.array(way.latencies_us)
        found[name] = {
            "rows_per_s": round(statistics.median(way.rows_per_s)),
            "rows_per_s_of_each_round": [round(value) for value in way.rows_per_s],
            "p50_us": int(np.percentile(latencies, 50)),
            "p99_us": int(np.percentile(latencies, 99)),
            "mean_batch_rows_of_a_row": round(statistics.fmean(way.batch_rows), 1),
            "padded_share": round(seen.padded_elements / max(seen.elements, 1), 3),
            "largest_difference_from_alone": differences[name],
        }
        await way.model.close(1)
    return found


def table(encoders: dict[str, dict[str, Any]]) -> str:
    """The measurement for people."""
    lines = ["Variable lengths: padding against equal shapes only."]
    for encoder_name, ways in encoders.items():
        width, layers, _ = ENCODERS[encoder_name]
        base = ways["equal shapes only"]["rows_per_s"]
        lines += [
            "",
            f"## `{encoder_name}`: {layers} layer{'s' * (layers > 1)}, {width} wide",
            "",
            "| | rows/s | ratio | p50 ms | p99 ms | rows a batch | padded | difference from alone |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, way in ways.items():
            cells = (
                name,
                f"{way['rows_per_s']:,}",
                f"{way['rows_per_s'] / base:.2f}x",
                f"{way['p50_us'] / 1000:.2f}",
                f"{way['p99_us'] / 1000:.2f}",
                f"{way['mean_batch_rows_of_a_row']}",
                f"{way['padded_share']:.1%}",
                f"{way['largest_difference_from_alone']:.1e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    encoders = {name: asyncio.run(measure(name, seconds)) for name in ENCODERS}
    record = report.facts(
        "bench.padding",
        f"lengths {LEAST_LENGTH} to {MOST_LENGTH}, {IN_FLIGHT} in flight, in process, {seconds:g} s each way",
        encoders=encoders,
    )
    text = table(encoders)
    report.write(report.RESULTS, "padding", record, text)
    print(text)


if __name__ == "__main__":
    main()
