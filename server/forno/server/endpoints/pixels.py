"""The `image` codec for a model with `preprocess`: a picture goes to it as it is, and gets its size there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.endpoints.image import ImageReader, shown_upright, shrunk
from forno.server.endpoints.json_values import Place, to_array
from forno.server.endpoints.payload import Decoded
from forno.server.errors import ConfigError
from forno.server.spelling import listed

if TYPE_CHECKING:
    from PIL import Image

    from forno.server.endpoints.settings import ImageInput
    from forno.server.processing import ImagePlan

    Array = np.ndarray[Any, np.dtype[Any]]

_OF_THE_MODEL = {"layout", "size", "range", "scale", "offset"}
_SPARE = 3  # so many times the size that is wanted is kept of a larger picture: resizing cannot tell it from all of it


class PixelsReader(ImageReader):
    """Reads images for a model that resizes and normalises them itself. Otherwise as `ImageReader`.

    Args:
        settings: The codec's.
        plan: What the model does with images.
        where: Path of the settings, for messages.

    Raises:
        ConfigError: The settings say what the model's `preprocess` says, or Pillow is missing.
    """

    def __init__(self, settings: ImageInput, plan: ImagePlan, where: str) -> None:
        self._need_pillow(where)
        doubly = settings.model_fields_set & _OF_THE_MODEL
        if doubly:
            raise ConfigError(f"{where}: {listed(sorted(doubly))} cannot be set here: the model has `preprocess`")
        mode = "L" if plan.channels == 1 else "RGB"
        if settings.mode not in (None, mode):
            raise ConfigError(f"{where}.mode is {settings.mode}, but '{plan.name}' has {plan.channels} channels")
        if settings.tensor not in ("", plan.name):
            raise ConfigError(f"{where}.tensor is '{settings.tensor}', but the model's image is '{plan.name}'")
        self._settings = settings
        self._plan = plan
        self._name = plan.name
        self._mode = mode

    def _read_pixels(self, value: object) -> Decoded:
        place = Place(self._name, self._settings.field)
        array = to_array(value, np.dtype(np.uint8), place)
        channels = self._plan.channels
        if channels == 1 and array.shape[-1:] != (1,):
            array = array[..., np.newaxis]
        if array.ndim not in (3, 4) or array.shape[-1] != channels or not array.size:
            wanted = "[height, width]" if channels == 1 else "[height, width, 3]"
            raise place.wrong(f"has shape {list(array.shape)}, expected {wanted}, or a list of such")
        return Decoded({self._name: array.reshape(-1, *array.shape[-3:])}, many=array.ndim == 4)

    def _pixels(self, image: Image.Image) -> Array:  # uint8
        rows, columns = self._plan.window(image.height, image.width)[:2]
        side = _SPARE * max(rows, columns)
        image.draft(self._mode, (side, side))  # a JPEG comes out smaller at once, at no loss to us
        picture = shown_upright(image, self._mode)
        rows, columns = self._plan.window(picture.height, picture.width)[:2]
        less = min(picture.height // (_SPARE * rows), picture.width // (_SPARE * columns))
        return np.asarray(shrunk(picture, less) if less > 1 else picture, np.uint8)

    def _to_input(self, pixels: Array) -> Array:  # [1, height, width, channels]
        return np.ascontiguousarray(255 - pixels if self._is_inverted(pixels) else pixels)[np.newaxis]
