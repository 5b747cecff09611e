"""Rows of different shapes that run together, by models that are proven to allow it and by models that are not."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from onnx import TensorProto as Type
from tests.unit import onnx_models
from tests.unit.puppets import RecordingMetrics
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made, run

from forno.server.config import BatchingSettings, NullSettings
from forno.server.errors import ConfigError, InvalidArgument
from forno.server.metrics import Metrics
from forno.server.model import Model

if TYPE_CHECKING:
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]


async def loaded(path: Path | None, **settings: Any) -> tuple[Model, RecordingMetrics]:
    metrics = RecordingMetrics()
    model = made(path, metrics, **settings)
    await model.load()
    return model, metrics


def sentence(length: int, rows: int = 1, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed + length)
    return {"tokens": random.integers(0, 10, (rows, length)), "mask": np.ones((rows, length), np.int64)}


async def ask_all(model: Model, asked: list[dict[str, Array]]) -> list[list[Array]]:
    return list(await asyncio.gather(*[ask(model, **each) for each in asked]))


@example_settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=20),
    padding=st.fixed_dictionaries(
        {
            "enabled": st.sampled_from(["auto", True]),
            "exact": st.booleans(),
            "sizes": st.sampled_from([(), (16, 48)]),
            "allowed_rows": st.sampled_from([(), (1, 2, 4)]),
        }
    ),
)
def test_a_model_that_respects_its_mask_answers_as_alone(tmp_path_factory, shapes, padding):
    path = onnx_models.masked(tmp_path_factory.mktemp("models") / "m.onnx")

    async def ask_some() -> None:
        model, metrics = await loaded(path, padding=padding, batching=BatchingSettings(max_rows=4))
        assert model.signature.padding is not None
        assert model.signature.padding.names == ("length",)
        asked = [sentence(length, rows, seed) for seed, (length, rows) in enumerate(shapes)]
        for each, answer in zip(asked, await ask_all(model, asked), strict=True):
            for one, other in zip(answer, plain(path, each["tokens"], each["mask"]), strict=True):
                assert one.shape == other.shape
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        await model.close(1)
        own = sum(array.size for each in asked for array in each.values())
        assert metrics.elements - metrics.padded_elements == own

    run(ask_some())


def test_different_lengths_run_together_only_where_it_is_asked_for(tmp_path):
    path = onnx_models.masked(tmp_path / "m.onnx")

    async def ask_some() -> None:
        for padding, batches in ((False, [1, 1, 1, 1]), ("auto", [3, 1])):
            model, metrics = await loaded(path, padding=padding)
            await ask_all(model, [sentence(length) for length in (5, 7, 8, 20)])
            assert [batch[2] for batch in metrics.batches] == batches
            assert model.statistics().padded_elements == metrics.padded_elements == (0 if padding is False else 8)
            await model.close(1)

    run(ask_some())


def models_that_look_at_padding(folder: Path) -> dict[str, Path]:
    x, y = [("x", Type.FLOAT, ["n", "k"])], [("y", Type.FLOAT, ["n", 1])]
    node, one = onnx_models.helper.make_node, {"one": np.array([1])}
    minus = {"from": np.array([-1]), "to": np.array([1 << 40]), "one": np.array([1])}
    softmax = onnx_models.one(folder / "softmax.onnx", "Softmax", Type.FLOAT, ["n", "k"])
    return {
        "mean of all": onnx_models.masked(folder / "mean.onnx", pooled_over="everything"),
        "softmax": softmax,
        "largest": onnx_models.save(folder / "max.onnx", x, y, [node("ReduceMax", ["x", "one"], ["y"])], one),
        "last": onnx_models.save(folder / "last.onnx", x, y, [node("Slice", ["x", "from", "to", "one"], ["y"])], minus),
        "flipped": onnx_models.save(
            folder / "flip.onnx",
            x,
            [("y", Type.FLOAT, ["n", "k"])],
            [node("Slice", ["x", "from", "to", "one", "from"], ["y"])],
            {"from": np.array([-1]), "to": np.array([-(1 << 40)]), "one": np.array([1])},
        ),
        "unnamed": onnx_models.save(
            folder / "unnamed.onnx", x, [("y", Type.FLOAT, ["n", "other"])], [node("Neg", ["x"], ["y"])]
        ),
        "coarse": onnx_models.save(
            folder / "coarse.onnx",
            x,
            [("y", Type.INT64, ["n", 1])],
            [node("ArgMax", ["x"], ["y"], axis=1)],
        ),
    }


@pytest.mark.parametrize("name", ["mean of all", "softmax", "largest", "last", "flipped", "unnamed", "coarse"])
def test_nothing_is_padded_without_proof(tmp_path, name, caplog):
    path = models_that_look_at_padding(tmp_path)[name]

    async def ask_some() -> None:
        with caplog.at_level(logging.INFO, "forno.model"):
            model, metrics = await loaded(path, padding="auto")
        assert "not padded" in model.note
        assert "not padded" in caplog.text
        first = model.signature.inputs[0]
        asked = [
            {spec.name: np.arange(length).reshape(1, -1).astype(first.dtype) for spec in model.signature.inputs}
            for length in (5, 6, 7)
        ]
        for each, answer in zip(asked, await ask_all(model, asked), strict=True):
            for one, other in zip(answer, plain(path, *each.values()), strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
        assert [batch[2] for batch in metrics.batches] == [1, 1, 1]
        await model.close(1)

    run(ask_some())


def test_what_people_say_wins_over_proof_and_is_noted(tmp_path):
    path = models_that_look_at_padding(tmp_path)["largest"]

    async def ask_some() -> None:
        model, metrics = await loaded(path, padding={"enabled": True, "values": {"x": -1e30}})
        assert not model.note  # padded with less than anything, its answers are the same
        xs = [np.full((1, length), -length, np.float32) for length in (5, 6, 7)]
        answers = await ask_all(model, [{"x": x} for x in xs])
        assert [answer[0].item() for answer in answers] == [-5, -6, -7]
        assert [batch[2] for batch in metrics.batches] == [3]
        await model.close(1)
        model, _ = await loaded(path, padding=True)
        assert "padding is on because padding.enabled is true, but it may change answers: 'k': output 'y'" in model.note
        await model.close(1)

    run(ask_some())


@pytest.mark.parametrize(
    ("operator", "type_", "dtype"),
    [
        ("Identity", Type.STRING, "O"),
        ("Neg", Type.FLOAT16, "f2"),
        ("Identity", Type.BOOL, "?"),
        ("Neg", Type.INT32, "i4"),
    ],
)
def test_every_kind_of_element_is_padded_and_cut_back(tmp_path, operator, type_, dtype):
    path = onnx_models.one(tmp_path / "m.onnx", operator, type_, ["n", "a", 2, "b"])

    async def ask_some() -> None:
        model, metrics = await loaded(path, padding="auto")
        assert model.signature.padding is not None
        assert model.signature.padding.names == ("a", "b")
        xs = [
            np.asarray(np.arange(a * 2 * b).reshape(1, a, 2, b) % 2).astype(dtype) for a, b in ((3, 1), (1, 4), (2, 2))
        ]
        if dtype == "O":
            xs = [np.asarray(x.astype(str)).astype(object) for x in xs]
        for x, (y,) in zip(xs, await ask_all(model, [{"x": x} for x in xs]), strict=True):
            np.testing.assert_array_equal(y, -x if operator == "Neg" else x, strict=True)
        assert [batch[2] for batch in metrics.batches] == [3]
        await model.close(1)

    run(ask_some())


def test_one_dimension_can_be_padded_where_another_cannot(tmp_path):
    path = onnx_models.save(
        tmp_path / "m.onnx",
        [("x", Type.FLOAT, ["n", "a", "b"])],
        [("y", Type.FLOAT, ["n", "a", 1])],
        [onnx_models.helper.make_node("ReduceMean", ["x", "axis"], ["y"])],
        {"axis": np.array([2])},
    )

    async def ask_some() -> None:
        model, _ = await loaded(path, padding="auto")
        assert model.signature.padding is not None
        assert model.signature.padding.names == ("a",)
        assert "'b': output 'y' is another one with padding" in model.note
        await model.close(1)

    run(ask_some())


def test_sizes_that_should_be_equal_are_compared_before_padding_hides_it(tmp_path):
    path = onnx_models.masked(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model, _ = await loaded(path, padding="auto")
        with pytest.raises(InvalidArgument, match="'length'"):
            ask(model, tokens=np.ones((1, 5), np.int64), mask=np.ones((1, 7), np.int64))
        await model.close(1)

    run(ask_some())


def test_parts_of_a_large_request_are_padded_too(tmp_path):
    path = onnx_models.masked(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model, metrics = await loaded(path, padding="auto", batching=BatchingSettings(max_rows=4))
        asked = [sentence(5, 6), sentence(7, 1), sentence(6, 9)]
        for each, answer in zip(asked, await ask_all(model, asked), strict=True):
            for one, other in zip(answer, plain(path, each["tokens"], each["mask"]), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert metrics.padded_elements
        await model.close(1)

    run(ask_some())


@pytest.mark.parametrize("bound", [True, False])
def test_only_allowed_counts_of_rows_run(tmp_path, bound):
    dims = ["n", 3] if bound else ["n", "m"]
    path = onnx_models.one(tmp_path / "m.onnx", "Neg", Type.FLOAT, dims)

    async def ask_some() -> None:
        model, metrics = await loaded(path, padding={"allowed_rows": [2, 4, 8]}, batching=BatchingSettings(max_rows=7))
        assert model.max_rows == 4
        seen = []
        for rows in (1, 2, 3, 4, 3):
            asked = [{"x": np.full((1, 3), row, np.float32)} for row in range(rows)]
            before = metrics.elements
            for each, (y,) in zip(asked, await ask_all(model, asked), strict=True):
                np.testing.assert_array_equal(y, -each["x"])
            seen.append((metrics.elements - before) // 3)
        assert seen == [2, 2, 4, 4, 4]
        assert metrics.padded_elements == 3 * 3
        await model.close(1)

    run(ask_some())


def test_the_null_engine_pads_too():
    async def ask_some() -> None:
        settings = {"engine": "null", "null": NullSettings(shape=(-1, -1)), "padding": {"enabled": "auto"}}
        model, metrics = await loaded(None, **settings)
        xs = [np.full((1, length), length, np.float32) for length in (3, 5)]
        for x, (y,) in zip(xs, await ask_all(model, [{"x": x} for x in xs]), strict=True):
            np.testing.assert_array_equal(x, y, strict=True)
        assert [batch[2] for batch in metrics.batches] == [2]
        await model.close(1)

    run(ask_some())


def test_settings_that_do_not_fit_end_the_loading(tmp_path):
    path = onnx_models.masked(tmp_path / "m.onnx")

    async def load() -> None:
        with pytest.raises(ConfigError, match=r"^model 'm': padding\.axes has 'x'"):
            await loaded(path, padding={"enabled": True, "axes": {"x": [1]}})
        with pytest.raises(ConfigError, match=r"^model 'm': padding\.allowed_rows begins with 64"):
            await loaded(path, padding={"allowed_rows": [64]})

    run(load())


def test_waste_is_a_metric():
    metrics = Metrics()
    metrics.model("m", "1").padding(10, 3)
    metrics.model("without", "1")
    text = metrics.prometheus().decode()
    assert 'forno_elements_total{model="m",version="1"} 10\n' in text
    assert 'forno_padded_elements_total{model="m",version="1"} 3\n' in text
    assert 'elements_total{model="without"' not in text


def test_many_shapes_are_not_remembered_forever(tmp_path, monkeypatch):
    monkeypatch.setattr("forno.server.model._MOST_FITS", 3)
    path = onnx_models.masked(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model, _ = await loaded(path, padding="auto")
        await ask_all(model, [sentence(length) for length in range(1, 12)])
        assert len(model._fits) <= 3
        await model.close(1)

    run(ask_some())


def test_the_shapes_that_passed_are_known(tmp_path):
    async def look() -> None:
        model, _ = await loaded(onnx_models.masked(tmp_path / "m.onnx"))
        assert model.example_shapes == ((1, 1), (1, 1))
        await model.close(1)

    run(look())
