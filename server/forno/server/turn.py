"""One turn of the event loop: what its events have in common is done once, at its end.

Waiting for the next turn instead costs a system call and a few microseconds, which is much of what a small request
costs when it comes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_later: list[Callable[[], None]] | None = None  # None outside of a turn that says when it ends; event loop only


def begin() -> None:
    """Says that `end` will be called in this very turn."""
    global _later  # noqa: PLW0603  (there is one turn at a time)
    _later = []


def end(loop: asyncio.AbstractEventLoop) -> None:
    """Does what was asked for since `begin`. What that asks for in its turn is for the loop's next."""
    global _later
    later, _later = _later, None
    for callback in later or ():
        try:
            callback()
        except Exception as error:  # noqa: BLE001  (the others must not suffer)
            loop.call_exception_handler({"message": "a callback at the end of a turn raised", "exception": error})


def soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Has a callback called at the end of this turn, or in the loop's next."""
    if _later is None:
        loop.call_soon(callback)
    else:
        _later.append(callback)
