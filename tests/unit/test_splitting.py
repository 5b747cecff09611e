"""Requests of more rows than a run takes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import onnx_models
from tests.unit.puppets import RecordingMetrics
from tests.unit.test_model import ask, made, null, run
from tests.unit.test_worker import Bench

from forno.server.config import BatchingSettings, ModelSettings
from forno.server.errors import DeadlineExceeded, EngineFailed, InvalidArgument, Overloaded
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.request import Answer, Request
from forno.server.splitting import parts_of


def submit_parts(bench: Bench, rows: int, max_rows: int, **more: Any) -> Request:
    """A request whose elements count up."""
    x = np.arange(rows * 2, dtype=np.int64).reshape(rows, 2)
    finish = more.pop("finish", lambda answer: answer)
    whole = Request((x,), rows, finish, bench.loop.create_future(), bench.clock.now_us, **more)
    for part in parts_of(whole, max_rows, lambda outcome, _queue_us: bench.metrics.refused(outcome))[1]:
        bench.worker.submit_part(part)
    return whole


@given(rows=st.integers(1, 40), max_rows=st.integers(1, 12), threaded=st.booleans())
def test_parts_answer_as_one_run_does(rows, max_rows, threaded):
    with Bench(threaded=threaded, max_rows=max_rows) as bench:
        whole = submit_parts(bench, rows, max_rows)
        bench.close(grace_s=1000)
        answer = whole.future.result()
        np.testing.assert_array_equal(answer.outputs[0], whole.inputs[0] + 1, strict=True)
        assert answer.batch_rows == min(rows, max_rows)
        assert bench.metrics.reasons == {"ok": 1}
        assert not any(queue_us or total_us for queue_us, total_us, *_ in bench.metrics.batches)
        assert all(len(x) <= max_rows for x in bench.engine.runs)


def test_a_place_for_the_answer_is_all_that_is_asked_of_the_caller():
    class Reply:
        """What a transport hands over in place of a future."""

        answer: Answer | None = None

        def done(self) -> bool:
            return self.answer is not None

        def set_result(self, answer: Answer) -> None:
            self.answer = answer

    with Bench(max_rows=2) as bench:
        reply = Reply()
        x = np.zeros((5, 2), np.int64)
        whole = Request((x,), 5, lambda answer: answer, reply, 1)  # type: ignore[arg-type]
        for part in parts_of(whole, 2, lambda _outcome, _queue_us: None)[1]:
            bench.worker.submit(part)
        bench.loop.turn(3)
        assert reply.answer is not None
        assert reply.answer.outputs[0].shape == (5, 2)


def test_times_are_of_the_first_and_of_all():
    with Bench(max_rows=2) as bench:
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 10)
        whole = submit_parts(bench, 5, 2)
        bench.clock.now_us += 40
        bench.loop.turn(3)
        answer = whole.future.result()
        assert (answer.queue_us, answer.compute_us, answer.batch_rows) == (40, 30, 2)


def test_a_cancelled_request_leaves_no_part_that_runs():
    with Bench(threaded=True, run_us=50_000, max_rows=2) as bench:
        whole = submit_parts(bench, 9, 2)
        bench.loop.turn()
        whole.future.cancel()
        bench.close(grace_s=1000)
        assert len(bench.engine.runs) == 1
        assert bench.batcher.pending_rows == 0
        assert bench.metrics.reasons == {"cancelled": 1}


def test_a_failed_part_fails_all_and_ends_the_others(caplog):
    with Bench(threaded=True, run_us=50_000, max_rows=2) as bench, caplog.at_level(logging.CRITICAL, "forno.model"):
        bench.engine.fails = 1
        whole = submit_parts(bench, 9, 2)
        bench.loop.turn()
        bench.finish_run()
        assert isinstance(whole.future.exception(), EngineFailed)
        bench.close(grace_s=1000)
        assert len(bench.engine.runs) <= 2
        assert bench.metrics.reasons == {"failed": 1}


def test_parts_expire_as_one():
    with Bench(threaded=True, run_us=50_000, max_rows=2) as bench:
        whole = submit_parts(bench, 9, 2, expires_us=bench.clock.now_us + 500)
        bench.loop.turn()
        bench.clock.now_us += 2_000
        bench.loop.turn()
        assert isinstance(whole.future.exception(), DeadlineExceeded)
        bench.finish_run()
        assert bench.metrics.reasons == {"expired": 1}


def test_an_encoder_that_fails_fails_the_request(caplog):
    def fail(_answer: Answer) -> None:
        raise RuntimeError("secret")

    with Bench(max_rows=2) as bench, caplog.at_level(logging.CRITICAL, "forno.model"):
        whole = submit_parts(bench, 3, 2, finish=fail)
        bench.loop.turn(2)
        assert isinstance(whole.future.exception(), EngineFailed)


def test_outputs_of_other_shapes_fail_the_request(caplog):
    with Bench(max_rows=2) as bench, caplog.at_level(logging.CRITICAL, "forno.model"):
        bench.engine.run = lambda slot, rows: [slot.inputs[0][:, :rows]]  # type: ignore[method-assign]
        whole = submit_parts(bench, 3, 2)
        bench.loop.turn(3)
        assert isinstance(whole.future.exception(), EngineFailed)


@pytest.mark.parametrize("inline_below_us", [0, 100_000])
@pytest.mark.parametrize("rows", [33, 64, 100])
def test_a_model_takes_more_rows_than_one_run(tmp_path, rows, inline_below_us):
    path = onnx_models.mlp(tmp_path / "m.onnx")

    async def ask_some() -> None:
        model = made(path, inline_below_us=inline_below_us)
        await model.load()
        x = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
        parts = await asyncio.gather(*[ask(model, x=x[start : start + 10]) for start in range(0, rows, 10)])
        (y,) = await ask(model, x=x)
        np.testing.assert_allclose(y, np.concatenate([part[0] for part in parts]), rtol=1e-5, atol=1e-6)
        await model.close(1)

    run(ask_some())


def test_more_rows_than_may_wait_are_refused():
    async def ask_some() -> None:
        metrics = RecordingMetrics()
        model = null(batching=BatchingSettings(max_rows=4, max_pending_rows=10, max_delay_us=10_000))
        model._metrics = metrics  # type: ignore[assignment]
        await model.load()
        with pytest.raises(InvalidArgument, match=r"11 rows, but at most batching\.max_pending_rows = 10 may wait"):
            ask(model, x=np.ones((11, 2), np.float32))
        first = ask(model, x=np.ones((3, 2), np.float32))
        with pytest.raises(Overloaded, match="max_pending_rows = 10"):
            ask(model, x=np.ones((9, 2), np.float32))
        second = ask(model, x=np.full((6, 2), 2, np.float32))
        assert (await first)[0].shape == (3, 2)
        assert np.all((await second)[0] == 2)
        await model.close(1)

    run(ask_some())


def test_a_request_in_parts_counts_once():
    async def ask_some() -> None:
        store = Metrics()
        model = Model("m", "1", None, ModelSettings(engine="null", batching=BatchingSettings(max_rows=4)),
                      store.model("m", "1"))  # fmt: skip
        await model.load()
        await asyncio.gather(ask(model, x=np.ones((11, 2), np.float32)), ask(model, x=np.ones((1, 2), np.float32)))
        text = store.prometheus().decode()
        labels = 'model="m",version="1"'
        assert f'forno_requests_total{{{labels},outcome="ok"}} 2\n' in text
        assert f"forno_request_seconds_count{{{labels}}} 2\n" in text
        assert f"forno_request_queue_seconds_count{{{labels}}} 2\n" in text
        await model.close(1)

    run(ask_some())
