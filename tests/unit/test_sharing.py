"""Weights of models, as the kernel sees them."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.sharing import LEAST_WEIGHT, niceness, weigh_this_thread


def _niceness_of_thread(weight: float) -> list[int]:
    """Of a thread with this weight, and of one that it starts."""
    seen: list[int] = []

    def look() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def run() -> None:
        weigh_this_thread(weight)
        look()
        child = threading.Thread(target=look)
        child.start()
        child.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen


@given(st.floats(LEAST_WEIGHT, 1.0))
def test_a_share_is_met_within_one_step(weight):
    assert 1.25**-0.51 <= weight / 1.25 ** -niceness(weight) <= 1.25**0.51


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux weighs single threads")
@pytest.mark.parametrize(("weight", "nicer"), [(1.0, 0), (0.5, 3), (0.25, 6), (LEAST_WEIGHT, 19)])
def test_the_thread_and_its_children_are_nicer_and_nobody_else(weight, nicer):
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert _niceness_of_thread(weight) == [min(before + nicer, 19)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
