"""Too much of everything: calls beyond capacity, idle connections, slow writers; and what an edge costs.

Usage: python -m bench.chaos_crowd [--seconds S] [overload|crowd|cost ...]

`overload`: three times the calls that three replicas can answer; how many are answered, what the others are told, and
whether memory, health and replicas stay as they are. `crowd`: 10,000 connections that say nothing and 1,000 that send a
request a byte a second, beside callers. `cost`: the edge with one replica against the same server alone, and how evenly
three replicas are called. Writes results/fleet/crowd.json and results/fleet/crowd.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import chaos, h2load, report
from bench.chaos_load import Load
from bench.process import ServerProcess, free_port
from bench.subjects import Subject, environment, serving
from forno.server.fleet import edge as edges
from forno.server.transport.envoy import admin

if TYPE_CHECKING:
    from collections.abc import Iterator

REPLICAS = 3
RUN_S, ROWS = 0.05, 2  # of the overloaded model: 40 rows a second a replica
QUEUED_ROWS = 8
IDLE_CONNECTIONS, SLOW_WRITERS = 10_000, 1_000
ROUNDS = 8


async def overload(folder: Path, seconds: float) -> report.Record:
    """Calls at 1.2 times and then at three times what the replicas can do."""
    batching = {"max_rows": ROWS, "max_pending_rows": QUEUED_ROWS}
    limit = REPLICAS * ROWS / RUN_S
    async with chaos.fleet(folder, REPLICAS, delay_us=int(RUN_S * 1e6), **batching) as running:
        async with Load(running.target, limit * 1.2).running() as nearly:
            await asyncio.sleep(2)
            began, answered = time.perf_counter(), len(nearly.took_ms)
            await asyncio.sleep(6)
            capacity = (len(nearly.took_ms) - answered) / (time.perf_counter() - began)
        before = await running.controls.status()
        memory_mib, seen, health = [running.server.pss_mib()], [], []
        async with Load(running.target, limit * 3).running() as outcomes:
            await asyncio.sleep(2)
            began, answered = time.perf_counter(), len(outcomes.took_ms)
            channel = grpc.aio.insecure_channel(running.target)
            stub = health_pb2_grpc.HealthStub(channel)
            while time.perf_counter() < began + seconds:
                health.append((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)
                seen += _views(folder)
                memory_mib.append(running.server.pss_mib())
                await asyncio.sleep(0.5)
            goodput = (len(outcomes.took_ms) - answered) / (time.perf_counter() - began)
            await channel.close(None)
        after = await running.controls.status()
    return {
        "seconds": seconds,
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(limit * 3, 1),
        "goodput_per_s": round(goodput, 1),
        "goodput_of_capacity": round(goodput / capacity, 3),
        "answered": len(outcomes.took_ms),
        "answered_p99_ms": round(outcomes.percentile_ms(99), 1),
        "refused": sum(outcomes.failed.values()),
        "refusals": dict(sorted(outcomes.failed.items(), key=lambda item: -item[1])[:3]),
        "refused_with_retry_hint": outcomes.retry_hints,
        "memory_mib": [round(memory_mib[0], 1), round(max(memory_mib), 1)],
        "health_checks": len(health),
        "health_checks_not_serving": sum(status != health_pb2.HealthCheckResponse.SERVING for status in health),
        "replica_views": len(seen),
        "replica_views_ejected": sum(not view.takes_calls for view in seen),
        "same_processes": [one.pid for one in before.replicas] == [one.pid for one in after.replicas],
    }


def _views(folder: Path) -> list[edges.HostView]:
    (socket,) = folder.glob("forno-*/edge/admin.sock")
    return list(edges.views(admin.ask(socket, "GET", "/clusters?format=json")).values())


async def crowd(folder: Path, seconds: float) -> report.Record:
    """Callers without and with the crowd."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found: report.Record = {}
    async with chaos.fleet(folder, 2, delay_us=5_000) as running:
        host, _, port = running.target.partition(":")
        async with Load(running.target, 100).running() as alone:
            await asyncio.sleep(seconds)
        found["alone"] = alone.summary()
        memory_mib = running.server.pss_mib()
        writers: list[asyncio.StreamWriter] = []
        for count in (IDLE_CONNECTIONS, SLOW_WRITERS):
            for begun in range(0, count, 200):
                opened = await asyncio.gather(
                    *(asyncio.open_connection(host, int(port)) for _ in range(begun, min(begun + 200, count)))
                )
                writers += [writer for _, writer in opened]
        slow = writers[-SLOW_WRITERS:]
        head = f"POST /v1/models/echo:predict HTTP/1.1\r\nhost: x\r\ncontent-length: {1 << 20}\r\n\r\n".encode()
        for writer in slow:
            writer.write(head)
        writing = asyncio.create_task(_write_slowly(slow))
        await asyncio.sleep(2)
        async with Load(running.target, 100).running() as beside:
            await asyncio.sleep(seconds)
        found["beside"] = beside.summary()
        found["memory_mib"] = [round(memory_mib, 1), round(running.server.pss_mib(), 1)]
        found["connections"] = sum(not writer.is_closing() for writer in writers)
        found["p99_ratio"] = round(beside.percentile_ms(99) / alone.percentile_ms(99), 2)
        writing.cancel()
        for writer in writers:
            writer.transport.abort()
    return found


