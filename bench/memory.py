"""Whether memory stays flat: many calls against one server, its memory measured after each step.

Usage: python -m bench.memory [--calls 200000] [--step 20000] [--server forno] [--in-flight 64]

The first step fills caches and allocator arenas, so growth is judged from the second on: the slope of a straight
line through the rest, in bytes a call. What counts is memory that the server has written and shares with
nobody.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench import h2load, report
from bench.process import ServerProcess, free_port
from bench.subjects import ROOT, SUBJECTS, environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Record
    from bench.subjects import Subject

FLAT_BYTES_PER_CALL = 8.0
"""Below this, 200,000 calls cost less than 2 MiB: what allocators shift from one measurement to the next."""


def measure(subject: Subject, calls: int, step: int, in_flight: int) -> list[Record]:
    """Memory after each step.

    Returns:
        A record for each step; the first is from before the first call of the load.
    """
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as name:
        folder, port = Path(name), free_port()
        with ServerProcess(subject.command(port, folder), environment(), folder / "server.log") as server:
            subject.first_answer_s(port, server)
            target = subject.target(port, folder)
            failed_before = subject.failed_calls(port) or 0
            records = [_record(server, 0, 0)]
            errors = 0
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
    """Growth from the second step on."""
    steady = records[1:]
    if len(steady) < 2:
        raise ValueError(f"{len(steady)} steps do not show a slope; use at least 2")
    slope_mib = np.polyfit(
        [record["calls"] for record in steady], [record["written_mib"] for record in steady], 1
    )[0]
    return float(slope_mib) * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes results/memory-SERVER.json.

    Returns:
        Exit status: 1 where memory grows or calls failed.
    """
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--step", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--server", default="forno", choices=[subject.name for subject in SUBJECTS])
    arguments = parser.parse_args(argv)
    subject = next(subject for subject in SUBJECTS if subject.name == arguments.server)
    records = measure(subject, arguments.calls, arguments.step, arguments.in_flight)
    slope = slope_bytes_per_call(records)
    errors = records[-1]["errors"]
    facts: Record = {
        "command": shlex.join(["python", "-m", "bench.memory", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "method": f"{arguments.calls:,} calls, {arguments.in_flight} in flight, measured each {arguments.step:,}",
        "machine": report.machine(),
        "versions": report.versions(ROOT),
        "slope_bytes_per_call": slope,
        "records": records,
    }
    lines = ["| calls | written memory MiB | PSS MiB |", "| --- | --- | --- |"]
    lines += [
        f"| {record['calls']:,} | {record['written_mib']:.1f} | {record['pss_mib']:.1f} |"
        for record in records
    ]
    text = "\n".join(
        [*lines, "", f"Slope from the second step on: {slope:.2f} bytes a call; {errors} errors."]
    )
    report.write(ROOT / "bench" / "results", f"memory-{subject.name}", facts, text)
    print(text)
    return 1 if errors or slope > FLAT_BYTES_PER_CALL else 0


if __name__ == "__main__":
    sys.exit(main())
