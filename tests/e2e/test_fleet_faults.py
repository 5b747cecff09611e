"""Replicas that are killed, stopped, replaced and reloaded under load: not one call is lost.

bench/chaos.py does more of it.
"""

from __future__ import annotations

import tempfile

import pytest
from bench import chaos


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # its path is short enough for sockets
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


async def test_killed_and_stopped_replicas_lose_no_call(tmp_path):
    found = await chaos.faults(tmp_path, rate=60, count=2, seed=3)
    assert found["calls"] > 150
    assert (found["failed"], found["failures"], found["tracebacks"]) == (0, {}, 0)


async def test_scaling_loses_no_call(tmp_path):
    found = await chaos.scale(tmp_path, rate=60)
    assert found["calls"] > 100
    assert found["failures"] == {}


@pytest.mark.slow
async def test_reloading_loses_no_call(tmp_path):
    found = await chaos.reload(tmp_path, rate=60)
    assert found["calls"] > 100
    assert found["failures"] == {}
    assert "models.echo.engin is not a setting" in found["wrong_settings"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_many_faults_lose_no_call(tmp_path):
    found = await chaos.faults(tmp_path, rate=200, count=20, seed=5)
    assert found["calls"] >= 10_000
    assert found["failures"] == {}
