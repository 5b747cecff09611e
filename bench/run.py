"""Measures all servers, their floors and their limit in one run, and writes down the figures.

Each round starts every server anew, one at a time: time to its first right answer, answers checked, a closed
loop at each number of calls in flight, answers checked again, stopped. Rounds are interleaved, so that a
drift of the machine meets all servers alike; the report has the median of the rounds and their range.

Where the limit is what a server is compared with, a round is cut into windows of about four seconds in which limit and
server take turns: the machine's speed moves by a tenth now and then, and that has to meet both. A window in which
other processes took part is measured again, up to three times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import h2load, limit, report
from bench.process import ServerProcess, free_port, machine_busy_s
from bench.subjects import SUBJECTS, Subject, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.report import Record

IN_FLIGHT = {"tiny": (1, 16, 64), "resnet50": (1, 8)}
BASE = {"tiny": "forno-grpc", "resnet50": "limit"}
WINDOW_S = 4.0
OTHERS_SHARE = 0.05
TRIES = 3


def model_of(subject: Subject) -> str:
    """The model whose table a server belongs to; echoes and the null engine carry the messages of `tiny`."""
    return subject.serves if subject.serves in IN_FLIGHT else "tiny"


def measure_server(
    subject: Subject,
    in_flight: Sequence[int],
    seconds: float,
    extra: tuple[str, ...] = (),
    beside: limit.Setting | None = None,
) -> list[Record]:
    """One round of one server.

    Args:
        subject: The server.
        in_flight: Numbers of calls in flight to measure at.
        seconds: Roughly how long each measurement lasts.
        extra: Further arguments of `forno serve`.
        beside: The limit's setting that takes turns with it; None = it has the round for itself.

    Returns:
        Records for each number of calls in flight, of the limit too where that takes turns.
    """
    with tempfile.TemporaryDirectory(prefix="forno-bench-") as name:
        folder, port = Path(name), free_port()
        with ServerProcess(subject.command(port, folder, extra), environment(), folder / "server.log") as server:
            first_s = subject.first_answer_s(port, server)
            subject.check_answers(port)
            target = subject.target(port, folder)
            failed_before = subject.failed_calls(port)
            records: list[Record] = []
            beside_it: list[Record] = []
            for count in in_flight:
                windows = max(1, round(seconds / WINDOW_S)) if beside else 1
                calls = h2load.calls_for(target, count, seconds / windows)
                for _ in range(windows):
                    if beside:
                        beside_it.append(_quietest(partial(_limit_record, subject.serves, beside, count, WINDOW_S)))
                    records.append(_quietest(partial(_measure_load, target, server, count, calls)))
            subject.check_answers(port)
            failed = subject.failed_calls(port)
            server.check_alive()
            rpc_errors = None if failed is None else failed - (failed_before or 0)
            for record in records:
                record.update(subject=subject.name, model=model_of(subject), first_answer_s=first_s)
                record["rpc_errors"] = rpc_errors
    return records + beside_it


def _quietest(measure: Callable[[], Record]) -> Record:
    """The window that met the least of other processes' work; one, if that was little."""
    found: list[Record] = []
    while len(found) < TRIES and not (found and found[-1]["other_cpu_share"] <= OTHERS_SHARE):
        found.append(measure())
    return min(found, key=lambda record: record["other_cpu_share"])


def _measure_load(target: h2load.Target, server: ServerProcess, in_flight: int, calls: int) -> Record:
    cpu_s, busy_s, began_s = server.cpu_s(), machine_busy_s(), time.perf_counter()
    load = h2load.run(target, in_flight, calls)
    busy_s, elapsed_s = machine_busy_s() - busy_s, time.perf_counter() - began_s
    cpu_s = server.cpu_s() - cpu_s
    return {
        "in_flight": in_flight,
        "calls": load.calls,
        "errors": load.errors,
        "seconds": load.seconds,
        "calls_per_s": load.calls_per_s,
        "p50_us": load.p50_us,
        "p99_us": load.p99_us,
        "max_us": load.max_us,
        "cpu_us_per_call": cpu_s * 1e6 / max(load.calls, 1),
        "generator_cpu_us_per_call": load.generator_cpu_s * 1e6 / max(load.calls, 1),
        "other_cpu_share": max(0.0, busy_s - cpu_s - load.generator_cpu_s) / elapsed_s,
        "pss_mib": server.pss_mib(),
        "process_count": server.process_count(),
    }


def measure_limit(model: str, settings: Sequence[limit.Setting], seconds: float) -> list[limit.Speed]:
    """ONNX Runtime in this process, fastest setting first."""
    speeds = [limit.measure(model, setting, seconds) for setting in settings]
    return sorted(speeds, key=lambda speed: speed.rows_per_s, reverse=True)


