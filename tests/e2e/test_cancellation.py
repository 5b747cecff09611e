"""Callers who leave or run out of time free their place at once: nothing runs for them that had not started."""

from __future__ import annotations

import heapq
import json
import random
import re
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer

from forno.v1 import predictor_pb2, predictor_pb2_grpc, rest_pb2, rest_pb2_grpc, tensors

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cancellation.json"
TRANSPORTS = ("envoy", "grpc")
MAX_ROWS = 16
RUN_MS = 6
GATE_S = 0.4
IN_FLIGHT = 64  # their rows wait for about four runs
# Envoy's HTTP/2 library guards against rapid resets: it ends a connection with more than 1,000 cancelled calls at once
# and 33 a second after that, and with it the calls of others on it. So the callers are several, as in life.
CONNECTIONS = 8
CONFIG = f"""
models:
  short:
    engine: "null"
    "null": {{delay_us: {RUN_MS * 1000}, shape: [-1, 2]}}
    batching: {{max_rows: {MAX_ROWS}}}
  gate:
    engine: "null"
    "null": {{delay_us: {round(GATE_S * 1e6)}, shape: [-1, 2]}}
    batching: {{max_rows: {MAX_ROWS}}}
"""
GAUGES = ("forno_pending_requests", "forno_pending_rows", "forno_running_rows")


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("storm") / "forno.yaml"
    file.write_text(CONFIG)
    with FornoServer(file, transport=request.param) as running:
        yield running


def stub(server):
    return predictor_pb2_grpc.PredictorStub(server.channel)


def request(model, number):
    x = tensors.encode("x", np.full((1, 2), number, np.float32))
    return predictor_pb2.PredictRequest(model=model, inputs=[x])


def is_right(response, number):
    return tensors.decode(response.outputs[0]).tolist() == [[number, number]]


def metrics(server, model):
    """The numbers of a model; outcomes of requests by "outcome:NAME"."""
    page = rest_pb2_grpc.RestStub(server.channel).Metrics(rest_pb2.MetricsRequest(), timeout=10).data.decode()
    found = Counter()
    for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", page, re.MULTILINE):
        if f'model="{model}"' in labels:
            outcome = re.search(r'outcome="(\w+)"', labels)
            found[f"outcome:{outcome.group(1)}" if outcome else name] = float(value)
    return found


def settled(server, model, limit_s=5.0):
    """The numbers of a model once nothing waits or runs."""
    end = time.monotonic() + limit_s
    while True:
        found = metrics(server, model)
        busy = {name: found[name] for name in GAUGES if found[name]}
        if not busy or time.monotonic() > end:
            assert not busy, f"still there after {limit_s} s"
            return found
        time.sleep(0.02)


def difference(after, before):
    return Counter({name: round(after[name] - before[name]) for name in after})


