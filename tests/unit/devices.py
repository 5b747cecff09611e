"""The CPU as a device that counts its copies, and as one that can be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forno.kernels.devices import DeviceError
from forno.kernels.devices.cpu import CpuDevice

if TYPE_CHECKING:
    from collections.abc import Callable


class Counting(CpuDevice):
    """Keeps of every copy which way it went and how many bytes it took."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.copies: list[tuple[str, int]] = []

    def copy_in(self, *to_do: int) -> None:
        self.copies.append(("in", to_do[2]))
        super().copy_in(*to_do)

    def copy_out(self, *to_do: int) -> None:
        self.copies.append(("out", to_do[2]))
        super().copy_out(*to_do)


def _until_lost(name: str) -> Callable[..., Any]:
    def call(self: Losable, *given: Any) -> Any:
        if self.is_lost:
            raise DeviceError(f"{name} failed: an illegal memory access was encountered")
        return getattr(super(Losable, self), name)(*given)

    return call


class Losable(CpuDevice):
    """Once it is lost, whatever reaches the driver fails, as after a fault in a kernel."""

    is_lost = False

    close_graph = _until_lost("close_graph")
    close_stream = _until_lost("close_stream")
    copy_out = _until_lost("copy_out")
    finish = _until_lost("finish")
    free = _until_lost("free")
    synchronize = _until_lost("synchronize")
