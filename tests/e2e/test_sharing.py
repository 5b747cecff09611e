"""Models that compete for one core get it by their weights."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer
from tests.unit.onnx_models import Type, helper, save

from forno.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = 2.5
CALLERS = 4
WIDTH, LAYERS = 256, 60


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FornoServer]:
    """Two equal models, one of them with a quarter of the weight, on one core."""
    weights = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "x", "w"], [f"x{i + 1}"]) for i in range(LAYERS)]
    nodes[-1].output[0] = "y"
    for name, weight in (("much", 1.0), ("little", 0.25)):
        folder = tmp_path / name
        (folder / "1").mkdir(parents=True)
        row = ["n", WIDTH]
        save(folder / "1" / "model.onnx", [("x", Type.FLOAT, row)], [("y", Type.FLOAT, row)], nodes, {"w": weights})
        (folder / "model.yaml").write_text(f"cpu_weight: {weight}\n")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with FornoServer(tmp_path, "--set", "models.much.inline_below_us=0") as running:
            os.sched_setaffinity(0, cores)
            yield running
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux weighs single threads")
def test_a_model_of_a_quarter_of_the_weight_gets_about_a_quarter(server: FornoServer):
    answers = {"much": 0, "little": 0}
    end_s = time.monotonic() + SECONDS
    row = {"x": np.ones((1, WIDTH), np.float32)}

    def call(model: str) -> None:
        with Client(server.target) as client:
            while time.monotonic() < end_s:
                client.predict(model, row)
                answers[model] += 1

    threads = [threading.Thread(target=call, args=(model,)) for model in answers for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers["little"] > 20
    assert 2.0 < answers["much"] / answers["little"] < 8.0, answers
