"""What a lock costs a call: the same server open, and asking who calls, under the same load in turn.

Usage: python -m bench.locks [--seconds S] [--rounds N]

Four callers keep 16 calls in flight each, on a connection of their own: one key for all, a key each, a token each, and
a key each with a rate limit that is never reached. Writes results/locks.json and results/locks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from bench import h2load, models, report
from bench.process import ServerProcess, free_port
from bench.subjects import Subject, environment, serving
from forno.client import Client
from forno.server.security import keys

CALLERS, IN_FLIGHT_EACH = 4, 16
ISSUER, AUDIENCE = "https://id.example", "forno"
SUBJECT = Subject("forno", "tiny", "envoy")


class Kind:
    """One way to be asked, and a running server that asks so.

    Args:
        name: What the table calls it.
        folder: For its files.
        stack: Ends the server.
        security: Settings, beside the files made here.
        credentials: Headers, one for each caller; empty = none.
    """

    def __init__(
        self, name: str, folder: Path, stack: contextlib.ExitStack, security: report.Record, credentials: list[str]
    ) -> None:
        self.name = name
        self.credentials = credentials
        port = free_port()
        settings = folder / f"{name.replace(' ', '-')}.yaml"
        document = {"models": {"tiny": {"path": str(models.path_of("tiny"))}}, "security": security}
        settings.write_text(json.dumps(document))
        log = settings.with_suffix(".log")
        self.server = stack.enter_context(ServerProcess(serving(settings, port), environment(), log))
        self.server.wait_ready(port)
        for credential in set(credentials) or {""}:  # each is answered, before its calls are counted
            with Client(f"127.0.0.1:{port}", credential=credential.rpartition(" ")[2]) as client:
                client.predict("tiny", {"x": models.rows_of("tiny", 1)})
        target = SUBJECT.target(port, folder)
        self.targets = []
        for number in range(CALLERS):
            body = folder / f"{settings.stem}-{number}.body"
            body.write_bytes(target.body.read_bytes())
            shown = (credentials[number],) if credentials else ()
            self.targets.append(h2load.Target(target.url, body, (*target.headers, *shown)))

    def load(self, pool: ThreadPoolExecutor, calls: int) -> report.Record:
        """So many calls of each caller."""
        cpu_s, began_s = self.server.cpu_s(), time.perf_counter()
        loads = list(pool.map(lambda target: h2load.run(target, IN_FLIGHT_EACH, calls), self.targets))
        took_s = time.perf_counter() - began_s
        answered = sum(load.calls for load in loads)
        return {
            "cpu_us_per_call": (self.server.cpu_s() - cpu_s) / answered * 1e6,
            "calls_per_s": answered / took_s,
            "p50_us": statistics.median(load.p50_us for load in loads),
            "errors": sum(load.errors for load in loads),
        }


def kinds(folder: Path, stack: contextlib.ExitStack) -> list[Kind]:
    """All kinds, each with a server that runs."""
    file, issuer = folder / "keys.yaml", ec.generate_private_key(ec.SECP256R1())
    made = [f"x-api-key: {keys.add(file, f'caller {number}', ['predict'])}" for number in range(CALLERS)]
    public = jwt.algorithms.ECAlgorithm.to_jwk(issuer.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "alg": "ES256"}]}))
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 3600, "scope": "predict:model/tiny"}
    tokens = [
        f"authorization: Bearer {jwt.encode({**claims, 'sub': str(number)}, issuer, 'ES256', {'kid': '1'})}"
        for number in range(CALLERS)
    ]
    by_key = {"keys_file": str(file)}
    by_token = {
        "jwt": {"jwks_file": str(folder / "jwks.json"), "issuer": ISSUER, "audience": AUDIENCE, "algorithms": ["ES256"]}
    }
    limited = {**by_key, "rate_limit": {"calls_per_s": 1e6}}
    return [
        Kind("open", folder, stack, {}, []),
        Kind("one key", folder, stack, by_key, made[:1] * CALLERS),
        Kind("a key each", folder, stack, by_key, made),
        Kind("a token each", folder, stack, by_token, tokens),
        Kind("a key each and a limit", folder, stack, limited, made),
    ]


def measure(seconds: float, rounds: int) -> list[report.Record]:
    """One row for each kind: medians over rounds, in each of which every kind has its turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forno-")))
        pool = stack.enter_context(ThreadPoolExecutor(CALLERS))
        subjects = kinds(folder, stack)
        calls = h2load.calls_for(subjects[0].targets[0], IN_FLIGHT_EACH, seconds) // 2
        for kind in subjects:
            kind.load(pool, calls // 4)
        found: list[list[report.Record]] = [[] for _ in subjects]
        for number in range(rounds):
            for kind, records in list(zip(subjects, found, strict=True))[:: 1 if number % 2 else -1]:
                records.append(kind.load(pool, calls))
    rows = []
    for kind, records in zip(subjects, found, strict=True):
        row: report.Record = {"kind": kind.name, "errors": sum(record["errors"] for record in records)}
        for name in ("cpu_us_per_call", "calls_per_s", "p50_us"):
            row[name] = round(statistics.median(record[name] for record in records), 1)
        # Of each round its own ratio: what the machine does besides is then the same for both.
        ratios = [
            record["cpu_us_per_call"] / base["cpu_us_per_call"] for record, base in zip(records, found[0], strict=True)
        ]
        row["cpu_ratio"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def table(rows: list[report.Record]) -> str:
    """The rows as Markdown."""
    lines = ["| who is asked | CPU us a call | against open | calls/s | p50 us |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['kind']} | {row['cpu_us_per_call']} | {row['cpu_ratio']}x | {row['calls_per_s']:,.0f} "
        f"| {row['p50_us']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status; 1 if a call failed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.locks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each caller's load in a round")
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    rows = measure(given.seconds, given.rounds)
    facts = report.facts(
        "bench.locks",
        "kinds take turns in every round; medians over the rounds, and of each round's own ratios",
        rows=rows,
    )
    text = table(rows)
    print(text)
    report.write(report.RESULTS, "locks", facts, text)
    return int(any(row["errors"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
