"""The door between event loop and engine, cranked by hand."""

from __future__ import annotations

import asyncio
import logging
import re
import threading

import numpy as np
import pytest
from tests.unit.puppets import PATIENCE_S, request
from tests.unit.workbench import Bench, rows_of

from forno.server.errors import DeadlineExceeded, EngineFailed, FornoError, InvalidArgument, NotReady
from forno.server.request import Batch


def test_requests_of_one_pass_run_together_on_the_loop():
    with Bench() as bench:
        waiting = [bench.submit(number, rows=1 + number % 2) for number in range(6)]
        bench.loop.turn()
        assert [each.future.result() for each in waiting] == [rows_of(number, 1 + number % 2) for number in range(6)]
        assert len(bench.engine.runs) == 1
        assert bench.engine.threads == {threading.get_ident()}
        assert bench.worker.inline


def test_the_answer_tells_its_times_and_company():
    with Bench() as bench:
        seen = []
        for _ in range(3):
            bench.submit(finish=seen.append)
        bench.clock.now_us += 40
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 7)
        bench.loop.turn()
        assert [(each.queue_us, each.compute_us, each.batch_rows) for each in seen] == [(40, 7, 3)] * 3
        assert bench.metrics.batches == [([40] * 3, [47] * 3, 3, 7, False)]


def test_the_arrival_is_noted_where_the_caller_did_not():
    with Bench() as bench:
        made = bench.submit(arrived_us=0)
        assert made.arrived_us == bench.clock.now_us
        bench.loop.turn()


def test_one_pass_of_the_loop_makes_few_runs():
    with Bench(max_rows=1) as bench:
        waiting = [bench.submit(number) for number in range(5)]
        done = []
        while not all(each.future.done() for each in waiting):
            bench.loop.turn()
            done.append(len(bench.engine.runs))
        assert done == [2, 4, 5]


def test_a_model_whose_runs_grow_long_gets_a_thread():
    with Bench(inline_below_us=100) as bench:
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 401)
        for number in range(8):
            assert bench.worker.inline
            bench.submit(number)
            bench.loop.turn()
        assert not bench.worker.inline
        made = bench.submit(99)
        bench.loop.turn()
        bench.loop.turn_when_posted()
        assert made.future.result() == rows_of(99)
        assert len(bench.engine.threads) == 2


def test_a_few_long_runs_do_not_move_a_model():
    with Bench(inline_below_us=100) as bench:
        for number in range(30):
            step_us = 0 if number % 7 == 0 else 1000
            bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + step_us)  # noqa: B023
            bench.submit(number)
            bench.loop.turn()
        assert bench.worker.inline


def test_runs_happen_on_the_thread_of_the_engine():
    with Bench(threaded=True) as bench:
        made = bench.submit(4, rows=3)
        bench.loop.turn()
        assert bench.worker.running_rows == 3
        bench.finish_run()
        assert made.future.result() == rows_of(4, 3)
        assert threading.get_ident() not in bench.engine.threads


def test_behind_a_short_run_one_batch_waits_at_the_door():
    with Bench(threaded=True, max_rows=1, run_us=100) as bench:
        for number in range(4):
            bench.submit(number)
        bench.loop.turn()
        assert (bench.worker.running_rows, bench.batcher.pending_rows) == (2, 2)


def test_behind_a_long_run_requests_group_until_the_engine_is_free():
    with Bench(threaded=True, run_us=50_000) as bench:
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 50_000)
        bench.submit(1)
        bench.loop.turn()
        waiting = [bench.submit(number) for number in (2, 3)]
        bench.loop.turn()
        waiting.append(bench.submit(4))
        bench.loop.turn()
        assert (bench.worker.running_rows, bench.batcher.pending_rows) == (1, 3)
        bench.finish_run()
        assert (bench.worker.running_rows, bench.batcher.pending_rows) == (3, 0)
        bench.finish_run()
        assert [each.future.result() for each in waiting] == [rows_of(2), rows_of(3), rows_of(4)]


def test_the_engine_gets_its_next_batch_before_answers_are_encoded():
    with Bench(threaded=True, run_us=50_000, max_rows=1) as bench:
        running_when_encoded = []
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 50_000)
        bench.submit(1, finish=lambda _answer: running_when_encoded.append(bench.worker.running_rows))
        bench.submit(2)
        bench.loop.turn()
        bench.finish_run()
        assert running_when_encoded == [1]