async def _write_slowly(writers: list[asyncio.StreamWriter]) -> None:
    while True:
        await asyncio.sleep(1)
        for writer in writers:
            writer.write(b" ")


def cost(folder: Path, seconds: float) -> report.Record:
    """The same server alone and behind an edge, in turn; then three replicas behind one."""
    subjects = {"gRPC": Subject("forno", "tiny", "envoy"), "REST": Subject("forno-rest", "tiny", "envoy", rest=True)}
    rows: list[report.Record] = []
    with contextlib.ExitStack() as stack:
        kinds = {"alone": (), "edge": ("--replicas", "1")}
        servers = {name: _start(stack, [*subjects.values()], folder / name, words) for name, words in kinds.items()}
        for protocol, in_flight in itertools.product(subjects, (1, 64)):
            targets = {name: subjects[protocol].target(port, folder / name) for name, (_, port) in servers.items()}
            calls = h2load.calls_for(targets["alone"], in_flight, seconds)
            pairs = []
            for number in range(ROUNDS):
                loads = {}
                for name in ("alone", "edge") if number % 2 else ("edge", "alone"):
                    server, _ = servers[name]
                    cpu_s = server.cpu_s()
                    load = h2load.run(targets[name], in_flight, calls)
                    loads[name] = load, (server.cpu_s() - cpu_s) / load.calls * 1e6
                pairs.append(loads)
            row: report.Record = {"calls": protocol, "in_flight": in_flight, "rounds": ROUNDS}
            for name in kinds:
                row[f"{name}_p50_us"] = round(statistics.median(pair[name][0].p50_us for pair in pairs), 1)
                row[f"{name}_p99_us"] = round(statistics.median(pair[name][0].p99_us for pair in pairs), 1)
                row[f"{name}_calls_per_s"] = round(statistics.median(pair[name][0].calls_per_s for pair in pairs))
                row[f"{name}_cpu_us"] = round(statistics.median(pair[name][1] for pair in pairs), 1)
                row[f"{name}_errors"] = sum(pair[name][0].errors for pair in pairs)
            rows.append(row)
    return {"rows": rows}


def _start(
    stack: contextlib.ExitStack, subjects: list[Subject], folder: Path, words: tuple[str, ...]
) -> tuple[ServerProcess, int]:
    from bench import models  # noqa: PLC0415  (NumPy and ONNX)

    folder.mkdir()
    port = free_port()
    argv = serving(models.path_of("tiny"), port, *words)
    server = stack.enter_context(ServerProcess(argv, environment(), folder / "server.log"))
    for subject in subjects:
        subject.first_answer_s(port, server)
        subject.check_answers(port)
    return server, port


