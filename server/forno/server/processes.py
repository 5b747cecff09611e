"""What a process is called, ends with and hears: a title, the process that has started it, hangups."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def call_itself(title: str) -> None:
    """Gives this process a title in what `ps` shows, where that can be done."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle  # noqa: PLC0415  (an extra)

        setproctitle(title)


def die_with_parent(number: signal.Signals) -> Callable[[], object] | None:
    """What a process calls so that the kernel signals it when the thread that has started it dies.

    It only makes a system call, so that a child may call it between fork and exec.

    Args:
        number: The signal.

    Returns:
        None where the system has no such thing: all but Linux.
    """
    if sys.platform != "linux":
        return None
    import ctypes  # noqa: PLC0415  (a single server inside Envoy needs none of it)

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, number)


def hears_hangups() -> bool:
    """Whether SIGHUP is for this process to handle: not where it was started to ignore it, as by nohup."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