def test_each_instance_runs_a_batch_at_once_and_the_last_closes_the_engine():
    with Bench(threaded=True, instances=3, run_us=50_000, max_rows=1) as bench:
        bench.engine.after = lambda: setattr(bench.clock, "now_us", bench.clock.now_us + 50_000)
        waiting = [bench.submit(number) for number in range(5)]
        bench.loop.turn()
        assert (bench.worker.running_rows, bench.batcher.pending_rows) == (3, 2)
        bench.finish_run()
        assert (bench.worker.running_rows, bench.batcher.pending_rows) == (3, 1)
        bench.close(grace_s=1000)
        assert [each.future.result() for each in waiting] == [rows_of(number) for number in range(5)]
        assert bench.engine.closed == 1
        assert 1 <= len(bench.engine.threads) <= 3


def test_requests_expire_behind_a_long_run():
    with Bench(threaded=True, run_us=50_000) as bench:
        bench.submit(1)
        bench.loop.turn()
        made = bench.submit(2, expires_us=bench.clock.now_us + 500)
        bench.loop.turn()
        assert not made.future.done()
        bench.clock.now_us += 2_000
        bench.loop.turn()
        with pytest.raises(DeadlineExceeded):
            made.future.result()
        assert bench.worker.running_rows == 1


def test_a_batch_closes_by_itself_after_the_delay():
    with Bench(max_delay_us=500) as bench:
        made = bench.submit(1)
        bench.loop.turn(3)
        assert not made.future.done()
        bench.clock.now_us += 501
        bench.loop.turn(2)
        assert made.future.result() == rows_of(1)


def test_a_failed_run_fails_its_requests_alone_and_hides_why(caplog):
    with Bench(max_rows=2) as bench:
        bench.engine.fails = 3  # together, and each alone
        waiting = [bench.submit(number) for number in range(3)]
        with caplog.at_level(logging.ERROR, "forno.model"):
            bench.loop.turn(2)
        errors = [each.future.exception() for each in waiting[:2]]
        assert all(isinstance(error, EngineFailed) and "secret" not in str(error) for error in errors)
        log_id = re.search(r"[0-9a-f]{8}$", str(errors[0]))
        assert log_id is not None
        assert log_id[0] in caplog.text
        assert "secret internals" in caplog.text
        assert waiting[2].future.result() == rows_of(2)
        assert [batch[-1] for batch in bench.metrics.batches] == [True, True, False]


