"""What the first runs find out about a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from onnx import TensorProto as Type
from tests.unit import onnx_models
from tests.unit.puppets import PuppetEngine

from forno.server.config import BatchingSettings, OnnxSettings
from forno.server.engines.onnx import OnnxEngine
from forno.server.errors import ConfigError
from forno.server.slots.host import HostSlot
from forno.server.warmup import WarmUp, warm_up

if TYPE_CHECKING:
    from pathlib import Path


def warmed(path: Path, inline_below_us: int = 100_000, **batching: Any) -> WarmUp:
    return warm_up(OnnxEngine(path, OnnxSettings()), BatchingSettings(**batching), inline_below_us)


def test_independent_rows_are_found(tmp_path):
    found = warmed(onnx_models.mlp(tmp_path / "m.onnx"))
    assert found.signature.batched
    assert found.passed
    assert found.inline
    assert not found.note


@pytest.mark.parametrize("type_", [Type.FLOAT, Type.FLOAT16, Type.BFLOAT16, Type.INT8, Type.BOOL, Type.STRING])
def test_rows_of_every_type_are_made_up(tmp_path, type_):
    found = warmed(onnx_models.one(tmp_path / "m.onnx", "Identity", type_, ["n", "m"]))
    assert found.signature.batched
    assert found.passed


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (onnx_models.centered, "output 'y' depends on which rows run together"),
        (onnx_models.filtered, "output 'y' has shape .* does not count them"),
        (onnx_models.noisy, "output 'y' depends on which rows run together"),
    ],
)
def test_rows_that_depend_on_their_company_run_alone(tmp_path, make, note):
    path = make(tmp_path / "m.onnx")
    engine = OnnxEngine(path, OnnxSettings())
    assert engine.signature.batched  # as far as the file says
    found = warm_up(engine, BatchingSettings(), 0)
    assert not found.signature.batched
    assert found.signature == engine.signature
    assert found.passed
    assert re.match(note, found.note)
    with pytest.raises(ConfigError, match=f"batching.enabled is true, but {note}"):
        warmed(path, enabled=True)


def test_softmax_over_rows_is_found_out(tmp_path):
    path = onnx_models.one(tmp_path / "m.onnx", "Softmax", Type.FLOAT, ["n", 4], axis=0)
    assert not warmed(path).signature.batched
    path = onnx_models.one(tmp_path / "m.onnx", "Softmax", Type.FLOAT, ["n", 4], axis=1)
    assert warmed(path).signature.batched


def test_batching_can_be_switched_off(tmp_path):
    found = warmed(onnx_models.mlp(tmp_path / "m.onnx"), enabled=False)
    assert not found.signature.batched
    assert found.passed


def test_batching_cannot_be_switched_on_for_a_fixed_shape(tmp_path):
    path = onnx_models.one(tmp_path / "m.onnx", "Neg", Type.FLOAT, [2, 3])
    assert not warmed(path).signature.batched
    with pytest.raises(ConfigError, match=r"input 'x' is float32\[2, 3\]: its first dimension is not free"):
        warmed(path, enabled=True)


def test_the_settings_can_leave_the_proof_to_the_first_runs(tmp_path):
    path = onnx_models.save(
        tmp_path / "m.onnx",
        [("a", Type.FLOAT, ["n", 4]), ("b", Type.FLOAT, ["m", 4])],
        [("y", Type.FLOAT, ["k", 4])],
        [onnx_models.helper.make_node("Add", ["a", "b"], ["y"])],
    )
    assert not warmed(path).signature.batched  # two names, so they may count different things
    found = warmed(path, enabled=True)
    assert found.signature.batched
    assert not found.note


def test_indexes_into_a_table_are_found(tmp_path):
    assert warmed(onnx_models.lookup(tmp_path / "m.onnx")).signature.batched


def test_rows_that_could_not_be_told_apart_run_alone_unless_the_settings_know(tmp_path):
    path = onnx_models.lookup(tmp_path / "m.onnx", least=5)  # 1 is the last row, counted from the end; 0 is none
    found = warmed(path)
    assert not found.signature.batched
    assert found.passed
    assert "no inputs of different rows" in found.note
    trusted = warmed(path, enabled=True)
    assert trusted.signature.batched
    assert "because batching.enabled is true" in trusted.note


def test_a_model_that_takes_nothing_made_up_is_served_as_it_is(tmp_path):
    found = warmed(onnx_models.lookup(tmp_path / "m.onnx", least=1000))
    assert not found.signature.batched
    assert not found.passed
    assert not found.inline
    assert "no inference has passed" in found.note


def test_free_sizes_grow_until_a_run_passes(tmp_path):
    node = onnx_models.helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[7, 7])
    path = onnx_models.save(
        tmp_path / "m.onnx",
        [("x", Type.FLOAT, ["n", 3, "h", "w"])],
        [("y", Type.FLOAT, ["n", 3, "i", "j"])],
        [node],
    )
    found = warmed(path)
    assert found.signature.batched
    assert found.passed


def test_only_short_runs_are_inline(tmp_path):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    assert warmed(path, inline_below_us=100_000).inline
    assert not warmed(path, inline_below_us=0).inline


def test_rows_are_timed_as_callers_bring_them(monkeypatch):
    loaded = []

    def load(slot: HostSlot, requests: Any, rows: int) -> None:
        loaded.append(([len(request[0]) for request in requests], rows))
        plainly(slot, requests, rows)

    plainly = HostSlot.load
    monkeypatch.setattr(HostSlot, "load", load)
    found = warm_up(PuppetEngine(), BatchingSettings(max_rows=2), 0)
    assert {rows for rows, _ in found.samples} == {1, 2}
    assert ([1, 1], 2) in loaded, "one of two rows would be read where it lies, where two of one are brought together"
    assert loaded.count(([2], 2)) == 1, "the proof's"


def test_an_engine_that_always_fails_has_not_passed():
    engine = PuppetEngine()
    engine.fails = 1_000_000
    assert not warm_up(engine, BatchingSettings(), 100).passed
