"""Whether a request with a deadline can be in time, by what runs cost and what is ahead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forno.server.request import Request
    from forno.server.scheduling import Group
    from forno.server.tuning import Tuner

AHEAD = 9 / 8
"""Batches ahead are not all full, and one that must be closed early for a deadline costs those behind it more."""


def surely_in_time(group: Group | None, request: Request, tuner: Tuner, starts_us: int) -> bool:
    """Whether neither the request nor one that it may overtake could be late even if all that wait went before it.

    A bound of what the functions below find out, which most requests pass; of one group that is all that waits.
    """
    answered_us = starts_us + tuner.cost.safe_us(max(tuner.cap, request.rows))
    latest_us = request.answer_by_us
    if group is not None:
        answered_us += tuner.cost.drain_us(group.rows + request.rows, tuner.cap) * AHEAD
        lane = group.lanes.get(request.priority)
        if lane is not None and lane.timed:
            latest_us = min(latest_us, lane.timed[-1].answer_by_us)
    return answered_us <= latest_us


def expected_us(
    groups: Iterable[Group], request: Request, tuner: Tuner, urgent_us: int, starts_us: int, instances: int
) -> float:
    """When a request that comes now is answered.

    Those that are ahead of it take what they typically take and a little more, its own batch what is safe; that is
    taken to be full where full ones go before it, because others will join it.

    Args:
        groups: All that wait.
        request: The request.
        tuner: What sizes the batches of its row shape.
        urgent_us: When it is urgent.
        starts_us: When the engine is free, and what an answer needs beyond its run.
        instances: Runs that can go on at once.
    """
    ahead_us, rows = 0.0, 0
    for group in groups:
        cap = group.tuner.cap
        before = group.rows_before(request.priority, urgent_us)
        if group.tuner is tuner:
            rows = before % cap
            if rows + request.rows > cap:
                rows = 0
            before -= rows
            if before >= cap:
                rows = max(cap - request.rows, 0)
        ahead_us += group.tuner.cost.drain_us(before, cap)
    return starts_us + ahead_us * AHEAD / instances + tuner.cost.safe_us(rows + request.rows)


def makes_late_us(group: Group, request: Request, urgent_us: int, starts_us: int, instances: int) -> float:
    """How late the last of its priority and row shape would be if the request overtook it; 0 if it overtakes none."""
    lane = group.lanes.get(request.priority)
    if lane is None or not lane.timed or lane.timed[-1].urgent_us <= urgent_us:
        return 0.0
    last = lane.timed[-1]
    rows = group.rows_before(request.priority, last.urgent_us) + request.rows
    drained_us = group.tuner.cost.drain_us(rows, group.tuner.cap) * AHEAD / instances
    return starts_us + drained_us - last.answer_by_us