async def spread(folder: Path, seconds: float) -> report.Record:
    """How many calls each of three replicas gets."""
    async with chaos.fleet(folder, REPLICAS) as running:
        async with Load(running.target, 250).running() as outcomes:
            await asyncio.sleep(seconds)
        counts = [one.total_calls for one in (await running.controls.status()).replicas]
    mean = statistics.mean(counts)
    return {
        "calls": outcomes.calls,
        "failed": sum(outcomes.failed.values()),
        "of_each": counts,
        "largest_deviation": round(max(abs(count - mean) for count in counts) / mean, 4),
    }


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for everything, the server's own temporary files included, so that its sockets can be found."""
    with tempfile.TemporaryDirectory(prefix="forno-") as name, _variable("TMPDIR", name):
        yield Path(name)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    import os  # noqa: PLC0415  (only here)

    before = os.environ.get(name)
    os.environ[name] = value
    tempfile.tempdir = None
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        tempfile.tempdir = None


def table(found: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = []
    if one := found.get("overload"):
        lines.append(
            f"Three times the load for {one['seconds']:g} s: {one['goodput_per_s']} of {one['capacity_per_s']} calls a "
            f"second answered ({one['goodput_of_capacity']:.3f} of capacity), {one['refused']:,} refused, "
            f"{one['refused_with_retry_hint']:,} of them told when to come again; memory {one['memory_mib'][0]} -> "
            f"{one['memory_mib'][1]} MiB; health not green {one['health_checks_not_serving']} of "
            f"{one['health_checks']} times, a replica ejected {one['replica_views_ejected']} of "
            f"{one['replica_views']} times.\n"
        )
    if one := found.get("crowd"):
        lines.append(
            f"{one['connections']:,} connections, {SLOW_WRITERS:,} writing slowly: p99 {one['alone']['p99_ms']} "
            f"-> {one['beside']['p99_ms']} ms ({one['p99_ratio']}x), {one['beside']['failed']} of "
            f"{one['beside']['calls']} calls failed; memory {one['memory_mib'][0]} -> {one['memory_mib'][1]} MiB.\n"
        )
    if one := found.get("spread"):
        lines.append(f"{one['calls']:,} calls over three replicas: {one['of_each']}, at most "
                     f"{one['largest_deviation']:.1%} from the mean.\n")  # fmt: skip
    if one := found.get("cost"):
        lines += [
            (
                "| calls | in flight | p50 us, alone | behind the edge | CPU us a call, alone | behind the edge "
                "| calls/s, alone | behind the edge |"
            ),
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['calls']} | {row['in_flight']} | {row['alone_p50_us']} | {row['edge_p50_us']} "
            f"| {row['alone_cpu_us']} | {row['edge_cpu_us']} "
            f"| {row['alone_calls_per_s']:,} | {row['edge_calls_per_s']:,} |"
            for row in one["rows"]
        ]
    return "\n".join(lines)


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status: 1 where something did not hold.
    """
    parser = argparse.ArgumentParser("python -m bench.chaos_crowd", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=["overload", "crowd", "spread", "cost"], metavar="SCENARIO")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default 60); others take less")
    arguments = parser.parse_args()
    path = chaos.RESULTS / "crowd.json"
    found: dict[str, Any] = json.loads(path.read_text())["scenarios"] if path.exists() else {}
    for name in arguments.names:
        with _folder() as folder:
            match name:
                case "overload":
                    found[name] = asyncio.run(overload(folder, arguments.seconds))
                case "crowd":
                    found[name] = asyncio.run(crowd(folder, min(arguments.seconds, 15)))
                case "spread":
                    found[name] = asyncio.run(spread(folder, min(arguments.seconds, 15)))
                case _:
                    found[name] = cost(folder, 0.5)
        print(name, json.dumps(found[name]), flush=True)
    facts = report.facts(
        "bench.chaos_crowd",
        "callers on the same machine; a scenario that was not asked for keeps its record",
        scenarios=found,
    )
    report.write(chaos.RESULTS, "crowd", facts, table(found))
    print(table(found))
    failed = sum(one.get("failed", 0) for one in found.values())
    overloaded = found.get("overload", {"goodput_of_capacity": 1, "replica_views_ejected": 0})
    return int(bool(failed or overloaded["goodput_of_capacity"] < 0.95 or overloaded["replica_views_ejected"]))


if __name__ == "__main__":
    sys.exit(main())
