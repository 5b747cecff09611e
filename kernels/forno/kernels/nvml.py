"""What the NVIDIA driver says of its GPUs, through NVML: memory and how busy they are.

NVML counts GPUs as they sit in the machine, whatever CUDA_VISIBLE_DEVICES says; so one is known here by its place on
the PCI bus, which CUDA tells too (`Device.bus_id`).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

log = logging.getLogger("forno.device")


class Reading(NamedTuple):
    """One GPU now. All processes on it count."""

    used_bytes: int
    total_bytes: int
    busy: float  # share of the last fraction of a second in which a kernel ran, 0 to 1; NaN where it is not told


class Nvml:
    """NVML of this process, loaded when it is first asked. Any one thread; ends with `close`."""

    def __init__(self) -> None:
        self._library: Any = None
        self._handles: dict[str, Any] = {}
        self._missing = False  # for good: said once

    def read(self, bus_id: str) -> Reading | None:
        """The GPU at that place, such as "0000:65:00.0"; None where there is no NVML, or it does not tell."""
        if self._missing or not bus_id:
            return None
        try:
            library = self._opened()
            if bus_id not in self._handles:
                self._handles[bus_id] = library.nvmlDeviceGetHandleByPciBusId(bus_id.encode())
            handle = self._handles[bus_id]
            memory = library.nvmlDeviceGetMemoryInfo(handle)
            try:
                busy = library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            except library.NVMLError:  # not on a part of a GPU (MIG), for one
                busy = float("nan")
            return Reading(int(memory.used), int(memory.total), busy)
        except Exception as error:  # noqa: BLE001  (its own errors have a base only once it could be imported)
            self._missing = True
            log.debug("no metrics of GPUs: %s: %s", type(error).__name__, error)
            return None

    def close(self) -> None:
        """Lets go of NVML. Idempotent."""
        library, self._library = self._library, None
        self._handles.clear()
        if library is not None:
            try:
                library.nvmlShutdown()
            except library.NVMLError as error:
                log.debug("NVML could not be shut down: %s", error)

    def _opened(self) -> Any:
        if self._library is None:
            import pynvml  # noqa: PLC0415  (only what runs on a GPU pays for it)

            pynvml.nvmlInit()
            self._library = pynvml
        return self._library
