"""One model on several GPUs: a copy on each, which take turns."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forno.server.engines import Engine
    from forno.server.signature import Signature
    from forno.server.slots.cuda import Ring

    Array = np.ndarray[Any, np.dtype[Any]]


class SpreadEngine:
    """See `Engine`. Each slot belongs to one of the copies, in turn; their runs know nothing of each other.

    Args:
        engines: The same model, each on a device of its own; closed with this.
    """

    def __init__(self, engines: Sequence[Engine[Any]]) -> None:
        self._engines = list(engines)
        self._turns = itertools.cycle(self._engines)
        self._owners: WeakKeyDictionary[Any, Engine[Any]] = WeakKeyDictionary()  # of slots
        self.name, self.text_only, self.profiles = engines[0].name, engines[0].text_only, engines[0].profiles

    @property
    def rings(self) -> tuple[Ring, ...]:
        """Those of all copies."""
        return tuple([engine.ring for engine in self._engines])  # type: ignore[attr-defined]

    @property
    def signature(self) -> Signature:
        """The same for all copies."""
        return self._engines[0].signature

    @signature.setter
    def signature(self, signature: Signature) -> None:
        for engine in self._engines:
            engine.signature = signature

    def new_slot(self, max_rows: int) -> Any:
        """Buffers for one batch of up to `max_rows` rows, on the next device."""
        engine = next(self._turns)
        slot = engine.new_slot(max_rows)
        self._owners[slot] = engine
        return slot

    def run(self, slot: Any, rows: int) -> Sequence[Array]:
        """Runs what the slot holds, on its device."""
        return self._owners[slot].run(slot, rows)

    def settle(self, *, small: bool) -> bool:
        """Told once, after the first measurements."""
        settled = [engine.settle(small=small) for engine in self._engines]
        return any(settled)

    def close(self) -> None:
        """Frees all copies."""
        for engine in self._engines:
            engine.close()
