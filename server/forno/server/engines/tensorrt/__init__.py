"""TensorRT: loads plans, builds them from ONNX models, and runs them.

`library.py` knows what is installed, and what differs between packages and releases; `plans.py` what a plan file tells
before it is loaded; `contexts.py` is what a slot runs with; `engine.py` is the engine. `build.py` has plans built by
`builder.py`, a process apart, and kept in `cache.py`, by what `../onnx_files.py` finds a model to consist of. Versions
that differ in weights alone, by `structure.py`, get a kept plan with theirs by `refit.py`. Releases that take
types from models alone are given such as `../onnx_float16.py` converts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from forno.kernels.devices import DeviceError, open_device
from forno.server.engines.tensorrt import library
from forno.server.engines.tensorrt.build import Plans
from forno.server.engines.tensorrt.engine import TensorrtEngine
from forno.server.engines.tensorrt.plans import SUFFIXES
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from forno.kernels.devices import Device
    from forno.server.config import ModelSettings

log = logging.getLogger("forno.engine.tensorrt")


def open_tensorrt(
    path: Path, settings: ModelSettings, device_name: str, stopping: threading.Event | None = None
) -> TensorrtEngine:
    """Opens a plan, or the plan that is built from an ONNX model. Blocks, for minutes where it builds; any thread.

    Args:
        path: A plan, or an ONNX model.
        settings: Of the model.
        device_name: `cuda`, `pycuda`, or one of several: `cuda:1`.
        stopping: Ends a build once it is set.

    Raises:
        ConfigError: There is no such device or no TensorRT, or see `TensorrtEngine`.
        NotReady: It was stopped.
    """
    if settings.cuda.precision != "model":
        raise ConfigError(
            f"cuda.precision is '{settings.cuda.precision}', which is for ONNX Runtime, and the model runs in "
            "TensorRT: set tensorrt.precision instead"
        )
    device, found = _opened(device_name)
    try:
        if path.suffix.lower() in SUFFIXES:
            return TensorrtEngine(path, settings, found, device)
        plans = Plans(path, settings, found, device, stopping)
        was_kept = plans.path.is_file()
        plan = plans.ready()
    except BaseException:
        device.close()
        raise
    try:
        return TensorrtEngine(plan, settings, found, device)
    except ConfigError as error:
        if not was_kept or "cannot load" not in str(error):
            raise
        log.warning("%s; it is built anew", error)
        plan.unlink(missing_ok=True)
        return open_tensorrt(path, settings, device_name, stopping)


def intended(path: Path, settings: ModelSettings, device_name: str) -> str:
    """What `open_tensorrt` would do for a plan: load it, take one that is kept, or build one.

    Raises:
        ConfigError: See `open_tensorrt`.
    """
    device, found = _opened(device_name)
    try:
        if path.suffix.lower() in SUFFIXES:
            return f"loads {path}, with TensorRT {found.version} for {device.description}"
        return str(Plans(path, settings, found, device))
    finally:
        device.close()


def _opened(device_name: str) -> tuple[Device, library.Library]:
    if device_name == "cpu":
        raise ConfigError(
            "the tensorrt engine runs on a GPU alone, and device is 'cpu'; remove it, or set device: cuda"
        )
    name, _, ordinal = device_name.partition(":")
    try:
        device = open_device(name, int(ordinal or 0))  # first: without a driver TensorRT would end the process
    except DeviceError as error:
        raise ConfigError(str(error)) from error
    try:
        return device, library.find()
    except BaseException:
        device.close()
        raise
