"""How models share the processor when they want more of it than there is.

The kernel's scheduler divides it already, thread by thread, at once and without leaving any idle; a queue of our own in
front could only be slower to notice. So a model's weight becomes the niceness of the threads that run it. Linux gives
a thread 1.25 times the time of one that is nicer by one (sched(7), "The nice value"; kernel `sched_prio_to_weight`).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading

log = logging.getLogger("forno.model")

LEAST_WEIGHT = 0.015
"""What the nicest thread gets, 1.25 ** -19, rounded up."""
_STEP = 1.25
_NICEST = 19


def niceness(weight: float) -> int:
    """The niceness, 0 to 19, at which a thread gets nearest to `weight` of what one of niceness 0 gets.

    Args:
        weight: From LEAST_WEIGHT to 1.
    """
    return min(round(-math.log(weight, _STEP)), _NICEST)


def weigh_this_thread(weight: float) -> None:
    """Gives the calling thread, and those that it will start, their share. There is no way back to a larger one.

    Only Linux has a niceness for a single thread; elsewhere a weight below 1 does nothing but warn.
    """
    nicer = niceness(weight)
    if not nicer:
        return
    if sys.platform != "linux":
        log.warning("cpu_weight is %g, but only Linux can weigh single threads; it has no effect here", weight)
        return
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(own + nicer, _NICEST))
