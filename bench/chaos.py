"""Faults under load: replicas killed, stopped, replaced, scaled and reloaded while callers go on.

Usage: python -m bench.chaos [--rate R] [--faults N] [--seed S] [faults|scale|reload ...]

A fleet of three replicas serves a model that takes 20 ms and answers what it is given, to open-loop callers over one
edge. `faults`: so many random SIGKILLs, SIGSTOPs and rolling restarts in a row, each after the fleet has its full
strength again. `scale`: 1 -> 3 -> 2. `reload`: settings changed, changed to wrong ones, and changed again. Writes
results/fleet/chaos.json and results/fleet/chaos.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from bench import report
from bench.chaos_load import Controls, Load
from bench.process import ServerProcess, free_port
from bench.subjects import environment, serving
from forno.server.fleet import control_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RESULTS = report.RESULTS / "fleet"
REPLICAS = 3
HUNG_AFTER_S = 3.0
SETTLE_S = 1.0
KINDS = ("kill", "stop", "restart")


class Fleet:
    """A running fleet of echo models."""

    def __init__(self, port: int, server: ServerProcess, controls: Controls, settings: Path) -> None:
        self.target = f"127.0.0.1:{port}"
        self.server = server
        self.controls = controls
        self.settings = settings

    def configure(self, delay_us: int = 20_000, **batching: Any) -> None:
        """Writes its settings file."""
        write_settings(self.settings, delay_us, **batching)


def write_settings(path: Path, delay_us: int, **batching: Any) -> None:
    model = {"engine": "null", "null": {"shape": [-1, 4], "delay_us": delay_us}, "batching": batching}
    path.write_text(json.dumps({"models": {"echo": model}}))


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, replicas: int = REPLICAS, *arguments: str, delay_us: int = 20_000, **batching: Any
) -> AsyncIterator[Fleet]:
    """A fleet, for as long as the context lasts."""
    settings, port = folder / "forno.yaml", free_port()
    write_settings(settings, delay_us, **batching)
    fleet_of = ("--replicas", str(replicas), "--set", f"fleet.hung_after_s={HUNG_AFTER_S}")
    argv = serving(settings, port, *fleet_of, *arguments)
    with ServerProcess(argv, environment(), folder / "server.log") as server:
        socket = control_socket.path_of(f"127.0.0.1:{port}")
        controls = Controls(socket)
        try:
            async with asyncio.timeout(60):
                while not socket.is_socket():
                    server.check_alive()
                    await asyncio.sleep(0.05)
            await controls.full_strength(replicas)
            yield Fleet(port, server, controls, settings)
        finally:
            await controls.close()


async def faults(folder: Path, rate: float, count: int, seed: int) -> report.Record:
    """Random faults in a row."""
    chance = random.Random(seed)  # noqa: S311  (which fault comes next is no secret)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    chance.shuffle(kinds)
    recovered: list[dict[str, Any]] = []
    async with fleet(folder) as running:
        load = Load(running.target, rate)
        async with load.running() as outcomes:
            await asyncio.sleep(SETTLE_S)
            quiet = outcomes.summary()
            for kind in kinds:
                gone = 0
                began_s = time.perf_counter()
                if kind == "restart":
                    await running.controls.restart()
                else:
                    status = await running.controls.status()
                    gone = chance.choice([one.pid for one in status.replicas])
                    os.kill(gone, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                await running.controls.full_strength(REPLICAS, gone)
                recovered.append({"fault": kind, "full_strength_after_s": round(time.perf_counter() - began_s, 2)})
                await asyncio.sleep(chance.uniform(0.2, SETTLE_S))
        log = running.server.log_end(200)
    return {
        "before": quiet,
        **outcomes.summary(),
        "recovered": recovered,
        "tracebacks": log.count("Traceback"),
    }


async def scale(folder: Path, rate: float) -> report.Record:
    """1 -> 3 -> 2 replicas."""
    async with fleet(folder, 1) as running:
        load = Load(running.target, rate)
        async with load.running() as outcomes:
            await asyncio.sleep(SETTLE_S)
            for count in (3, 2):
                await running.controls.scale(count)
                await running.controls.full_strength(count)
                await asyncio.sleep(SETTLE_S)
    return outcomes.summary()


async def reload(folder: Path, rate: float) -> report.Record:
    """New settings, wrong ones, and new ones again."""
    refused = ""
    async with fleet(folder) as running:
        load = Load(running.target, rate)
        async with load.running() as outcomes:
            await asyncio.sleep(SETTLE_S)
            running.configure(delay_us=10_000)
            await running.controls.reload()
            running.settings.write_text("models: {echo: {engin: 'null'}}")
            try:
                await running.controls.reload()
            except grpc.aio.AioRpcError as error:
                refused = f"{error.code().name}: {error.details()}"
            await asyncio.sleep(SETTLE_S)
            running.configure(delay_us=5_000)
            await running.controls.reload()
            await asyncio.sleep(SETTLE_S)
    return {**outcomes.summary(), "wrong_settings": refused.replace(str(folder), "")}


async def run(names: list[str], rate: float, count: int, seed: int) -> dict[str, report.Record]:
    """The scenarios, one after the other."""
    found: dict[str, report.Record] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="forno-chaos-") as folder:
            match name:
                case "faults":
                    found[name] = await faults(Path(folder), rate, count, seed)
                case "scale":
                    found[name] = await scale(Path(folder), rate)
                case _:
                    found[name] = await reload(Path(folder), rate)
        print(name, json.dumps(found[name]), flush=True)
    return found


def table(found: dict[str, report.Record]) -> str:
    """The summary as Markdown."""
    lines = ["| scenario | calls | failed | p50 ms | p99 ms | max ms |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {one['calls']:,} | {one['failed']} | {one['p50_ms']} | {one['p99_ms']} | {one['max_ms']} |"
        for name, one in found.items()
    ]
    if "faults" in found:
        for kind in KINDS:
            took = [one["full_strength_after_s"] for one in found["faults"]["recovered"] if one["fault"] == kind]
            if took:
                lines.append(f"\n{len(took)} x {kind}: full strength again after {min(took)} to {max(took)} s.")
    return "\n".join(lines)


def main() -> int:
    """Makes the faults, and writes what became of the calls.

    Returns:
        Exit status: 1 where a call failed.
    """
    parser = argparse.ArgumentParser("python -m bench.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=["faults", "scale", "reload"], metavar="SCENARIO")
    parser.add_argument("--rate", type=float, default=250.0, help="calls a second (default 250)")
    parser.add_argument("--faults", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults (default 1)")
    arguments = parser.parse_args()
    found = asyncio.run(run(arguments.names, arguments.rate, arguments.faults, arguments.seed))
    facts = report.facts(
        "bench.chaos",
        f"{arguments.rate:g} calls a second, open loop, each answer checked, callers on the same machine",
        scenarios=found,
    )
    report.write(RESULTS, "chaos", facts, table(found))
    print(table(found))
    return 1 if any(one["failed"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