@pytest.mark.parametrize("threaded", [False, True])
def test_one_request_that_cannot_run_does_not_fail_those_that_ran_with_it(threaded, caplog):
    with Bench(threaded=threaded) as bench, caplog.at_level(logging.WARNING, "forno.model"):
        bench.engine.poison = 20
        waiting = [bench.submit(number, rows=1 + number % 2) for number in range(5)]
        bench.loop.turn()
        late = bench.submit(9)
        bench.close(grace_s=1)
        assert isinstance(waiting.pop(2).future.exception(), EngineFailed)
        assert [each.future.result() for each in waiting] == [rows_of(n, 1 + n % 2) for n in (0, 1, 3, 4)]
        assert late.future.result() == rows_of(9)
        assert "5 requests failed to run together, each runs alone now: secret internals" in caplog.text
        ran = [{int(value) // 10 for value in x.ravel()} for x in bench.engine.runs]
        ran.remove({9})  # may have been handed over before
        assert ran == [{0}, {1}, {3}, {4}]
        assert [batch[-1] for batch in bench.metrics.batches].count(True) == 1
        assert sum(len(batch[0]) for batch in bench.metrics.batches) == 6  # each is counted once


def test_who_has_gone_or_is_late_does_not_run_again():
    with Bench(threaded=True, run_us=50_000) as bench:
        bench.engine.poison = 20
        gone, late = bench.submit(1), bench.submit(3, expires_us=bench.clock.now_us + 60_000)
        waiting = [bench.submit(2), bench.submit(4)]
        bench.loop.turn()
        bench.clock.now_us += 60_000
        gone.future.cancel()
        bench.close(grace_s=1)
        assert [int(x[0, 0]) // 10 for x in bench.engine.runs] == [4]
        assert isinstance(late.future.exception(), DeadlineExceeded)
        assert isinstance(waiting[0].future.exception(), EngineFailed)
        assert waiting[1].future.result() == rows_of(4)
        assert bench.metrics.reasons == {"expired": 1, "cancelled": 1}


def test_what_was_taken_back_is_refused_at_the_end():
    with Bench(threaded=True, run_us=50_000) as bench:
        bench.engine.poison = 20
        waiting = [bench.submit(number) for number in (1, 2, 3)]
        bench.loop.turn()
        bench.finish_run()
        assert (bench.worker.running_rows, bench.batcher.pending_requests) == (2, 1)
        closing = bench.loop.create_task(bench.worker.close(grace_s=0))
        bench.clock.now_us += 1
        bench.loop.turn(4)
        closing.result()
        assert all(isinstance(each.future.exception(), NotReady) for each in waiting)
        assert bench.batcher.pending_requests == bench.batcher.pending_rows == 0
        bench.let_abandoned_end(runs=2)
        assert bench.engine.closed == 1


@pytest.mark.parametrize("error", [RuntimeError("secret"), InvalidArgument("said plainly"), StopIteration()])
def test_a_failing_encoder_fails_its_own_request_alone(error, caplog):
    def fail(_answer: object) -> None:
        raise error

    with Bench() as bench, caplog.at_level(logging.CRITICAL, "forno.model"):
        waiting = [bench.submit(1), bench.submit(2, finish=fail), bench.submit(3)]
        bench.loop.turn()
        assert waiting[0].future.result() == rows_of(1)
        assert waiting[2].future.result() == rows_of(3)
        raised = waiting[1].future.exception()
        assert raised is error if isinstance(error, FornoError) else isinstance(raised, EngineFailed)


def test_a_request_cancelled_while_it_runs_is_not_encoded():
    with Bench(threaded=True) as bench:
        encoded = []
        made, other = bench.submit(1, finish=encoded.append), bench.submit(2)
        bench.loop.turn()
        made.future.cancel()
        bench.finish_run()
        assert not encoded
        assert other.future.result() == rows_of(2)


def test_outputs_of_another_row_count_fail_the_batch(caplog):
    with Bench() as bench, caplog.at_level(logging.ERROR, "forno.model"):
        bench.engine.run = lambda slot, rows: [slot.inputs[0][:1]]  # type: ignore[method-assign]
        waiting = [bench.submit(1), bench.submit(2)]
        bench.loop.turn()
        assert all(isinstance(each.future.exception(), EngineFailed) for each in waiting)
        assert "[1, 2] for 2 rows" in caplog.text


def test_split_gives_each_request_views_of_its_rows():
    loop = asyncio.new_event_loop()
    try:
        outputs = [np.arange(12).reshape(6, 2), np.arange(6)]
        for counts in ([6], [1] * 6, [1, 3, 2]):
            made = [request(loop, rows=rows) for rows in counts]
            parts = [tuple(part) for part in Batch(made, 6).split(outputs)]
            assert [len(part[1]) for part in parts] == counts
            for index in (0, 1):
                assert np.array_equal(np.concatenate([part[index] for part in parts]), outputs[index])
                assert all(np.shares_memory(part[index], outputs[index]) for part in parts)
    finally:
        loop.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_closing_finishes_what_was_submitted(threaded):
    with Bench(threaded=threaded, max_rows=2, max_delay_us=10_000_000) as bench:
        waiting = [bench.submit(number) for number in range(7)]
        bench.close(grace_s=1)
        assert [each.future.result() for each in waiting] == [rows_of(number) for number in range(7)]
        assert bench.engine.closed == 1


def test_closing_fails_what_the_grace_does_not_cover():
    with Bench(threaded=True, max_rows=1) as bench:
        waiting = [bench.submit(number) for number in range(4)]
        closing = bench.loop.create_task(bench.worker.close(grace_s=1))
        bench.loop.turn(2)
        assert not closing.done()
        bench.clock.now_us += 1_000_001
        bench.loop.turn(4)
        closing.result()  # although a run still hangs
        assert all(isinstance(each.future.exception(), NotReady) for each in waiting)
        assert bench.engine.closed == 0
        bench.let_abandoned_end(runs=2)
        assert bench.engine.closed == 1
        assert not bench.metrics.batches


def test_a_thread_survives_the_loop_that_it_answers_to():
    bench = Bench(threaded=True)
    bench.submit(1).future.cancel()
    made = bench.submit(2)
    bench.loop.turn()
    (thread,) = [each for each in threading.enumerate() if each.name == "forno puppet"]
    made.future.cancel()
    bench.loop.close()
    bench.engine.let_run()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert bench.engine.closed == 1
