"""Where a call's microseconds go, from Envoy's socket to the engine and back, at 1, 16 and 64 calls in flight.

Usage: python -m bench.profile [--in-flight 1,16,64] [--seconds 6] [--name profile]

Three servers take the same load in turn: Envoy alone, with the same listener and filters but an answer of its own; the
server, watched by Linux `perf` (package linux-perf; it needs kernel.perf_event_paranoid <= 2, or root); and the server
with its Python stages timed (`bench.stages`), which is slower and only says how Python's part divides. CPU is that of
all the server's processes, divided by the samples that `perf` took on each thread and in each library.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import h2load, models, report
from bench.process import ServerProcess, free_port
from bench.subjects import SUBJECTS, environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Record

SUBJECT = next(subject for subject in SUBJECTS if subject.name == "forno")
SAMPLES_A_SECOND = 2999
SETTLE_S = 0.6  # the stages are written every quarter of a second
ALONE = "Envoy alone"
SWITCHING = ("switch", "schedule", "spin_unlock_irq", "futex", "eventfd", "wake", "idle", "epoll", "ep_")


@dataclass(frozen=True)
class EnvoyAlone:
    """An end of Envoy's filter chain that answers every call with the same bytes."""

    answer: bytes

    def filter(self, _door: str) -> dict[str, Any]:
        """The router, which knows the answer."""
        kind = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
        return {"name": "envoy.filters.http.router", "typed_config": {"@type": kind}}

    def routes(self) -> list[dict[str, Any]]:
        """One, to the answer."""
        body = {"inline_string": "x" * len(self.answer)}
        return [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": body}}]

    def clusters(self) -> list[dict[str, Any]]:
        """None."""
        return []


@dataclass(frozen=True)
class Measured:
    """A load and what it cost the server."""

    load: h2load.Load
    cpu_us: float  # a call
    shares: Counter[str]  # of the samples, by part


def part_of(thread: str, library: str, symbol: str) -> str:
    """Which part of a call a sample belongs to."""
    worker = thread.startswith("wrk:")
    name = Path(library).name
    if "kernel" in library or library in ("[vdso]", "[unknown]"):
        if any(word in symbol for word in SWITCHING):
            return "kernel: Envoy's worker sleeps and wakes" if worker else "kernel: Python's thread sleeps and wakes"
        return "kernel: sockets" if worker else "kernel: Python's thread, the rest"
    if name.startswith("_native"):
        return "our module, on Envoy's worker" if worker else "our module, on Python's thread"
    if "onnxruntime" in name:
        return "ONNX Runtime"
    return "Envoy: HTTP/2, filters, buffers" if worker else "Python"


def perf_shares(pid: int, seconds: float, folder: Path) -> subprocess.Popen[bytes]:
    """Starts sampling a process."""
    data = folder / "perf.data"
    argv = ["perf", "record", "-q", "-F", str(SAMPLES_A_SECOND), "-e", "cpu-clock", "-o", str(data), "-p", str(pid)]
    return subprocess.Popen([*argv, "--", "sleep", str(seconds)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_shares(folder: Path) -> Counter[str]:
    """What the samples say."""
    argv = ["perf", "script", "-i", str(folder / "perf.data"), "-F", "comm,ip,sym,dso"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    shares: Counter[str] = Counter()
    for line in lines:
        head, _, library = line.rstrip().rpartition(" (")
        words = head.split()
        if len(words) < 3 or not library:
            continue
        at = next((i for i, word in enumerate(words[1:], 1) if set(word) <= set("0123456789abcdef")), 1)
        shares[part_of(" ".join(words[:at]), library.rstrip(")"), " ".join(words[at + 1 :]))] += 1
    return shares


def measure(server: ServerProcess, target: h2load.Target, in_flight: int, seconds: float, folder: Path) -> Measured:
    """Loads a server and divides what that cost it."""
    calls = h2load.calls_for(target, in_flight, seconds)
    sampler = perf_shares(_envoy_of(server), seconds * 0.8, folder)
    time.sleep(0.2)
    before_s = server.cpu_s()
    load = h2load.run(target, in_flight, calls)
    cpu_s = server.cpu_s() - before_s
    sampler.wait()
    if load.errors:
        raise RuntimeError(f"{load.errors} calls failed")
    return Measured(load, cpu_s / load.calls * 1e6, read_shares(folder))


def _envoy_of(server: ServerProcess) -> int:
    """The process of the server that is Envoy: the one that has used most."""
    family = server._family()  # noqa: SLF001  (the same package)
    return max(family, key=lambda pid: int(family[pid][11]) + int(family[pid][12]))


def alone(levels: Sequence[int], seconds: float, folder: Path) -> dict[int, Measured]:
    """Envoy without us."""
    from forno.server.address import Address  # noqa: PLC0415
    from forno.server.transport.envoy import bootstrap, supervisor  # noqa: PLC0415

    port = free_port()
    listener = bootstrap.Listener(Address("127.0.0.1", port), folder / "admin.sock", 64 << 20)
    file = folder / "envoy.json"
    file.write_text(json.dumps(bootstrap.render(listener, EnvoyAlone(b"x" * 100))))
    argv = [supervisor.binary(), "-c", str(file), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    body = folder / "alone.body"
    target = SUBJECT.target(port, folder)
    body.write_bytes(target.body.read_bytes())
    with ServerProcess(argv, environment(), folder / "envoy.log") as server:
        time.sleep(1.0)
        return {level: measure(server, target, level, seconds, folder) for level in levels}


def served(levels: Sequence[int], seconds: float, folder: Path) -> dict[int, Measured]:
    """The server as it is."""
    port = free_port()
    with ServerProcess(SUBJECT.command(port, folder), environment(), folder / "server.log") as server:
        SUBJECT.first_answer_s(port, server)
        target = SUBJECT.target(port, folder)
        measured = {level: measure(server, target, level, seconds, folder) for level in levels}
        SUBJECT.check_answers(port)
        return measured


def staged(levels: Sequence[int], seconds: float, folder: Path) -> dict[int, dict[str, float]]:
    """Microseconds a call of each Python stage."""
    port, file = free_port(), folder / "stages.json"
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if '_forno_envoy' in sys.builtin_module_names:\n"
        f"    import bench.stages\n    bench.stages.watch({str(file)!r})\n"
    )
    env = environment()
    env["PYTHONPATH"] = f"{folder}:{env['PYTHONPATH']}"
    stages = {}
    with ServerProcess(SUBJECT.command(port, folder), env, folder / "server.log") as server:
        SUBJECT.first_answer_s(port, server)
        target = SUBJECT.target(port, folder)
        for level in levels:
            calls = h2load.calls_for(target, level, seconds / 2)
            time.sleep(SETTLE_S)
            before = json.loads(file.read_text())["own_us"]
            calls = h2load.run(target, level, calls).calls
            time.sleep(SETTLE_S)
            after = json.loads(file.read_text())["own_us"]
            stages[level] = {stage: max(0.0, after[stage] - before[stage]) / calls for stage in after}
    return stages


def rows_of(measured: Measured) -> dict[str, float]:
    """Microseconds of CPU a call, by part."""
    total = sum(measured.shares.values())
    return {part: count / total * measured.cpu_us for part, count in measured.shares.items()}


def _table(columns: Sequence[str], rows: dict[str, list[float]], total: str = "") -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values) + " |" for name, values in rows.items()]
    if total:
        sums = [sum(column) for column in zip(*rows.values(), strict=True)]
        lines.append(f"| **{total}** | " + " | ".join(f"**{value:,.1f}**" for value in sums) + " |")
    return lines


def text_of(levels: Sequence[int], result: Record) -> str:
    """The tables."""
    speed = {
        f"{name}, {what}": [result[name][str(level)][key] for level in levels]
        for name in (ALONE, "forno")
        for what, key in (("p50 us", "p50_us"), ("calls/s", "calls_per_s"), ("CPU us a call", "cpu_us"))
    }
    parts = {part for level in levels for part in result["forno"][str(level)]["parts"]}
    rows = {
        part: [result[name][str(level)]["parts"].get(part, 0.0) for level in levels for name in ("forno", ALONE)]
        for part in parts
    }
    rows = dict(sorted(rows.items(), key=lambda row: -row[1][-2]))
    stages = result["stages"][str(levels[0])]
    staged_rows = {stage: [result["stages"][str(level)][stage] for level in levels] for stage in stages}
    both = [column for level in levels for column in (f"{level} in flight", "alone")]
    each = [f"{level} in flight" for level in levels]
    lines = ["## Speed", "", *_table(each, speed), "", "## CPU us a call, by thread and library", ""]
    lines += [*_table(both, rows, "all"), "", "## Python, by stage (us a call)", ""]
    return "\n".join([*lines, *_table(each, staged_rows, "all stages")])


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles, prints and writes results/NAME.json and .md."""
    parser = argparse.ArgumentParser("python -m bench.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--in-flight", default="1,16,64")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--name", default="profile")
    arguments = parser.parse_args(argv)
    if shutil.which("perf") is None:
        raise SystemExit("perf was not found; install it (Debian: apt-get install linux-perf) and run again")
    levels = [int(level) for level in arguments.in_flight.split(",")]
    models.path_of("tiny")
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as name:
        folder = Path(name)
        measured = {
            ALONE: alone(levels, arguments.seconds, folder),
            "forno": served(levels, arguments.seconds, folder),
        }
        stages = staged(levels, arguments.seconds, folder)
    facts = report.facts(
        "bench.profile",
        f"tiny model, closed loop, {arguments.seconds:g} s each, {SAMPLES_A_SECOND} samples a second",
        stages={str(level): stages[level] for level in levels},
    )
    for name, by_level in measured.items():
        facts[name] = {
            str(level): {
                "p50_us": one.load.p50_us,
                "calls_per_s": one.load.calls_per_s,
                "cpu_us": one.cpu_us,
                "parts": rows_of(one),
            }
            for level, one in by_level.items()
        }
    text = text_of(levels, facts)
    report.write(report.RESULTS, arguments.name, facts, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
