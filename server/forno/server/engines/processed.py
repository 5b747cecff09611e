"""An engine with something done to images before its runs, and to scores after them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels import host
from forno.kernels.build import BuildFailed
from forno.kernels.devices import DeviceError
from forno.server.errors import ConfigError
from forno.server.profiles import Profiles
from forno.server.slots import rings_of
from forno.server.slots.processed import DeviceProcessedSlot, HostProcessedSlot, process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.engines import Engine
    from forno.server.processing import Processing
    from forno.server.warmup import WarmUp

    Array = np.ndarray[Any, np.dtype[Any]]


class ProcessedEngine:
    """See `Engine`. Takes images and gives the best classes; where the engine's slots are a ring's, on its device.

    Args:
        engine: What runs; closed with this.
        processing: What is done around it.

    Raises:
        ConfigError: It cannot be done here: Pillow, or what builds kernels, is missing.
    """

    def __init__(self, engine: Engine[Any], processing: Processing) -> None:
        self.name, self.text_only = engine.name, engine.text_only
        self.signature = processing.seen_from_outside(engine.signature)
        self._engine = engine
        self._processing = processing
        only_image = processing.image is not None and len(engine.signature.inputs) == 1  # which becomes of one shape
        self.profiles = Profiles() if only_image else engine.profiles  # of the shapes that its runs are given
        for ring in rings_of(engine):
            try:
                process(ring, processing)
            except (DeviceError, BuildFailed) as error:
                raise ConfigError(f"its kernels cannot be had: {error}") from error

    def new_slot(self, max_rows: int) -> Any:
        """Buffers for one batch of up to `max_rows` rows."""
        slot = self._engine.new_slot(max_rows)
        if isinstance(slot, DeviceProcessedSlot):
            return slot
        if self._processing.image is not None and not host.HAS_IMAGES:
            raise ConfigError("preprocess needs Pillow on the CPU: pip install 'forno[images]'")
        return HostProcessedSlot(slot, self._processing, max_rows)

    def run(self, slot: Any, rows: int) -> Sequence[Array]:
        """Runs what the slot holds."""
        if isinstance(slot, DeviceProcessedSlot):
            return self._engine.run(slot, rows)
        outputs = self._engine.run(slot.inner, rows)
        ranking = self._processing.ranking
        if ranking is None:
            return outputs
        at = ranking.index
        values, classes = host.softmax_topk(outputs[at], ranking.k, softmax=ranking.softmax)
        return [*outputs[:at], values, *outputs[at + 1 :], classes]

    def settle(self, *, small: bool) -> bool:
        """Was told before."""
        return False

    def close(self) -> None:
        """Frees the model."""
        self._engine.close()


def processed(engine: Engine[Any], processing: Processing, warm: WarmUp) -> tuple[ProcessedEngine, WarmUp]:
    """An engine that was warmed up, with processing around it, which one run has shown to work. Blocks; any thread.

    Rows are proven to be independent without it: best classes that are nearly equal could change places, and so seem to
    depend on which rows run together.

    Raises:
        ConfigError: It cannot be done here; otherwise whatever a run raises.
    """
    made = ProcessedEngine(engine, processing)
    if processing.image is None or not warm.shapes:
        return made, warm
    image = processing.image
    shapes = list(warm.shapes)
    shapes[image.index] = (shapes[image.index][0], image.height, image.width, image.channels)
    specs = zip(made.signature.inputs, shapes, strict=True)
    inputs = tuple([np.zeros(shape, spec.dtype) for spec, shape in specs])
    slot = made.new_slot(1)
    slot.load([inputs], 1)
    made.run(slot, 1)
    return made, replace(warm, shapes=tuple(shapes), inline=False)
