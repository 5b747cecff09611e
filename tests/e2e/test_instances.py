"""Several runs of one model at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.e2e.forno_server import FornoServer

from forno.client import Client

if TYPE_CHECKING:
    from pathlib import Path

RUN_S = 0.1
CALLS = 12


@pytest.mark.parametrize(("instances", "least_s", "most_s"), [(1, 1.15, 30.0), (4, 0.25, 0.9)])
def test_runs_go_on_at_once(tmp_path: Path, instances: int, least_s: float, most_s: float):
    (tmp_path / "forno.yaml").write_text(
        f"models: {{slow: {{engine: 'null', instances: {instances}, batching: {{max_rows: 1}},"
        f" null: {{delay_us: {int(RUN_S * 1e6)}}}}}}}\n"
    )
    with (
        FornoServer(tmp_path / "forno.yaml") as server,
        Client(server.target) as client,
        ThreadPoolExecutor(CALLS) as pool,
    ):

        def call(number: int) -> float:
            answer = client.predict("slow", {"x": np.full((1, 3), number, np.float32)})
            return float(answer.outputs["y"][0, 0])

        call(0)
        began_s = time.monotonic()
        assert list(pool.map(call, range(CALLS))) == list(range(CALLS))
        assert least_s <= time.monotonic() - began_s <= most_s
