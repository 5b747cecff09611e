"""The fake driver, tests/native/fake_driver.cc, as what the fake TensorRT runs on: for whole processes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Driver:
    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._kept: list[Any] = []  # graphs may call them again

    def is_attached(self) -> bool:
        context = ctypes.c_void_p()
        self._driver.cuCtxGetCurrent(ctypes.byref(context))
        return bool(context.value)

    def captures(self) -> Driver:
        return self

    def __contains__(self, stream: int) -> bool:
        status = ctypes.c_int()
        assert self._driver.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status)) == 0
        return bool(status.value)

    def check(self, what: str, pointer: int, size_bytes: int) -> None:
        """The driver holds its own calls against what is allocated."""

    def enqueue(self, stream: int, operation: Callable[[], Any]) -> None:
        callback = _CALLBACK(lambda _: operation() and None)
        self._kept.append(callback)
        assert self._driver.cuLaunchHostFunc(ctypes.c_void_p(stream), callback, None) == 0

    def finish(self, stream: int) -> None:
        assert self._driver.cuStreamSynchronize(ctypes.c_void_p(stream)) == 0
