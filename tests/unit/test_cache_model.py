"""Models with a response cache, from their settings to their end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto as Type
from onnx import helper
from tests.unit import onnx_models

from forno.server.cache import CachedModel
from forno.server.config import CacheSettings, Config, ModelSettings, NullSettings, ServerSettings
from forno.server.errors import ConfigError, NotReady
from forno.server.metrics import Metrics, ModelMetrics
from forno.server.model import Model, ModelState
from forno.server.repository import ModelSpec
from forno.server.request import Request
from forno.server.server import Server
from forno.server.settings import load

if TYPE_CHECKING:
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

KEPT = CacheSettings(max_bytes=1 << 20)


def made(path: Path | None, **settings: Any) -> CachedModel:
    return CachedModel("m", "3", path, ModelSettings(cache=KEPT, **settings), ModelMetrics("m", "3"))


def ask(model: Model, **inputs: Array) -> asyncio.Future[list[Array]]:
    """As a servicer does it."""
    arrays = model.signature.arrange(inputs)
    rows = model.signature.validate(arrays)
    future: asyncio.Future[list[Array]] = asyncio.get_running_loop().create_future()
    model.submit(Request(arrays, rows, lambda answer: [np.array(each) for each in answer.outputs], future))
    return future


@pytest.mark.parametrize("inline_below_us", [0, 100_000])
async def test_a_cached_model_lives(tmp_path, inline_below_us):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    model = made(path, inline_below_us=inline_below_us)
    plain = Model("m", "3", path, ModelSettings(), ModelMetrics("m", "3"))
    with pytest.raises(NotReady, match="is loading"):
        model.submit(None)  # type: ignore[arg-type]
    await asyncio.gather(model.load(), plain.load())
    xs = np.random.default_rng(0).standard_normal((20, 1, 8)).astype(np.float32)
    wanted = await asyncio.gather(*[ask(plain, x=x) for x in xs])
    for _ in range(3):
        found = await asyncio.gather(*[ask(model, x=x.copy()) for x in xs for _ in range(2)])
        for index, (y,) in enumerate(found):
            np.testing.assert_allclose(y, wanted[index // 2][0], rtol=1e-5, atol=1e-6)
    assert model._metrics.cache == {"hit": 80, "miss": 20, "joined": 20}
    assert len(model.cache) == 20
    await model.close(1)
    assert (model.state, len(model.cache), model.cache.kept_bytes) == (ModelState.UNLOADED, 0, 0)
    with pytest.raises(NotReady, match="is unloaded"):
        ask(model, x=xs[0])
    await plain.close(1)


@pytest.mark.parametrize(
    ("type_", "dtype", "dims"),
    [
        (Type.FLOAT16, "f2", ["n", 3]),
        (Type.BFLOAT16, ml_dtypes.bfloat16, ["n", 3]),
        (Type.STRING, "O", ["n", "m"]),
        (Type.INT64, "i8", [3, 3]),
        (Type.FLOAT, "f4", []),
    ],
)
async def test_every_kind_of_answer_is_kept(tmp_path, type_, dtype, dims):
    model = made(onnx_models.one(tmp_path / "m.onnx", "Identity", type_, dims))
    await model.load()
    shape = tuple(1 if dim == "n" else 3 for dim in dims)
    xs = [np.full(shape, str(number) if dtype == "O" else number).astype(dtype) for number in range(5)]
    for _ in range(2):
        for x in xs:
            np.testing.assert_array_equal((await ask(model, x=x.copy()))[0], x, strict=True)
    assert model._metrics.cache == {"hit": 5, "miss": 5, "joined": 0}
    await model.close(1)


async def test_callers_that_all_leave_take_their_run_with_them():
    settings = NullSettings(shape=(-1, 2), delay_us=20_000)
    model = made(None, engine="null", null=settings)
    await model.load()
    first = ask(model, x=np.zeros((1, 2), "f4"))
    await asyncio.sleep(0.005)  # it runs
    gone = [ask(model, x=np.ones((1, 2), "f4")) for _ in range(5)]
    stays = [ask(model, x=np.full((1, 2), 2, "f4")) for _ in range(5)]
    for future in [*gone, *stays[:4]]:
        future.cancel()
    assert (await stays[4])[0].tolist() == [[2, 2]]
    await first
    assert model._metrics.outcomes["ok"] == 2
    assert model._metrics.outcomes["cancelled"] == 1, "five callers, one run"
    assert all(flight.done() for flight in model.cache._flights.values())
    await model.close(1)


async def test_those_who_share_a_run_are_told_when_the_model_stops():
    model = made(None, engine="null", null=NullSettings(shape=(-1, 2), delay_us=200_000))
    await model.load()
    waiting = [ask(model, x=np.zeros((1, 2), "f4")) for _ in range(3)]
    await asyncio.sleep(0)
    await model.close(0)
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, NotReady)


async def test_a_model_that_draws_random_numbers_cannot_be_cached(tmp_path):
    model = made(onnx_models.noisy(tmp_path / "m.onnx"))
    expected = r"cache\.max_bytes is 1048576, but output 'y' differs when the same input runs"
    with pytest.raises(ConfigError, match=expected):
        await model.load()
    assert model.state is ModelState.FAILED


async def test_a_draw_from_a_few_values_is_found_out(tmp_path):
    nodes = [
        helper.make_node("RandomUniformLike", ["x"], ["r"]),
        helper.make_node("Round", ["r"], ["y"]),
    ]
    path = onnx_models.save(tmp_path / "m.onnx", [("x", Type.FLOAT, [1])], [("y", Type.FLOAT, [1])], nodes)
    with pytest.raises(ConfigError, match="not deterministic"):
        await made(path).load()


async def test_a_model_that_takes_nothing_made_up_is_cached_as_asked(tmp_path):
    model = made(onnx_models.lookup(tmp_path / "m.onnx", least=1000))
    await model.load()
    x = np.array([1002])
    assert (await ask(model, x=x))[0].tolist() == (await ask(model, x=x))[0].tolist() == [[4, 5]]
    assert model._metrics.cache["hit"] == 1
    await model.close(1)


def test_a_model_declared_not_deterministic_is_not_cached(tmp_path):
    file = tmp_path / "forno.yaml"
    file.write_text("models:\n  dice:\n    engine: 'null'\n    deterministic: false\n    cache: {max_bytes: 4096}\n")
    with pytest.raises(ConfigError, match=r"cache.max_bytes` is 4096, but `deterministic` is false"):
        load(file)
    file.write_text("models:\n  dice:\n    engine: 'null'\n    deterministic: false\n")
    assert not load(file).models["dice"].deterministic


def test_only_models_that_say_so_are_cached():
    specs = [
        ModelSpec(name, "1", None, ModelSettings(engine="null", cache=cache))
        for name, cache in [("plain", CacheSettings(ttl_s=1)), ("kept", KEPT)]
    ]
    server = Server(Config(server=ServerSettings()), specs, "127.0.0.1:0", rest=False, show=None)
    assert type(server.registry.find("plain")) is Model
    assert type(server.registry.find("kept")) is CachedModel
    gauges = {(name, labels["model"]) for name, labels, _ in server._gauges() if "cache" in name}
    assert gauges == {("forno_cache_bytes", "kept"), ("forno_cache_entries", "kept")}


def test_counts_go_on_when_a_version_is_loaded_again():
    metrics = Metrics()
    settings = ModelSettings(engine="null", cache=KEPT)
    CachedModel("m", "1", None, settings, metrics.model("m", "1"))
    metrics.model("m", "1").cache["hit"] += 3
    CachedModel("m", "1", None, settings, metrics.model("m", "1"))
    metrics.model("other", "1")
    lines = [line for line in metrics.prometheus().decode().splitlines() if line.startswith("forno_cache")]
    assert lines == [
        f'forno_cache_requests_total{{model="m",version="1",result="{result}"}} {count}'
        for result, count in (("hit", 3), ("miss", 0), ("joined", 0))
    ]
