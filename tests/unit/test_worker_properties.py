"""What holds for every worker, whatever comes in whatever order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.workbench import Bench, rows_of

from forno.server.errors import DeadlineExceeded, EngineFailed, Overloaded
from forno.server.request import NEVER_US

if TYPE_CHECKING:
    from forno.server.request import Request

submits = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "width": st.integers(0, 2),
        "priority": st.integers(-1, 1),
        "time_us": st.none() | st.integers(-10, 3_000),
    }
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), submits),
        st.tuples(st.just("submit"), submits),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("wait"), st.integers(0, 2_000)),
        st.tuples(st.just("turn"), st.none()),
        st.tuples(st.just("run"), st.none()),
        st.tuples(st.just("fail"), st.none()),
        st.tuples(st.just("slow"), st.sampled_from([0, 100, 1_000])),
    ),
    max_size=60,
)


@given(
    steps=steps,
    instances=st.sampled_from([0, 1, 1, 2, 3]),  # 0: on the loop
    run_us=st.sampled_from([100, 50_000]),
    settings=st.fixed_dictionaries(
        {
            "max_rows": st.integers(5, 8),
            "max_delay_us": st.sampled_from([0, 0, 700]),
            "max_pending_rows": st.integers(1, 12),
            "promote_after_ms": st.sampled_from([1, 1000]),
        }
    ),
)
def test_no_request_is_lost_mixed_up_or_answered_twice(steps, instances, run_us, settings):
    """Whatever comes in whatever order."""
    logging.getLogger("forno.model").disabled = True  # failures are wanted here
    try:
        with Bench(threaded=instances > 0, instances=max(instances, 1), run_us=run_us, **settings) as bench:
            taken = play(bench, steps)
            bench.close(grace_s=1000)
            check(bench, taken)
    finally:
        logging.getLogger("forno.model").disabled = False


def play(bench: Bench, steps: list[tuple[str, Any]]) -> dict[int, Request]:
    """Does the steps; gives the requests that were taken, by their number."""
    taken: dict[int, Request] = {}
    for number, (what, value) in enumerate(steps, start=1):
        now_us = bench.clock.now_us
        if what == "submit":
            expires_us = NEVER_US if value["time_us"] is None else now_us + value["time_us"]
            had = bench.batcher.pending_rows
            try:
                taken[number] = bench.submit(
                    number,
                    rows=value["rows"],
                    width=value["width"],
                    priority=value["priority"],
                    expires_us=expires_us,
                )
            except Overloaded:
                assert expires_us < NEVER_US or had + value["rows"] > bench.settings.max_pending_rows
            except DeadlineExceeded:
                assert expires_us <= now_us
        elif what == "cancel" and taken:
            taken[list(taken)[value % len(taken)]].future.cancel()
        elif what == "wait":
            bench.clock.now_us += value
        elif what == "run" and bench.worker.running_rows:
            bench.finish_run()
        elif what == "fail":
            bench.engine.fails += 1
        elif what == "slow":
            bench.engine.after = lambda took_us=value: setattr(bench.clock, "now_us", bench.clock.now_us + took_us)
        else:
            bench.loop.turn()
        bound = bench.settings.max_pending_rows
        rows = bench.batcher.pending_rows - bench.batcher.taken_back_rows
        assert rows <= bound or bench.batcher.pending_requests == 1
    return taken


def check(bench: Bench, taken: dict[int, Request]) -> None:
    """Each has the one answer that is its own, and ran at most once, and once more alone where its batch had failed."""
    ran: list[int] = []
    for x in bench.engine.runs:
        assert len(x) <= bench.settings.max_rows
        ran += [int(row[0]) // 10 for row in x if row.size]
    failed_alone = [{int(value) // 10 for value in x.ravel()} for x in bench.engine.failed_runs]
    for number, each in taken.items():
        width = each.inputs[0].shape[1]
        runs = ran.count(number)
        if width:
            assert runs in (0, each.rows)
        if each.future.cancelled():
            continue
        error = each.future.exception()
        if error is None:
            assert each.future.result() == rows_of(number, each.rows, width)
            assert runs == each.rows or not width
        elif isinstance(error, (DeadlineExceeded, Overloaded)):
            assert runs == 0
        else:
            assert isinstance(error, EngineFailed)
            assert {number} in failed_alone or not width
    assert bench.batcher.pending_requests == bench.batcher.pending_rows == bench.worker.running_rows == 0
    assert bench.engine.closed == 1
