"""What the batcher chooses for itself beside the best fixed setting of a grid, in one run.

Usage: python -m bench.selftune [--models tiny,costly,resnet50] [--seconds 2] [--name selftune]

Requests of one row are kept in the air at `Model.submit`, without a network, two counts of them a model; the figure is
answers a second. `tiny` runs on the event loop, `costly` is an engine of 2 ms a run and 0.1 ms a row on a thread,
`resnet50` is what a CPU does best with few rows; beside it stands ONNX Runtime with nothing around it, at the best of
its own settings (`bench/limit.py`). Writes `results/NAME.json` and `.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import limit, models, report
from forno.server.config import ModelSettings
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parent
IN_AIR = {"tiny": (16, 64), "costly": (8, 64), "resnet50": (4, 8)}
GRID = {
    "tiny": ((1, 0), (8, 0), (32, 0), (32, 200)),
    "costly": ((1, 0), (8, 0), (32, 0), (32, 2000)),
    "resnet50": ((1, 0), (2, 0), (4, 0), (8, 0)),
}
COSTLY = {"engine": "null", "null": {"delay_us": 2000, "row_delay_us": 100, "shape": [-1, 4]}}


@dataclass(frozen=True)
class Point:
    """Answers a second of one setting."""

    model: str
    in_air: int
    setting: str
    answers_per_s: float
    rows_cap: int  # in the end


async def measure(name: str, path: Path | None, in_air: int, batching: dict[str, int], seconds: float) -> Point:
    """Keeps so many requests in the air for a while."""
    settings = ModelSettings.model_validate({**(COSTLY if name == "costly" else {}), "batching": batching})
    model = Model(name, "1", path, settings, Metrics().model(name, "1"))
    await model.load()
    row = np.zeros((1, 4), np.float32) if name == "costly" else models.rows_of(name, 1)
    loop = asyncio.get_running_loop()
    answered = 0

    async def call() -> None:
        nonlocal answered
        while time.monotonic() < end_s:
            future = loop.create_future()
            model.submit(Request((row,), 1, _copied, future))
            await future
            answered += 1

    end_s = time.monotonic() + seconds / 4
    await asyncio.gather(*[call() for _ in range(in_air)])
    answered, began_s = 0, time.monotonic()
    end_s = began_s + seconds
    await asyncio.gather(*[call() for _ in range(in_air)])
    elapsed_s = time.monotonic() - began_s
    cap = model.statistics().rows_cap
    await model.close(1)
    setting = ", ".join(f"{key} {value}" for key, value in batching.items()) or "self-tuned"
    return Point(name, in_air, setting, answered / elapsed_s, cap)


def _copied(answer: Any) -> Any:
    return answer.outputs[0].tobytes()


def points_of(name: str, path: Path | None, seconds: float, rounds: int) -> Iterator[Point]:
    """The median of all settings of a model, rounds interleaved."""
    settings = [{}, *[{"max_rows": rows, "max_delay_us": delay_us} for rows, delay_us in GRID[name]]]
    for in_air in IN_AIR[name]:
        found = [
            [asyncio.run(measure(name, path, in_air, batching, seconds)) for batching in settings]
            for _ in range(rounds)
        ]
        for of_setting in zip(*found, strict=True):
            middle = statistics.median_low([point.answers_per_s for point in of_setting])
            yield next(point for point in of_setting if point.answers_per_s == middle)


def limit_of(name: str, seconds: float, rounds: int) -> Point:
    """ONNX Runtime alone at its best."""
    best = max(
        [
            statistics.median([limit.measure(name, setting, seconds).rows_per_s for _ in range(rounds)])
            for setting in limit.grid(name)
        ]
    )
    return Point(name, 0, "ONNX Runtime alone", best, 0)


def table(points: Sequence[Point]) -> str:
    """Markdown for people."""
    lines = [
        "| model | in the air | setting | answers/s | rows a batch | self-tuned by this |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for point in points:
        own = [
            each.answers_per_s
            for each in points
            if (each.model, each.setting) == (point.model, "self-tuned") and point.in_air in (each.in_air, 0)
        ]
        ratio = f"{own[-1] / point.answers_per_s:.3f}" if own else ""
        lines.append(
            f"| {point.model} | {point.in_air or ''} | {point.setting} | {point.answers_per_s:.1f} "
            f"| {point.rows_cap or ''} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,costly,resnet50")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--name", default="selftune")
    options = parser.parse_args()
    points: list[Point] = []
    for name in options.models.split(","):
        path = None if name == "costly" else models.path_of(name)
        points += points_of(name, path, options.seconds, options.rounds)
        if name == "resnet50":
            points.append(limit_of(name, options.seconds, options.rounds))
    print(table(points))
    record = {
        "machine": report.machine(),
        "versions": report.versions(ROOT.parent),
        "points": [asdict(point) for point in points],
    }
    (ROOT / "results" / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (ROOT / "results" / f"{options.name}.md").write_text("# Self-tuned and fixed\n\n" + table(points))


if __name__ == "__main__":
    main()
