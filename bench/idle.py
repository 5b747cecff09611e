"""Idle costs nothing: one call in flight, with batching and without, side by side.

Usage: python -m bench.idle

Two servers run at once, one with batching as it is by default, one with `batching.max_rows` 1. Each round loads them in
turn, in changing order, with one call in flight over gRPC through Envoy; so a drift of the machine meets both alike.
What else happens on a machine only ever adds time, and more than what is to be told apart; so what counts is the
quietest tenth of the rounds of each. `tiny` runs on the event loop, `null` takes 2 ms on a thread of its own. Writes
results/idle.json and results/idle.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import h2load, models, report
from bench.process import ServerProcess, free_port
from bench.subjects import Subject, environment, serving

SUBJECTS = (Subject("tiny", "tiny", "envoy"), Subject("null", "null", "envoy"))
RUN_US = 2000
OFF: dict[str, Any] = {"batching": {"max_rows": 1}}
LIMIT = 1.03
QUIET = 10  # the quietest of so many rounds counts


def start(stack: ExitStack, folder: Path, settings: dict[str, Any]) -> int:
    """Starts a server of both models, and waits for right answers.

    Returns:
        Its port.
    """
    folder.mkdir()
    config = folder / "forno.yaml"
    served: dict[str, Any] = {
        "tiny": {"path": str(models.path_of("tiny")), **settings},
        "null": {"engine": "null", "null": {"shape": [-1, 64], "delay_us": RUN_US}, **settings},
    }
    config.write_text(json.dumps({"models": served}))
    port = free_port()
    server = stack.enter_context(ServerProcess(serving(config, port), environment(), folder / "server.log"))
    for subject in SUBJECTS:
        subject.first_answer_s(port, server)
        subject.check_answers(port)
    return port


def measure(rounds: int, seconds: float) -> list[report.Record]:
    """A record for each model and round."""
    records: list[report.Record] = []
    with tempfile.TemporaryDirectory(prefix="forno-idle-") as name, ExitStack() as stack:
        folder = Path(name)
        ports = {"on": start(stack, folder / "on", {}), "off": start(stack, folder / "off", OFF)}
        targets = {
            (subject.name, which): subject.target(port, folder / which)
            for subject in SUBJECTS
            for which, port in ports.items()
        }
        calls = {key: h2load.calls_for(target, 1, seconds) for key, target in targets.items()}
        for number in range(rounds):
            for subject in SUBJECTS:
                order = ("on", "off") if number % 2 else ("off", "on")
                loads = {
                    which: h2load.run(targets[subject.name, which], 1, calls[subject.name, "on"]) for which in order
                }
                record: report.Record = {"model": subject.name, "round": number + 1}
                for which, load in loads.items():
                    record[f"{which}_p50_us"], record[f"{which}_p99_us"] = load.p50_us, load.p99_us
                    record[f"{which}_calls"], record[f"{which}_errors"] = load.calls, load.errors
                records.append(record)
    return records


def summarise(records: list[report.Record]) -> list[report.Record]:
    """For each model what the quietest rounds show, and over all rounds the quartiles of the ratio of on to off."""
    found = []
    for subject in SUBJECTS:
        group = [record for record in records if record["model"] == subject.name]
        ratios = [record["on_p50_us"] / record["off_p50_us"] for record in group]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        quiet = {
            which: sorted(record[f"{which}_p50_us"] for record in group)[len(group) // QUIET] for which in ("on", "off")
        }
        found.append({
            "model": subject.name,
            "rounds": len(group),
            "on_p50_us": quiet["on"],
            "off_p50_us": quiet["off"],
            "ratio": round(quiet["on"] / quiet["off"], 4),
            "ratio_of_rounds": [round(low, 4), round(middle, 4), round(high, 4)],
            "errors": sum(record["on_errors"] + record["off_errors"] for record in group),
            "holds": quiet["on"] <= LIMIT * quiet["off"],
        })  # fmt: skip
    return found


def table(summary: list[report.Record]) -> str:
    """The summary as Markdown."""
    lines = [
        f"One call in flight: p50 with batching against without; at most {LIMIT} is wanted.\n",
        "| model | p50 on, us | p50 off, us | on/off, quietest tenth | quartiles over all rounds | errors |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['on_p50_us']:,.0f} | {row['off_p50_us']:,.0f} | {row['ratio']:.3f} "
        f"| {', '.join(f'{ratio:.3f}' for ratio in row['ratio_of_rounds'])} | {row['errors']} |"
        for row in summary
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status: 1 where batching costs an idle server more than the limit, or a call failed.
    """
    parser = argparse.ArgumentParser("python -m bench.idle", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="how often each is measured")
    parser.add_argument("--seconds", type=float, default=0.08, help="length of one measurement")
    arguments = parser.parse_args()
    records = measure(arguments.rounds, arguments.seconds)
    summary = summarise(records)
    facts = report.facts(
        "bench.idle",
        (
            f"one call in flight, {h2load.version()} on the same machine, {arguments.rounds} interleaved rounds "
            f"of {arguments.seconds} s, medians"
        ),
        summary=summary,
        records=records,
    )
    text = table(summary)
    report.write(report.RESULTS, "idle", facts, text)
    print(text)
    return 0 if all(row["holds"] and not row["errors"] for row in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
