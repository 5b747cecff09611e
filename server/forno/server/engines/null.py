"""The engine that answers its input. For tests and for measuring everything that is not the model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from forno.server.errors import ConfigError
from forno.server.profiles import Profiles
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.host import HostSlot
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forno.server.config import NullSettings

    Array = np.ndarray[Any, np.dtype[Any]]


class NullEngine:
    """Output `y` is input `x`, after a delay. Owned by a Model.

    Raises:
        ConfigError: The settings name no element type.
    """

    name = "null"
    text_only = False
    profiles = Profiles()

    def __init__(self, settings: NullSettings) -> None:
        try:
            dtype = tensors.dtype_named(settings.data_type)
        except KeyError:
            known = ", ".join(row.name for row in tensors.TABLE)
            raise ConfigError(f"null.data_type is '{settings.data_type}', expected one of {known}") from None
        shape = settings.shape
        names = tuple([f"size{axis}" if size < 0 else "" for axis, size in enumerate(shape)])
        self._delay_s = settings.delay_us / 1e6
        self._row_delay_s = settings.row_delay_us / 1e6
        self.signature = Signature(
            inputs=(TensorSpec("x", dtype, shape, names),),
            outputs=(TensorSpec("y", dtype, shape, names),),
            batched=bool(shape) and shape[0] == -1,
        )

    def new_slot(self, max_rows: int) -> HostSlot:
        """Buffers for one batch of up to `max_rows` rows."""
        return HostSlot(self.signature, max_rows)

    def run(self, slot: HostSlot, rows: int) -> Sequence[Array]:
        """Waits, and hands the input back."""
        delay_s = self._delay_s + self._row_delay_s * rows
        if delay_s:
            time.sleep(delay_s)
        return slot.own_rows(slot.inputs)

    def settle(self, *, small: bool) -> bool:
        """Has nothing to arrange."""
        return False

    def close(self) -> None:
        """Has nothing to free."""
