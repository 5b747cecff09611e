"""Plans for the fake TensorRT, and the device that it runs on."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.kernels.devices.cpu import CpuDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

FAKE = Path(__file__).parents[1] / "fake_tensorrt"


class StrictDevice(CpuDevice):
    """The CPU, for threads that are attached, with what the fake TensorRT asks of it."""

    name = "cuda"
    architecture = "sm_90"
    description = "Fake H200, 132 multiprocessors, driver 13"

    def __init__(self, **options: Any) -> None:
        super().__init__(runtime_memory=True, **options)
        self._attached = threading.local()
        self.replays = 0

    def attach(self) -> None:
        self._attached.count = getattr(self._attached, "count", 0) + 1

    def detach(self) -> None:
        self._attached.count -= 1

    def is_attached(self) -> bool:
        return getattr(self._attached, "count", 0) > 0

    def captures(self) -> Any:
        return self._captures

    def check(self, what: str, pointer: int, size_bytes: int) -> None:
        self._device.check(what, pointer, size_bytes)

    def replay(self, graph: int, stream: int) -> None:
        self.replays += 1
        super().replay(graph, stream)


def installed(monkeypatch: pytest.MonkeyPatch, device: Any = None, version: str = "11.4.0.106") -> Any:
    """The fake, as what `import tensorrt` gives until the end of the test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("FAKE_TENSORRT", version)
    monkeypatch.syspath_prepend(str(FAKE))
    module = importlib.import_module("tensorrt")
    module.device = device
    return module


def uninstalled() -> None:
    """Leaves no trace of it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        del sys.modules[name]


def shapes(least: list[int], best: list[int], most: list[int]) -> list[list[int]]:
    return [least, best, most]


def write(path: Path, model: Path, *profiles: dict[str, list[list[int]]], **more: Any) -> Path:
    """A plan at `path`, of an ONNX model; see `plan_bytes`."""
    plan_bytes: Callable[..., bytes] = importlib.import_module("tensorrt.runtime").plan_bytes
    path.write_bytes(plan_bytes(model.read_bytes(), list(profiles), **more))
    return path


def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, StrictDevice]]:
    """The fake on a device of its own; for a fixture."""
    device = StrictDevice()
    yield installed(monkeypatch, device), device
    uninstalled()
    assert not any(device.statistics().values())
