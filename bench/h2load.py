"""Closed-loop load by h2load (nghttp2), which speaks HTTP/1.1 and HTTP/2 at C speed.

A gRPC call is an HTTP/2 POST whose body is a framed message, so that h2load makes real calls; it does not
look at `grpc-status`, so answers and error counts are checked apart (`bench.subjects`).
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

MISSING = (
    "h2load was not found: the load comes from it. Install it and run again: "
    "`apt-get install nghttp2-client` (Debian, Ubuntu), `dnf install nghttp2` (Fedora)"
)
STREAMS_PER_CONNECTION = 16
RUN_LIMIT_S = 180


@dataclass(frozen=True)
class Target:
    """What is called: a URL, the body in a file, and the headers that make it a gRPC or a REST call."""

    url: str
    body: Path
    headers: tuple[str, ...]
    http1: bool = False


@dataclass(frozen=True)
class Load:
    """What one run of the generator saw."""

    calls: int
    errors: int  # answers that are not HTTP 2xx, and calls without an answer
    seconds: float
    p50_us: float
    p99_us: float
    max_us: float
    generator_cpu_s: float

    @property
    def calls_per_s(self) -> float:
        """Answered calls a second."""
        return self.calls / self.seconds


def executable() -> str:
    """Path of h2load.

    Raises:
        SystemExit: It is not installed; the text says how to get it.
    """
    found = shutil.which("h2load")
    if found is None:
        raise SystemExit(MISSING)
    return found


def frame(message: bytes) -> bytes:
    """A gRPC message as it travels: not compressed, its length before it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def run(target: Target, in_flight: int, calls: int) -> Load:
    """Makes `calls` calls, `in_flight` at any time, and waits for all of them.

    gRPC shares connections, 16 streams each; HTTP/1.1 has a connection for each call in flight.

    Raises:
        RuntimeError: The generator failed; the text has what it wrote.
    """
    connections = in_flight if target.http1 else max(1, in_flight // STREAMS_PER_CONNECTION)
    log = target.body.with_suffix(".log")
    log.unlink(missing_ok=True)
    shape = f"-n {calls} -c {connections} -m {in_flight // connections} -t 1"
    argv = [executable(), *shape.split(), "-d", str(target.body), f"--log-file={log}"]
    argv += ["--h1"] if target.http1 else []
    for header in target.headers:
        argv += ["-H", header]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    done = subprocess.run([*argv, target.url], capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
    elapsed_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or not log.exists():
        raise RuntimeError(f"h2load failed with status {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return _read(log, calls, elapsed_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def calls_for(target: Target, in_flight: int, seconds: float) -> int:
    """Warms the server up and finds out how many calls fill `seconds`."""
    calls = max(in_flight * 2, 8)
    while True:
        load = run(target, in_flight, calls)
        if load.seconds >= seconds / 4 or load.errors:
            return max(in_flight * 4, round(load.calls_per_s * seconds))
        calls *= 4


def _read(log: Path, calls: int, elapsed_s: float, cpu_s: float) -> Load:
    """Reads the log: a line a call with its start in us, its HTTP status and its duration in us."""
    table = np.array([[int(part) for part in line.split()] for line in log.read_text().splitlines()], np.int64)
    if not table.size:
        return Load(0, calls, elapsed_s, 0.0, 0.0, 0.0, cpu_s)
    good = table[(table[:, 1] >= 200) & (table[:, 1] < 300)]
    took_us = good[:, 2]
    if not took_us.size:
        return Load(0, calls, elapsed_s, 0.0, 0.0, 0.0, cpu_s)
    seconds = float((table[:, 0] + table[:, 2]).max() - table[:, 0].min()) / 1e6
    p50_us, p99_us = np.percentile(took_us, [50, 99])
    return Load(len(good), calls - len(good), seconds, float(p50_us), float(p99_us), float(took_us.max()), cpu_s)


def version() -> str:
    """What h2load says of itself, such as "nghttp2/1.52.0"."""
    text = subprocess.run([executable(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"nghttp2/\S+", text)
    return found.group() if found else text.strip()
