"""A package `tensorrt` without a GPU: the part of the interface that Forno uses, as strict as the real one.

A plan is the real header, a line of JSON and the ONNX model, which ONNX Runtime runs on the CPU when its turn in the
stream comes. What the real library leaves undefined or answers with a crash is an error here: no driver, a thread that
is not attached, an address outside of the device's memory, a graph whose context was told another shape since.
tests/unit/test_tensorrt_api.py holds its names against the real bindings.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Any

__version__ = os.environ.get("FAKE_TENSORRT", "11.4.0.106")

device: Any = None
"""What it runs on: has `enqueue`, `finish`, `captures`, `is_attached` and `check`."""

if os.environ.get("FAKE_TENSORRT_DRIVER"):
    from tensorrt.driver import Driver

    device = Driver()


class Anything:
    """A device to load plans on, and to run none."""

    def is_attached(self) -> bool:
        return True


if os.environ.get("FAKE_TENSORRT_LOADS"):
    device = Anything()


class Undefined(BaseException):
    """What the real library does not survive, or whose outcome nobody knows."""


def need_device() -> Any:
    if device is None:
        raise Undefined("segmentation fault: there is no driver")
    if not device.is_attached():
        raise Undefined("a call without a current context")
    return device


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class MemoryPoolType(Enum):
    WORKSPACE, DLA_MANAGED_SRAM = range(2)


class DataType(Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class _Flag(Enum):
    def __int__(self) -> int:
        return int(self.value)


class NetworkDefinitionCreationFlag(_Flag):
    STRONGLY_TYPED = 1


if __version__.startswith("10."):

    class BuilderFlag(_Flag):
        FP16, BF16, TF32, REFIT, VERSION_COMPATIBLE = range(5)

else:

    class BuilderFlag(_Flag):  # type: ignore[no-redef]
        TF32, REFIT, VERSION_COMPATIBLE = range(3)


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError

    def tell(self, text: str) -> None:
        if not getattr(self, "ready", False):
            raise Undefined("ILogger.__init__ was not called")
        self.log(ILogger.Severity.ERROR, text)


class IOutputAllocator:
    def __init__(self) -> None:
        self.ready = True


class Dims(tuple[int, ...]):
    __slots__ = ()


from tensorrt.builder import (  # noqa: E402
    Builder,
    IBuilderConfig,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
    OnnxParser,
    ParserError,
)
from tensorrt.refitter import OnnxParserRefitter, Refitter  # noqa: E402
from tensorrt.runtime import ICudaEngine, IExecutionContext, Runtime  # noqa: E402

__all__ = [
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITimingCache",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
]
