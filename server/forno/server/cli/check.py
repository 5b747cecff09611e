"""`forno check`: loads every model as `serve` would, and says what would be served and how."""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.cli import arguments as common
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from forno.server.config import Config
    from forno.server.model import Model
    from forno.server.repository import ModelSpec

DESCRIPTION = """\
Loads every model for real, runs it, and prints what would be served and how. Serves nothing."""
EPILOG = """\
exit status: 0 all can be served, 1 a model or an endpoint cannot, 2 a path or a setting is wrong"""
_HEADINGS = ("MODEL", "VERSION", "ENGINE", "BATCHING", "RUNS", "ONE ROW")
_FREE_SIZES = (1, 8, 32, 64, 224)  # tried in turn for dimensions of any size
_TIMED_RUNS = 21
_FAILED = 1


@dataclass
class _Finding:
    """What is said of one model."""

    cells: tuple[str, ...]
    lines: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    common.add(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks.

    Raises:
        ConfigError: A path or a setting is wrong.
    """
    config, paths = common.resolve(arguments)

    from forno.server.repository import find  # noqa: PLC0415  (wrong settings are told without it)

    return asyncio.run(_check(config, find(paths, config)))


async def _check(config: Config, specs: Sequence[ModelSpec]) -> int:
    from forno.server.metrics import Metrics  # noqa: PLC0415  (NumPy and the engines)
    from forno.server.model import Model  # noqa: PLC0415
    from forno.server.registry import Registry  # noqa: PLC0415

    metrics, registry = Metrics(), Registry()
    findings: list[_Finding] = []
    failures: list[str] = []
    for spec in specs:
        model = Model(spec.name, spec.version, spec.path, spec.settings, metrics.model(spec.name, spec.version))
        registry.add(model)
        _tell_of_plan(spec)
        try:
            await model.load()
        except ConfigError as error:
            failures.append(f"{spec.name} {spec.version}: {error}")
            continue
        findings.append(await _found(model))
    served, wrong = _endpoints(config, registry, {model.name for model in registry.models() if model.error})
    failures += wrong
    for model in registry.models():
        await model.close(0.0)
    _print(findings, served)
    for failure in failures:
        print(f"forno: {failure}", file=sys.stderr)
    return _FAILED if failures else 0


def _tell_of_plan(spec: ModelSpec) -> None:
    """Says what will be built, before it is: that takes minutes."""
    from forno.server.engines import device_name, engine_name  # noqa: PLC0415

    try:
        if engine_name(spec.path, spec.settings) == "tensorrt" and spec.path is not None:
            from forno.server.engines.tensorrt import intended  # noqa: PLC0415

            told = intended(spec.path, spec.settings, device_name(spec.path, spec.settings))
            print(f"forno: {spec.name} {spec.version}: {told}", file=sys.stderr)
    except ConfigError:
        return  # its load says why


async def _found(model: Model) -> _Finding:
    from forno.server import banner  # noqa: PLC0415

    run_us = await _median_us(model)
    return _Finding(
        (
            model.name,
            model.version,
            model.engine_name,
            banner.batching(model),
            "on the event loop" if model.statistics().inline else "on a thread",
            "-" if run_us is None else f"{run_us / 1000:.3f} ms",
        ),
        [
            f"in   {banner.tensors_line(model.signature.inputs)}",
            f"out  {banner.tensors_line(model.signature.outputs)}",
            *([f"note {model.note}"] if model.note else []),
        ],
    )


async def _median_us(model: Model) -> float | None:
    """Median time from submitting one row of zeros to its answer; None where the model takes no such row."""
    for free in _FREE_SIZES:
        try:
            times_us = [await _time_us(model, free) for _ in range(_TIMED_RUNS)]
        except Exception:  # noqa: BLE001, S112  (a size that does not fit this model; what fails is told by its load)
            continue
        return statistics.median(times_us)
    return None


async def _time_us(model: Model, free: int) -> float:
    import numpy as np  # noqa: PLC0415

    from forno.server.request import Answer, Request  # noqa: PLC0415
    from forno.v1.tensors import OBJECT  # noqa: PLC0415

    def finish(answer: Answer) -> None:
        """Leaves the outputs where they are."""

    inputs: list[np.ndarray[Any, np.dtype[Any]]] = []
    for spec in model.signature.inputs:
        shape = [free if size < 0 else size for size in spec.shape]
        if model.signature.batched:
            shape[0] = 1
        inputs.append(np.full(shape, "0", object) if spec.dtype == OBJECT else np.zeros(shape, spec.dtype))
        if math.prod(shape) > 1 << 22:
            raise ValueError(shape)
    future = asyncio.get_running_loop().create_future()
    started = time.perf_counter()
    model.submit(Request(tuple(inputs), 1, finish, future))
    await future
    return (time.perf_counter() - started) * 1e6


def _endpoints(config: Config, registry: Any, failed: set[str]) -> tuple[list[str], list[str]]:
    """Lines for the endpoints that work, and what is wrong with others; without those of failed models."""
    from forno.server import endpoints  # noqa: PLC0415

    served, wrong = [], []
    for name, settings in config.endpoints.items():
        if settings.model in failed:
            continue
        try:
            endpoints.build(config.model_copy(update={"endpoints": {name: settings}}), registry)
        except ConfigError as error:
            wrong.append(f"endpoint {name}: {error}")
            continue
        served.append(f"{name} -> {settings.model}")
    return served, wrong


def _print(findings: Sequence[_Finding], served: Sequence[str]) -> None:
    rows = [_HEADINGS, *(finding.cells for finding in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines: list[list[str]] = [[], *(finding.lines for finding in findings)]
    for row, below in zip(rows, lines, strict=True) if findings else ():
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        for line in below:
            print(f"    {line}")
    for line in served:
        print(f"endpoint {line}")
