"""What becomes of requests that leave the queue without a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.errors import DeadlineExceeded, Overloaded
from forno.server.request import NEVER_US, callers

if TYPE_CHECKING:
    from collections.abc import Callable

    from forno.server.request import Request, RowShapes
    from forno.server.scheduling import Group

    Refused = Callable[[str, int], None]  # told why, "expired", "cancelled" or "overloaded", and of how many


def sweep(groups: dict[RowShapes, Group], now_us: int, *, patient: bool) -> tuple[list[Request], int]:
    """Takes every cancelled or expired request out of the groups, and groups that are empty then out of the map.

    Args:
        groups: All that waits.
        now_us: Now.
        patient: Whether a group waits for company.

    Returns:
        The requests, and when the next one expires.
    """
    dropped: list[Request] = []
    soonest_us = NEVER_US
    for key, group in list(groups.items()):
        count = len(dropped)
        for priority, lane in list(group.lanes.items()):
            kept: list[Request] = []
            for request in lane:
                if request.expires_us <= now_us or request.future.done():
                    dropped.append(request)
                else:
                    kept.append(request)
                    soonest_us = min(soonest_us, request.expires_us)
            if kept:
                lane.keep(kept)
            else:
                del group.lanes[priority]
        gone = dropped[count:]
        group.rows -= sum([request.rows for request in gone])
        if not group.lanes:
            del groups[key]
        elif gone:
            group.set_due(patient=patient)
    return dropped, soonest_us


def drop(requests: list[Request], now_us: int, refused: Refused) -> None:
    """Answers those that expired, and counts; the cancelled want no answer."""
    expired = [request for request in requests if not request.future.done()]
    for request in expired:
        waited_us = now_us - request.arrived_us
        request.future.set_exception(
            DeadlineExceeded(f"the deadline passed after {waited_us} us in the queue; the request did not run")
        )
    expired_count, count = callers(expired), callers(requests)
    if expired_count:
        refused("expired", expired_count)
    if expired_count < count:
        refused("cancelled", count - expired_count)


def give_up(requests: list[Request], retry_s: float, refused: Refused) -> None:
    """Answers those that would only be late: the run before took longer than was expected when they came.

    Args:
        requests: Requests.
        retry_s: When it is worth to come again.
        refused: Told of those that count.
    """
    for request in requests:
        request.future.set_exception(
            Overloaded("the deadline could not be met any more; the request did not run", retry_s)
        )
    count = callers(requests)
    if count:
        refused("overloaded", count)
