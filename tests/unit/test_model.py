"""A model from its file to its end."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto as Type
from tests.unit import onnx_models
from tests.unit.puppets import RecordingMetrics
from tests.unit.test_engines import plain

from forno.server.config import BatchingSettings, ModelSettings, NullSettings
from forno.server.errors import ConfigError, EngineFailed, InvalidArgument, NotReady
from forno.server.model import Model, ModelState
from forno.server.request import Request

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]


def made(path: Path | None, metrics: RecordingMetrics | None = None, **settings: Any) -> Model:
    return Model("m", "3", path, ModelSettings(**settings), metrics or RecordingMetrics())


def null(**settings: Any) -> Model:
    return made(None, engine="null", null=NullSettings(shape=(-1, 2)), **settings)


def ask(model: Model, **inputs: Array) -> asyncio.Future[list[Array]]:
    """As a servicer does it."""
    arrays = model.signature.arrange(inputs)
    rows = model.signature.validate(arrays)
    future: asyncio.Future[list[Array]] = asyncio.get_running_loop().create_future()
    model.submit(Request(arrays, rows, lambda answer: [np.array(each) for each in answer.outputs], future))
    return future


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@pytest.mark.parametrize("inline_below_us", [0, 100_000])
def test_a_model_lives(tmp_path, inline_below_us):
    path = onnx_models.mlp(tmp_path / "m.onnx")

    async def live() -> None:
        metrics = RecordingMetrics()
        model = made(path, metrics, inline_below_us=inline_below_us)
        assert model.state is ModelState.LOADING
        with pytest.raises(NotReady, match=r"'m' version '3' is loading"):
            model.submit(None)  # type: ignore[arg-type]
        await model.load()
        assert (model.state, model.engine_name, model.max_rows) == (ModelState.READY, "onnx", 32)
        assert model.statistics().inline == bool(inline_below_us)
        x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
        answers = await asyncio.gather(*[ask(model, x=row[None]) for row in x])
        np.testing.assert_allclose(
            np.concatenate([each[0] for each in answers]), plain(path, x)[0], rtol=1e-5, atol=1e-5
        )
        assert sum(batch[2] for batch in metrics.batches) == 40
        assert max(batch[2] for batch in metrics.batches) == 32
        await model.close(1)
        assert model.state is ModelState.UNLOADED
        with pytest.raises(NotReady, match="is unloaded"):
            ask(model, x=x[:1])
        await model.close(1)

    run(live())
    for thread in threading.enumerate():
        if thread.name.startswith("forno"):  # told to end, and about to
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("type_", "dtype", "dims"),
    [
        (Type.FLOAT, "f4", ["n", 3]),
        (Type.FLOAT16, "f2", ["n", 3]),
        (Type.BFLOAT16, ml_dtypes.bfloat16, ["n", 3]),
        (Type.BFLOAT16, ml_dtypes.bfloat16, ["n", "m"]),
        (Type.STRING, "O", ["n", "m"]),
        (Type.INT64, "i8", [3, 3]),
        (Type.FLOAT, "f4", []),
    ],
)
def test_every_kind_of_model_answers_as_it_should(tmp_path, type_, dtype, dims):
    path = onnx_models.one(tmp_path / "m.onnx", "Identity", type_, dims)

    async def ask_some() -> None:
        model = made(path)
        await model.load()
        assert model.signature.batched == ("n" in dims)
        shape = tuple(1 if dim == "n" else 3 for dim in dims)
        xs = [np.full(shape, number).astype(dtype) for number in range(5)]
        if dtype == "O":
            xs = [np.full(shape, str(number), object) for number in range(5)]
        answers = await asyncio.gather(*[ask(model, x=x) for x in xs])
        for x, (y,) in zip(xs, answers, strict=True):
            np.testing.assert_array_equal(x, y, strict=True)
        await model.close(1)

    run(ask_some())


def test_several_inputs_and_outputs_keep_their_order(tmp_path):
    path = onnx_models.two_in_two_out(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model = made(path)
        await model.load()
        assert model.signature.batched
        a, b = np.full((3, 4), 5, np.float32), np.full((3, 1), 2, np.float32)
        answers = await asyncio.gather(*[ask(model, b=b * factor, a=a) for factor in (1, 2)])
        for factor, (added, product) in zip((1, 2), answers, strict=True):
            assert np.all(added == 5 + 2 * factor)
            assert np.all(product == 10 * factor)
        await model.close(1)

    run(ask_some())


def test_open_shapes_batch_with_their_like(tmp_path):
    path = onnx_models.one(tmp_path / "m.onnx", "Neg", Type.FLOAT, ["n", "m"])

    async def ask_some() -> None:
        metrics = RecordingMetrics()
        model = made(path, metrics)
        await model.load()
        xs = [np.full((1, 1 + number % 3), number, np.float32) for number in range(9)]
        answers = await asyncio.gather(*[ask(model, x=x) for x in xs])
        for x, (y,) in zip(xs, answers, strict=True):
            np.testing.assert_array_equal(-x, y, strict=True)
        assert [batch[2] for batch in metrics.batches] == [3, 3, 3]
        await model.close(1)

    run(ask_some())


def test_strings_are_text(tmp_path):
    path = onnx_models.one(tmp_path / "m.onnx", "Identity", Type.STRING, ["n"])

    async def ask_some() -> None:
        model = made(path)
        await model.load()
        (y,) = await ask(model, x=np.array([b"bytes", "text", "caffè \0 latte"], object))
        assert y.tolist() == ["bytes", "text", "caffè \0 latte"]
        for wrong in (b"\xff", "\udcff"):
            with pytest.raises(InvalidArgument, match="input 'x': element 1 is not UTF-8 text"):
                ask(model, x=np.array(["fine", wrong], object))
        await model.close(1)

    run(ask_some())


def test_rows_that_depend_on_their_company_are_served_alone(tmp_path, caplog):
    path = onnx_models.centered(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model = made(path)
        with caplog.at_level(logging.INFO, "forno.model"):
            await model.load()
        assert (model.signature.batched, model.max_rows) == (False, 1)
        assert "depends on which rows run together" in caplog.text
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        answers = await asyncio.gather(ask(model, x=x), ask(model, x=x[:1]))
        np.testing.assert_array_equal(answers[0][0], [[-2] * 4, [2] * 4])
        np.testing.assert_array_equal(answers[1][0], [[0] * 4])
        await model.close(1)

    run(ask_some())


def test_a_model_that_no_made_up_input_fits_is_ready_and_says_so(tmp_path, caplog):
    path = onnx_models.lookup(tmp_path / "m.onnx", least=1000)

    async def ask_some() -> None:
        model = made(path)
        await model.load()
        assert model.state is ModelState.READY
        assert "no inference has passed" in caplog.text
        (y,) = await ask(model, x=np.array([1001]))
        np.testing.assert_array_equal(y, [[2, 3]])
        with caplog.at_level(logging.CRITICAL, "forno.model"), pytest.raises(EngineFailed):
            await ask(model, x=np.array([5]))
        (y,) = await ask(model, x=np.array([1000]))
        np.testing.assert_array_equal(y, [[0, 1]])
        await model.close(1)

    run(ask_some())


def test_a_model_that_cannot_be_loaded_has_failed(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"none")

    async def load() -> None:
        model = made(path)
        with pytest.raises(ConfigError, match="is not a readable ONNX model"):
            await model.load()
        assert model.state is ModelState.FAILED
        with pytest.raises(NotReady, match=r"is failed.*is not a readable ONNX model"):
            ask(model)
        await model.close(1)
        assert model.state is ModelState.UNLOADED

    run(load())


def test_wrong_settings_name_the_model(tmp_path):
    path = onnx_models.centered(tmp_path / "m.onnx")

    async def load() -> None:
        model = made(path, batching=BatchingSettings(enabled=True))
        with pytest.raises(ConfigError, match=r"^model 'm': batching\.enabled is true, but"):
            await model.load()

    run(load())


def test_a_model_can_be_stopped_while_it_is_loading(tmp_path):
    path = onnx_models.mlp(tmp_path / "m.onnx")

    async def load() -> None:
        model = made(path)
        loading = asyncio.ensure_future(model.load())
        await asyncio.sleep(0)
        await model.close(1)
        assert model.state is ModelState.UNLOADED
        with pytest.raises(NotReady, match="stopped while it was loading"):
            await loading

    run(load())


def test_a_draining_model_takes_nothing_new_and_finishes_what_it_has():
    async def drain() -> None:
        model = null(inline_below_us=0, batching=BatchingSettings(max_delay_us=10_000_000))
        await model.load()
        x = np.ones((1, 2), np.float32)
        waiting = ask(model, x=x)
        closing = [asyncio.ensure_future(model.close(30)) for _ in range(2)]
        await asyncio.sleep(0)
        assert model.state is ModelState.DRAINING
        with pytest.raises(NotReady, match="is draining"):
            ask(model, x=x)
        await asyncio.gather(*closing)
        np.testing.assert_array_equal((await waiting)[0], x)

    run(drain())


def test_statistics_tell_what_waits():
    async def look() -> None:
        model = null(batching=BatchingSettings(max_delay_us=10_000_000))
        assert model.statistics().pending_rows == 0
        await model.load()
        for _ in range(2):
            ask(model, x=np.ones((3, 2), np.float32))
        found = model.statistics()
        assert (found.pending_requests, found.pending_rows, found.running_rows) == (2, 6, 0)
        await model.close(1)

    run(look())
