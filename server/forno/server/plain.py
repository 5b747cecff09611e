"""Settings without what has checked them: how they reach, and are read in, the processes that serve.

pydantic is needed once, to read settings and to say what is wrong with them. Importing it takes a tenth of a second and
12 MiB, more than half of what the start command costs otherwise. So that is done in a process of its own, which ends
when it has handed on the values.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Plain(SimpleNamespace):
    """What a section of settings says: its fields, its properties, and `model_fields_set`. Never changed."""

    def model_copy(self, *, update: dict[str, Any]) -> Plain:
        """A copy with some fields replaced."""
        return Plain(**{**vars(self), **update})


def plain(value: T) -> T:
    """The value with every section of settings in it, and every dataclass, replaced by a `Plain` that reads alike."""
    return cast("T", _plain(value))


def _plain(value: Any) -> Any:
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        return Plain(**{name: _plain(getattr(value, name)) for name in kind.__dataclass_fields__})
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return kind([_plain(item) for item in value])
    if not hasattr(kind, "model_fields"):
        return value
    derived = [name for name, member in vars(kind).items() if isinstance(member, property)]
    fields = {name: _plain(getattr(value, name)) for name in (*kind.model_fields, *derived)}
    return Plain(**fields, model_fields_set=frozenset(value.model_fields_set))


def begin_apart(function: Callable[[], T]) -> Callable[[], T]:
    """Begins to call a function in a process of its own; what is returned waits for the result.

    The function must have no effect but its result, and that must be such as can be pickled: where it fails there, or
    no process can be had, it is called here, so that its error is raised as if nothing had been tried.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return function
    read_end, write_end = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not while Python itself is half forked
    child = os.fork()
    if not child:
        _answer(function, write_end, mask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(write_end)

    def wait() -> T:
        with os.fdopen(read_end, "rb") as answer:
            data = answer.read()
        os.waitpid(child, 0)
        return pickle.loads(data) if data else function()  # noqa: S301  (our own)

    return wait


def _answer(function: Callable[[], object], write_end: int, mask: set[signal.Signals | int]) -> None:
    """The whole life of the other process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C is for both, and told by the first; half an import tells nonsense
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    gc.disable()  # it has not long to live
    status = 1
    try:
        data = pickle.dumps(function(), pickle.HIGHEST_PROTOCOL)
        with os.fdopen(write_end, "wb") as answer:
            answer.write(data)
        status = 0
    finally:
        os._exit(status)
