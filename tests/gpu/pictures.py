"""Pictures to a model that runs on a GPU, and its best classes back: what every engine there has to give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tests.unit import onnx_models
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers
from tests.unit.test_processing import BIAS, IMAGENET, SCALE, images

from forno.kernels import reference
from forno.server.config import ModelSettings
from forno.server.engines.processed import ProcessedEngine
from forno.server.processing import plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SIZES = ((16, 16), (120, 160), (100, 37), (3, 4), (270, 480))


def check_pictures(folder: Path, opened: Callable[[Path], Any], *, half: bool) -> None:
    """Batches of pictures of many sizes, in changing order, have the references' best classes; closes the engine."""
    path = onnx_models.seeing(folder / "see.onnx", size=(16, 16), classes=100, half=half)
    pictures = images(7, *_SIZES)
    settings = ModelSettings(preprocess=IMAGENET, postprocess={"top_k": 5, "softmax": True})
    inner = opened(path)
    slot = inner.new_slot(1)
    answers(inner, slot, (np.zeros((1, *inner.signature.inputs[0].shape[1:]), inner.signature.inputs[0].dtype),))
    processing = plan(inner.signature, settings.preprocess, settings.postprocess)
    assert processing is not None
    engine = ProcessedEngine(inner, processing)
    slot = engine.new_slot(8)
    dtype, tolerance = ("float16", 3e-2) if half else ("float32", 1e-3)
    tensor = reference.image_to_tensor([picture[0] for picture in pictures], 16, 16, SCALE, BIAS, dtype=dtype)
    scores = plain(path, tensor)[0].astype(np.float32)
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    for first in range(2 * len(pictures)):  # with graphs, all but the first ones are replayed
        order = np.roll(np.arange(len(pictures)), first)
        values, classes = answers(engine, slot, *[(pictures[number],) for number in order])
        best = -np.sort(-chances[order], axis=1)[:, :5]
        np.testing.assert_allclose(values, best, rtol=tolerance, atol=tolerance)
        own = np.take_along_axis(chances[order], classes, 1)  # classes that are nearly equal may change places
        np.testing.assert_allclose(own, values, rtol=tolerance, atol=tolerance)
    engine.close()
