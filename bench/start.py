"""From the start command to the first right answer, and the memory after it, over and over.

Usage: python -m bench.start [--starts 10] [--servers forno,forno-grpc] [--against CHECKOUT]

Starts of the servers take turns, so that what else the machine does meets all alike. A first start, which fills the
caches of the system and writes bytecode, is not counted. Memory is that of all the server's processes half a second
after the answer. The servers of another checkout, such as one of an earlier commit, take turns with those of this one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import report
from bench.process import ServerProcess, free_port
from bench.subjects import ROOT, SUBJECTS, environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Record
    from bench.subjects import Subject

SETTLE_S = 0.5


def start_once(subject: Subject, root: Path, name: str) -> Record:
    """One start of a checkout's server, to its end; `name` is what the record calls it."""
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as temporary:
        folder, port = Path(temporary), free_port()
        with ServerProcess(subject.command(port, folder), environment(root), folder / "server.log") as server:
            first_s = subject.first_answer_s(port, server)
            time.sleep(SETTLE_S)
            pss_mib, processes = server.pss_mib(), server.process_count()
            stop_s = server.stop()
    return {"server": name, "first_s": first_s, "pss_mib": pss_mib, "processes": processes, "stop_s": stop_s}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes results/start.json and .md."""
    parser = argparse.ArgumentParser("python -m bench.start", description=__doc__.partition("\n")[0])
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--servers", default="forno,forno-grpc")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="whose servers take turns with these")
    arguments = parser.parse_args(argv)
    subjects = [next(one for one in SUBJECTS if one.name == name) for name in arguments.servers.split(",")]
    started = [(subject, ROOT, subject.name) for subject in subjects]
    if other := arguments.against:
        commit = report.versions(other)["commit"]
        started += [(subject, other.resolve(), f"{subject.name} of {commit}") for subject in subjects]
    records = [start_once(*one) for _ in range(arguments.starts + 1) for one in started][len(started) :]
    facts = report.facts(
        "bench.start",
        f"{arguments.starts} starts of each after one that is not counted; they take turns",
        records=records,
    )
    lines = ["| server | first answer s | fastest | slowest | PSS MiB | end s |", "| --- |" + " --- |" * 5]
    for _, _, name in started:
        first_s, pss_mib, stop_s = (
            [record[key] for record in records if record["server"] == name] for key in ("first_s", "pss_mib", "stop_s")
        )
        lines.append(
            f"| {name} | {statistics.median(first_s):.2f} | {min(first_s):.2f} | {max(first_s):.2f} "
            f"| {statistics.median(pss_mib):.0f} | {statistics.median(stop_s):.2f} |"
        )
    text = "\n".join(lines)
    report.write(report.RESULTS, "start", facts, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
