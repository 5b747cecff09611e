"""A soak: a million calls of every kind, each answer checked, memory watched.

Usage: python -m bench.soak [--calls 1000000] [--callers 2] [--name soak]

Sizes from 4 bytes to 5 MB, unary calls, streams and REST; some with deadlines too short, some cancelled, some wrong
on purpose, some cut off with their connection. What each kind may end with stands in `soak_caller.py`; anything else
fails. Growth is judged after the first fifth, in which caches and allocators fill: the slope of a straight line through
the memory that the server has written and shares with nobody, in bytes a call.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from bench import models, report
from bench.memory import FLAT_BYTES_PER_CALL, slope_bytes_per_call
from bench.process import ServerProcess, free_port
from bench.subjects import ROOT, environment, serving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Record

WARM_UP = 0.2
STEPS = 50
LEFT_S = 5.0
"""So long the server has, after the last call, to let go of what it holds."""


class Caller:
    """One `soak_caller`, and what it last said. Owned by the soak; a thread reads what it prints."""

    def __init__(self, port: int, seed: int) -> None:
        argv = [sys.executable, "-m", "bench.soak_caller", str(port), str(seed)]
        self._process = subprocess.Popen(
            argv, env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said: dict[str, Any] = {"ended": [], "items": 0, "wrong": []}
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self._process.stdout:
            for line in self._process.stdout:
                self.said = json.loads(line)

    @property
    def calls(self) -> int:
        """Calls that have ended."""
        return sum(count for _, _, count in self.said["ended"])

    def check_alive(self) -> None:
        """Raises RuntimeError where it has ended by itself."""
        if self._process.poll() is not None:
            raise RuntimeError(f"a caller ended with status {self._process.returncode}; why is above")

    def stop(self) -> None:
        """Ends the calls."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(30.0)
        self._reader.join(5.0)


def settings() -> dict[str, Any]:
    """What is served: a real model, an echo of any size, and one that is slow and soon full."""
    return {
        "models": {
            "tiny": {"path": str(models.path_of("tiny"))},
            "echo": {"engine": "null", "null": {"shape": [-1, -1]}},
            "slow": {
                "engine": "null",
                "null": {"shape": [-1, 4], "delay_us": 3000},
                "batching": {"max_rows": 4, "max_pending_rows": 24},
            },
        },
        "server": {"log_level": "warning"},
    }


def metrics(port: int) -> str:
    """The text of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        return str(answer.read().decode())


def held(port: int) -> dict[str, float]:
    """Gauges that must be 0 once nobody calls, and are not."""
    found = re.findall(
        r"^(forno_(?:pending_requests|pending_rows|running_rows)\{.*\}) (\S+)$", metrics(port), re.MULTILINE
    )
    return {name: float(value) for name, value in found if float(value)}


def soak(calls: int, caller_count: int, folder: Path) -> Record:
    """Runs it all.

    Returns:
        How calls ended, the memory after each step, and what was wrong.
    """
    port = free_port()
    file = folder / "forno.yaml"
    file.write_text(json.dumps(settings()))
    steps: list[Record] = []
    with ServerProcess(serving(file, port), environment(), folder / "server.log") as server:
        server.wait_ready(port)
        callers = [Caller(port, seed) for seed in range(caller_count)]
        done = 0
        try:
            while done < calls:
                time.sleep(1.0)
                server.check_alive()
                for caller in callers:
                    caller.check_alive()
                done = sum(caller.calls for caller in callers)
                if done >= (len(steps) + 1) * calls / STEPS:
                    steps.append({"calls": done, "written_mib": server.written_mib(), "pss_mib": server.pss_mib()})
                    faults = sum(len(caller.said["wrong"]) for caller in callers)
                    print(f"{done:>9,} calls: {steps[-1]['written_mib']:.1f} MiB, {faults} wrong", flush=True)
        finally:
            for caller in callers:
                caller.stop()
        until = time.monotonic() + LEFT_S
        while held(port) and time.monotonic() < until:
            time.sleep(0.1)
        left = held(port)
        stop_s = server.stop()
        log = server.log_end(20)
    ended: Counter[tuple[str, str]] = Counter()
    for caller in callers:
        for name, outcome, count in caller.said["ended"]:
            ended[name, outcome] += count
    wrong = [text for caller in callers for text in caller.said["wrong"]]
    wrong += [f"{name} is {value} after the last call" for name, value in left.items()]
    wrong += [f"the server logged: {line}" for line in log.splitlines() if re.search("Traceback|ERROR|raised", line)]
    return {
        "calls": sum(ended.values()),
        "stream_items": sum(caller.said["items"] for caller in callers),
        "ended": [[*key, count] for key, count in sorted(ended.items())],
        "steps": steps,
        "slope_bytes_per_call": slope_bytes_per_call([step for step in steps if step["calls"] > WARM_UP * calls]),
        "stop_s": stop_s,
        "wrong": wrong,
    }


def _text(result: Record) -> str:
    lines = ["| kind | ended | calls |", "| --- | --- | --- |"]
    lines += [f"| {name} | {outcome} | {count:,} |" for name, outcome, count in result["ended"]]
    lines += ["", f"Besides, {result['stream_items']:,} items of streams, each checked.", ""]
    lines += ["| calls | written memory MiB | PSS MiB |", "| --- | --- | --- |"]
    shown = result["steps"][4::5]
    lines += [f"| {step['calls']:,} | {step['written_mib']:.1f} | {step['pss_mib']:.1f} |" for step in shown]
    slope, wrong = result["slope_bytes_per_call"], len(result["wrong"])
    lines += ["", f"Slope after the first fifth: {slope:.2f} bytes a call. Wrong: {wrong}."]
    return "\n".join(lines + [f"- {text}" for text in result["wrong"][:20]])


def main(argv: Sequence[str] | None = None) -> int:
    """Soaks, prints and writes results/NAME.json and .md.

    Returns:
        Exit status: 1 where anything was wrong or memory grows.
    """
    parser = argparse.ArgumentParser("python -m bench.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--name", default="soak")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as folder:
        result = soak(arguments.calls, arguments.callers, Path(folder))
    facts = report.facts(
        "bench.soak",
        f"{result['calls']:,} calls of {arguments.callers} callers in {time.monotonic() - began:.0f} s",
        **result,
    )
    text = _text(result)
    report.write(report.RESULTS, arguments.name, facts, text)
    print(text)
    return 1 if result["wrong"] or result["slope_bytes_per_call"] > FLAT_BYTES_PER_CALL else 0


if __name__ == "__main__":
    sys.exit(main())
