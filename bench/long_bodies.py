"""What small gRPC calls wait for beside long JSON bodies, which one caller sends without a pause.

Usage: python -m bench.long_bodies [--seconds 5]

One small call is in flight at a time. The bodies are rows of 3x224x224 numbers, echoed as JSON; in some a word, "NaN",
stands among the numbers, which the ordinary reader has to read. Writes results/long_bodies.json and
results/long_bodies.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import report
from bench.process import ServerProcess, free_port
from bench.subjects import ROOT, environment, serving
from forno.v1 import predictor_pb2, predictor_pb2_grpc, tensors

MODELS = {
    "small": {"engine": "null", "null": {"shape": [-1, 4]}},
    "large": {"engine": "null", "null": {"shape": [-1, 3, 224, 224]}},
}
CASES = ((0, False), (1, False), (1, True), (10, False), (10, True))  # rows, and whether with a word
QUANTILES = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}


def body_of(rows: int, word: bool) -> bytes:
    """A request in rows, its numbers with eight digits."""
    chance = random.Random(rows)  # noqa: S311  (no secret)
    values: list[Any] = [[[[round(chance.random(), 8) for _ in range(224)] for _ in range(224)] for _ in range(3)]]
    values[0][0][0][0] = "NaN" if word else 0.5
    return json.dumps({"instances": values * rows}, separators=(",", ":")).encode()


def post(port: int, rows: int, word: bool) -> None:
    """Sends a body until it is killed; a line for each answer, with its size and the seconds it took."""
    body = body_of(rows, word)
    while True:
        began_s = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", "/v1/models/large:predict", body, {"content-type": "application/json"})
            reply = connection.getresponse()
            size = len(reply.read())
        if reply.status != http.client.OK:
            raise SystemExit(f"status {reply.status}")
        print(len(body), size, time.perf_counter() - began_s, flush=True)


def small_calls(predict: Any, seconds: float) -> list[float]:
    """Seconds that each of the calls took which followed one another for so long."""
    x = np.arange(4, dtype=np.float32)[None]
    request = predictor_pb2.PredictRequest(model="small", inputs=[tensors.encode("x", x)])
    took_s: list[float] = []
    end = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < end:
        answer = predict(request, timeout=30, wait_for_ready=True)
        took_s.append(time.perf_counter() - began_s)
        if tensors.decode(answer.outputs[0]).tolist() != x.tolist():
            raise RuntimeError(f"a wrong answer: {answer}")
    return sorted(took_s)


def case(port: int, predict: Any, rows: int, word: bool, seconds: float) -> report.Record:
    """Figures of one kind of body; of none, where there are no rows."""
    found: report.Record = {"rows": rows, "word": word}
    if rows:
        command = [sys.executable, "-m", "bench.long_bodies", "--post", str(port), str(rows), str(int(word))]
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as poster:
            try:
                first = poster.stdout.readline().split() if poster.stdout else []
                if not first:
                    raise RuntimeError("the bodies were not answered")
                took_s = small_calls(predict, seconds)
            finally:
                poster.kill()
            answers = [
                float(line.split()[2]) for line in (poster.stdout or ()) if line.count(" ") == 2 and "\n" in line
            ]
        found |= {"body_bytes": int(first[0]), "answer_bytes": int(first[1])}
        found |= {"bodies": len(answers), "body_p50_ms": round(sorted(answers)[len(answers) // 2] * 1e3, 1)}
    else:
        took_s = small_calls(predict, seconds)
    figures = {name: took_s[min(int(part * len(took_s)), len(took_s) - 1)] for name, part in QUANTILES.items()}
    return found | {"calls": len(took_s)} | {name: round(value * 1e3, 2) for name, value in figures.items()}


def table(records: list[report.Record]) -> str:
    """The figures as Markdown."""
    lines = [
        "| beside | body | a body takes, ms | small calls | p50, ms | p99, ms | longest, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in records:
        name = "with a word among the numbers" if row["word"] else "numbers alone"
        size = f"{row['body_bytes'] / 1e6:.1f} MB" if row["rows"] else "-"
        lines.append(
            f"| {name if row['rows'] else 'nothing'} | {size} | {row.get('body_p50_ms', '-')} | {row['calls']:,} "
            f"| {row['p50_ms']} | {row['p99_ms']} | {row['max_ms']} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status 0.
    """
    parser = argparse.ArgumentParser("python -m bench.long_bodies", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of small calls beside each kind of body")
    parser.add_argument("--post", type=int, nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.post:
        post(asked.post[0], asked.post[1], bool(asked.post[2]))
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="forno-long-") as name:
        folder = Path(name)
        settings = folder / "forno.yaml"
        settings.write_text(json.dumps({"models": MODELS}))
        with (
            ServerProcess(serving(settings, port), environment(), folder / "server.log"),
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            predict = predictor_pb2_grpc.PredictorStub(channel).Predict
            small_calls(predict, 1.0)
            records = [case(port, predict, rows, word, asked.seconds) for rows, word in CASES]
    facts = report.facts(
        "bench.long_bodies",
        "one small call in flight, one caller that sends bodies without a pause",
        records=records,
    )
    text = table(records)
    report.write(report.RESULTS, "long_bodies", facts, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
