"""The adapters and the kernels on a real GPU: the cases of tests/unit, each on every adapter that is there.

FORNO_TEST_DEVICE chooses one adapter, which then must be there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from tests.device_cases import *  # noqa: F403
from tests.kernel_bench import KernelBench
from tests.unit.test_kernels import TestCast, TestImages, TestMeanPool, TestRows, TestTopK  # noqa: F401

from forno.kernels.devices import DeviceUnavailable, attached, open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forno.kernels.devices import Device

CHOSEN = os.environ.get("FORNO_TEST_DEVICE", "")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[CHOSEN] if CHOSEN else ["cuda", "pycuda"])
def opened(request: pytest.FixtureRequest) -> Iterator[str]:
    """The adapter's name; one device stays open, so that its context does."""
    try:
        made = open_device(request.param)
    except DeviceUnavailable as error:
        if CHOSEN:
            raise
        pytest.skip(str(error))
    yield request.param
    made.close()


@pytest.fixture
def device(opened: str) -> Iterator[Any]:
    made = open_device(opened)
    with attached(made):
        yield made
    made.close()


@pytest.fixture(scope="module")
def bench(opened: str) -> Iterator[KernelBench]:
    device: Device = open_device(opened)
    with attached(device):
        made = KernelBench(device)
        yield made
        made.close()
        assert not any(device.statistics().values())
    device.close()
