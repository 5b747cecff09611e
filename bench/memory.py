"""Whether memory stays flat: many calls against one server, its memory measured after each step.

Usage: python -m bench.memory [--calls 200000] [--step 20000] [--warm-up 100000] [--server forno]

The first calls fill caches and allocator arenas, so growth is judged after a warm-up: the slope of a straight
line through what follows, in bytes a call. What counts is memory that the server has written and shares with
nobody.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench import h2load, report
from bench.process import ServerProcess, free_port
from bench.subjects import SUBJECTS, environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Record
    from bench.subjects import Subject

FLAT_BYTES_PER_CALL = 16.0
"""The smallest Python object: whatever each call left behind would be larger. Allocators that settle take
less; how much shows `--server aio-echo`, which keeps nothing."""


def measure(subject: Subject, calls: int, step: int, warm_up: int, in_flight: int) -> list[Record]:
    """Memory after each step.

    Returns:
        A record for each step; the first is from after the warm-up.
    """
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as name:
        folder, port = Path(name), free_port()
        with ServerProcess(subject.command(port, folder), environment(), folder / "server.log") as server:
            subject.first_answer_s(port, server)
            target = subject.target(port, folder)
            failed_before = subject.failed_calls(port) or 0
            errors = h2load.run(target, in_flight, warm_up).errors
            records = [_record(server, 0, errors)]
            for done in range(step, calls + 1, step):
                errors += h2load.run(target, in_flight, step).errors
                records.append(_record(server, done, errors))
                print(f"{done:>9,} calls: {records[-1]['written_mib']:.1f} MiB, {errors} errors", flush=True)
            subject.check_answers(port)
            records[-1]["errors"] += (subject.failed_calls(port) or 0) - failed_before
    return records


def _record(server: ServerProcess, calls: int, errors: int) -> Record:
    written_mib, pss_mib = server.written_mib(), server.pss_mib()
    return {"calls": calls, "errors": errors, "written_mib": written_mib, "pss_mib": pss_mib}


def slope_bytes_per_call(records: Sequence[Record]) -> float:
    """Growth since the warm-up."""
    if len(records) < 3:
        raise ValueError(f"{len(records) - 1} steps do not show a slope; use at least 2")
    calls = [record["calls"] for record in records]
    slope_mib = np.polyfit(calls, [record["written_mib"] for record in records], 1)[0]
    return float(slope_mib) * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes results/memory-SERVER.json.

    Returns:
        Exit status: 1 where memory grows or calls failed.
    """
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--step", type=int, default=20_000)
    parser.add_argument("--warm-up", type=int, default=100_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--server", default="forno", choices=[subject.name for subject in SUBJECTS])
    arguments = parser.parse_args(argv)
    subject = next(subject for subject in SUBJECTS if subject.name == arguments.server)
    records = measure(subject, arguments.calls, arguments.step, arguments.warm_up, arguments.in_flight)
    slope = slope_bytes_per_call(records)
    errors = records[-1]["errors"]
    facts = report.facts(
        "bench.memory",
        f"{arguments.calls:,} calls after {arguments.warm_up:,}, {arguments.in_flight} in flight",
        slope_bytes_per_call=slope,
        records=records,
    )
    lines = ["| calls | written memory MiB | PSS MiB |", "| --- | --- | --- |"]
    lines += [f"| {record['calls']:,} | {record['written_mib']:.1f} | {record['pss_mib']:.1f} |" for record in records]
    text = "\n".join([*lines, "", f"Slope: {slope:.2f} bytes a call; {errors} errors."])
    report.write(report.RESULTS, f"memory-{subject.name}", facts, text)
    print(text)
    return 1 if errors or slope > FLAT_BYTES_PER_CALL else 0


if __name__ == "__main__":
    sys.exit(main())