def _limit_record(model: str, setting: limit.Setting, in_flight: int, seconds: float) -> Record:
    """The limit beside so many calls in flight, in the unit of a call of one row."""
    busy_s, own_s, began_s = machine_busy_s(), time.process_time(), time.perf_counter()
    speed = limit.measure(model, setting, seconds)
    busy_s, own_s = machine_busy_s() - busy_s, time.process_time() - own_s
    return {
        "subject": "limit", "model": model, "in_flight": in_flight, "setting": str(setting),
        "calls_per_s": speed.rows_per_s, "cpu_us_per_call": speed.cpu_us_per_row, "p50_us": speed.p50_us,
        "p99_us": speed.p99_us, "errors": 0,
        "other_cpu_share": max(0.0, busy_s - own_s) / (time.perf_counter() - began_s),
    }  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="latest", help="results/NAME.json and NAME.md are written")
    parser.add_argument("--models", default="tiny,resnet50", help="which of tiny, resnet50")
    parser.add_argument("--servers", default="", help="names of servers, comma between; empty = all: "
                        + ", ".join(subject.name for subject in SUBJECTS))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--quick", action="store_true", help="1 round of 0.5 s: does it all run?")
    parser.add_argument("--limit-callers", type=int, default=0,
                        help="most threads that call the runtime at once where it is the limit; 0 = a core each. "
                        "1 is what a server of one instance has: one run at a time, by all cores")  # fmt: skip
    parser.add_argument("--base", default="", help="server to which ratios are shown; limit is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement that the arguments ask for.

    Returns:
        Exit status: 1 where a server failed, answered wrong or with errors.
    """
    arguments = _arguments(argv)
    rounds, seconds = (1, 0.5) if arguments.quick else (arguments.rounds, arguments.seconds)
    h2load.executable()
    models_wanted = arguments.models.split(",")
    names = arguments.servers.split(",") if arguments.servers else [subject.name for subject in SUBJECTS]
    chosen = [subject for subject in SUBJECTS if subject.name in names and model_of(subject) in models_wanted]
    settings = {model: limit.grid(model, arguments.limit_callers) for model in models_wanted}
    grids = {model: measure_limit(model, settings[model], min(seconds, 2.0)) for model in models_wanted}
    records: list[Record] = []
    problems: list[str] = []
    for number in range(1, rounds + 1):
        for model in models_wanted:
            if BASE[model] != "limit":
                setting = grids[model][0].setting
                records += [_limit_record(model, setting, count, seconds) for count in IN_FLIGHT[model]]
        for subject in chosen:
            try:
                beside = grids[model][0].setting if BASE[model := model_of(subject)] == "limit" else None
                found = measure_server(subject, IN_FLIGHT[model], seconds, beside=beside)
            except Exception as error:  # noqa: BLE001  (one broken server must not cost the figures of the others)
                problems.append(f"round {number}: {subject.name}: {type(error).__name__}: {error}")
                _say(problems[-1])
                continue
            for record in found:
                _say(f"round {number}: {_line(record)}")
            records += found
    return _finish(arguments, records, problems, grids, f"{rounds} interleaved rounds of {seconds} s")


def _finish(
    arguments: argparse.Namespace, records: list[Record], problems: list[str],
    grids: dict[str, list[limit.Speed]], method: str,
) -> int:  # fmt: skip
    summaries = report.summarise(records)
    facts = report.facts(
        "bench",
        f"closed loop, {h2load.version()} on the same machine, {method}, medians",
        summary=summaries,
        problems=problems,
        limits={
            model: [{"setting": str(speed.setting), "rows_per_s": speed.rows_per_s} for speed in speeds]
            for model, speeds in grids.items()
        },
        records=records,
    )
    text = "\n".join(
        report.table([s for s in summaries if s["model"] == model], arguments.base or BASE[model]) for model in grids
    )
    text += "".join(f"\nIn process, {model}: " + "; ".join(
        f"{speed.setting} {speed.rows_per_s:,.1f} rows/s" for speed in speeds) + "\n"
        for model, speeds in grids.items())  # fmt: skip
    text += "".join(f"\nFailed: {problem}\n" for problem in problems)
    as_json, as_text = report.write(report.RESULTS, arguments.name, facts, text)
    _say(f"\n{report.header(facts)}\n\n{text}\nWritten: {as_json} and {as_text}")
    bad = [summary for summary in summaries if summary["errors"] or summary["rpc_errors"]]
    return 1 if problems or bad else 0


def _line(record: Record) -> str:
    if record["subject"] == "limit":
        return f"limit {record['model']}: {record['calls_per_s']:,.1f} rows/s with {record['setting']}"
    return (
        f"{record['subject']} x{record['in_flight']}: {record['calls_per_s']:,.0f} calls/s, "
        f"p50 {record['p50_us'] / 1000:.3f} ms, p99 {record['p99_us'] / 1000:.3f} ms, "
        f"{record['cpu_us_per_call']:.1f} us CPU a call, {record['pss_mib']:.0f} MiB, "
        f"first answer {record['first_answer_s']:.2f} s, {record['errors']} errors, "
        f"others used {record['other_cpu_share']:.0%} of a core"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