def storm(server, calls, seed):
    """Makes the calls, half of which are cut off at random moments; returns what came of them."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(server.target, options)) for _ in range(CONNECTIONS)]
        return blow(server, [predictor_pb2_grpc.PredictorStub(channel).Predict for channel in channels], calls, seed)


def blow(server, callers, calls, seed):
    chance = random.Random(seed)
    room = threading.Semaphore(IN_FLIGHT)
    cuts = []  # heap of (moment, number, call)
    kinds, made = [], []
    warm = [predict.future(request("short", 0), timeout=10) for predict in callers for _ in range(2 * MAX_ROWS)]
    assert all(is_right(call.result(), 0) for call in warm)
    before = settled(server, "short")
    began = time.monotonic()
    for number in range(calls):
        while not room.acquire(timeout=max(0.0, cuts[0][0] - time.monotonic()) if cuts else 10):
            cut(cuts)
        cut(cuts)
        kind = chance.choice(["kept", "kept", "cancelled", "timed out"])
        timeout_s = chance.uniform(0.001, 0.03) if kind == "timed out" else 30
        call = callers[number % CONNECTIONS].future(request("short", number), timeout=timeout_s)
        if kind == "cancelled":
            heapq.heappush(cuts, (time.monotonic() + chance.uniform(0, 0.03), number, call))
        call.add_done_callback(lambda _: room.release())
        kinds.append(kind)
        made.append(call)
    while cuts:
        time.sleep(max(0.0, cuts[0][0] - time.monotonic()))
        cut(cuts)
    codes = Counter()
    wrong = []
    for number, (kind, call) in enumerate(zip(kinds, made, strict=True)):
        try:
            response = call.result(timeout=30)
        except (grpc.RpcError, grpc.FutureCancelledError):
            pass
        else:
            if not is_right(response, number):
                wrong.append(number)
        codes[kind, call.code().name] += 1
    seconds = time.monotonic() - began
    return codes, wrong, difference(settled(server, "short"), before), seconds


def cut(cuts):
    """Cancels the calls whose moment has come."""
    while cuts and cuts[0][0] <= time.monotonic():
        heapq.heappop(cuts)[2].cancel()


def check(calls, codes, wrong, counted):
    """What must hold after a storm; returns its figures."""
    kept = codes["kept", "OK"]
    answered = sum(count for (_, code), count in codes.items() if code == "OK")
    assert not wrong
    assert codes.keys() <= {
        ("kept", "OK"),
        ("cancelled", "OK"),
        ("cancelled", "CANCELLED"),
        ("timed out", "OK"),
        ("timed out", "DEADLINE_EXCEEDED"),
        ("timed out", "RESOURCE_EXHAUSTED"),  # it could not have been in time, and was told at once
    }
    ran = counted["outcome:ok"]
    dropped = sum(counted[f"outcome:{name}"] for name in ("cancelled", "expired", "overloaded"))
    assert counted["forno_batch_rows_sum"] == ran, "each request has one row, and only requests have rows"
    assert answered <= ran <= calls - dropped, "whoever was dropped did not run, and whoever ran was not dropped"
    cut_off = calls - answered
    for_nobody = ran - answered
    # A row runs for nobody only where its caller left while it ran: a small part of a call's life here.
    assert for_nobody < cut_off / 2
    return {
        "calls": calls,
        "answered": answered,
        "answered_right": answered,
        "cut_off": cut_off,
        "cut_off_and_dropped_before_their_run": dropped,
        "cut_off_before_they_reached_the_model": calls - ran - dropped,
        "cut_off_while_they_ran": for_nobody,
        "runs": counted["forno_batch_rows_count"],
        "rows_a_run": round(ran / counted["forno_batch_rows_count"], 2),
        "pending_or_running_afterwards": 0,
        "kept_calls_answered": kept,
        "codes": {f"{kind}: {code}": count for (kind, code), count in sorted(codes.items())},
    }


def test_a_storm_of_callers_who_leave(server):
    codes, wrong, counted, _ = storm(server, 2000, seed=1)
    figures = check(2000, codes, wrong, counted)
    assert figures["cut_off_and_dropped_before_their_run"] > 100, figures
    assert figures["rows_a_run"] > MAX_ROWS / 4, figures


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_long_storm_is_written_down(server):
    calls = 10_000
    codes, wrong, counted, seconds = storm(server, calls, seed=2)
    figures = check(calls, codes, wrong, counted) | {"seconds": round(seconds, 1)}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    shape = {"max_rows": MAX_ROWS, "run_ms": RUN_MS, "in_flight": IN_FLIGHT, "connections": CONNECTIONS}
    command = "make soak TESTS=tests/e2e/test_cancellation.py"
    known.update({"command": command, "date": time.strftime("%Y-%m-%d"), "model": shape, server.transport: figures})
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def test_the_next_batch_is_full_of_living_requests(server):
    predict = stub(server).Predict
    before = settled(server, "gate")
    first = predict.future(request("gate", 0), timeout=60)
    time.sleep(GATE_S / 8)  # it runs: what comes now waits for it
    doomed = [predict.future(request("gate", -1), timeout=60) for _ in range(MAX_ROWS)]
    doomed += [predict.future(request("gate", -1), timeout=GATE_S / 4) for _ in range(MAX_ROWS)]
    living = [predict.future(request("gate", number), timeout=60) for number in range(MAX_ROWS)]
    time.sleep(GATE_S / 8)
    for call in doomed[:MAX_ROWS]:
        call.cancel()
    assert is_right(first.result(), 0)
    answers = [call.result() for call in living]
    assert all(is_right(answer, number) for number, answer in enumerate(answers))
    assert {answer.timings.batch_rows for answer in answers} == {MAX_ROWS}
    assert {call.code().name for call in doomed[MAX_ROWS:]} <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    counted = difference(settled(server, "gate"), before)
    assert (counted["forno_batch_rows_count"], counted["forno_batch_rows_sum"]) == (2, 1 + MAX_ROWS)
    assert sum(counted[f"outcome:{name}"] for name in ("cancelled", "expired", "overloaded")) == 2 * MAX_ROWS
