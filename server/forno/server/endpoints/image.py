"""The `image` codec: a picture of any size becomes what the model's input wants."""

from __future__ import annotations

import asyncio
import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from forno.server.endpoints.json_values import Place, to_array
from forno.server.endpoints.payload import NOTHING, UNTOLD, Decoded, is_json
from forno.server.endpoints.text import only_input
from forno.server.errors import ConfigError, InvalidArgument
from forno.server.spelling import listed

try:
    from PIL import Image, ImageOps
except ImportError:  # the extra `images` is not installed
    Image = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from forno.server.endpoints.payload import Payload
    from forno.server.endpoints.settings import ImageInput
    from forno.server.signature import Signature, TensorSpec

    Array = np.ndarray[Any, np.dtype[Any]]

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # each more is more code that strangers' bytes reach
_MAX_INLINE_PIXELS = 512 * 512  # a larger image takes milliseconds to decode: too long for the event loop
_LIGHT = 127


class Geometry(NamedTuple):
    """How one image lies in the model's input."""

    layout: str
    height: int
    width: int
    channels: int

    def arrange(self, pixels: Array) -> Array:
        """[rows, height, width, channels] in the order of the layout."""
        match self.layout:
            case "NCHW":
                return pixels.transpose(0, 3, 1, 2)
            case "NHW":
                return pixels[..., 0]
            case "flat":
                return pixels.reshape(len(pixels), -1)
            case _:
                return pixels


class ImageReader:
    """Reads images for a model that has one numeric input. Event loop only; it decodes large ones beside it.

    Args:
        settings: The codec's.
        signature: The model's.
        where: Path of the settings, for messages.

    Raises:
        ConfigError: The model takes something else, its geometry is left open, or Pillow is missing.
    """

    def __init__(self, settings: ImageInput, signature: Signature, where: str) -> None:
        self._need_pillow(where)
        self._settings = settings
        self._spec = only_input(signature, settings.tensor, where)
        self._name = self._spec.name
        self._geometry = _geometry(settings, self._spec, where)
        self._mode = "L" if self._geometry.channels == 1 else "RGB"
        if settings.range is not None:
            black, white = settings.range
            self._scale, self._offset = np.float32((white - black) / 255), np.float32(black)
        else:
            self._scale = _per_channel(settings.scale, self._geometry, f"{where}.scale")
            self._offset = _per_channel(settings.offset, self._geometry, f"{where}.offset")

    @staticmethod
    def _need_pillow(where: str) -> None:
        if Image is None:
            raise ConfigError(f"{where}: the codec `image` needs Pillow: pip install 'forno[images]'")
        # Pillow's own limit is a warning first; `max_pixels` is checked before anything is decoded.
        Image.MAX_IMAGE_PIXELS = None

    async def read(self, payload: Payload) -> Decoded:
        """One image, or one or several of a JSON body's pixels."""
        kind = payload.media_type
        untold = kind in UNTOLD or kind == "application/octet-stream"
        if payload.value is not NOTHING or is_json(kind) or (untold and payload.data.lstrip()[:1] == b"{"):
            return self._read_pixels(payload.json_object(self._settings.field))
        if not untold and not kind.startswith("image/"):
            raise InvalidArgument(
                f"the content type is '{payload.content_type[:100]}', expected an image such as image/png, "
                f'or application/json with {{"{self._settings.field}": [...]}}',
                "content-type",
            )
        image = self._open(payload.data)
        if image.width * image.height > _MAX_INLINE_PIXELS:
            pixels = await asyncio.to_thread(self._decode, image)
        else:
            pixels = self._decode(image)
        return Decoded({self._name: self._to_input(pixels)})

    def _read_pixels(self, value: object) -> Decoded:
        place = Place(self._spec.name, self._settings.field)
        array = to_array(value, self._spec.dtype, place)
        layout, height, width, channels = self._geometry
        rest = (height * width * channels,) if layout == "flat" else ()
        for shape in ((height, width, channels), (height, width) if channels == 1 else rest, rest):
            if shape and array.shape[-len(shape) :] == shape and array.ndim <= len(shape) + 1:
                pixels = array.reshape(-1, height, width, channels)
                if len(pixels) == 0:
                    break
                return Decoded({self._spec.name: self._geometry.arrange(pixels)}, many=array.ndim > len(shape))
        wanted = [height, width] if channels == 1 else [height, width, channels]
        raise place.wrong(f"has shape {list(array.shape)}, expected {wanted}, or a list of such")

    def _open(self, data: bytes) -> Image.Image:
        """Reads the header only."""
        if not data:
            raise InvalidArgument("the body is empty, expected an image")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Exception as error:  # decoders raise anything on broken data
            seen = f"{len(data)} bytes that start with {data[:8].hex(' ')}"
            raise InvalidArgument(
                f"the body is not an image that can be read: {seen}; expected {listed(_FORMATS, 'or')}"
            ) from error
        pixels = image.width * image.height
        if pixels > self._settings.max_pixels:
            raise InvalidArgument(
                f"the image is {image.width} x {image.height}, {pixels} pixels, "
                f"expected at most {self._settings.max_pixels}"
            )
        return image

    def _decode(self, image: Image.Image) -> Array:  # [height, width, channels], 0 to 255; any thread
        try:
            pixels = self._pixels(image)
        except Exception as error:  # decoders raise anything on broken data
            raise InvalidArgument(f"the {image.format} image is broken: {str(error)[:200]}") from error
        return pixels.reshape(*pixels.shape[:2], -1)

    def _pixels(self, image: Image.Image) -> Array:
        size = (self._geometry.width, self._geometry.height)
        image.draft(self._mode, (max(size), max(size)))  # a JPEG comes out smaller at once, at no loss to us
        picture = shown_upright(image, self._mode)
        if picture.size != size:
            shrinks = picture.width >= size[0] and picture.height >= size[1]
            filter_ = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
            picture = picture.resize(size, filter_)
        return np.asarray(picture, np.float32)

    def _to_input(self, pixels: Array) -> Array:  # [1, ...] in the model's layout
        if self._is_inverted(pixels):
            pixels = 255 - pixels
        values = pixels * self._scale + self._offset
        if self._spec.dtype.kind in "iu":
            limits = np.iinfo(self._spec.dtype)
            values = np.rint(values).clip(limits.min, limits.max)
        return self._geometry.arrange(values[np.newaxis].astype(self._spec.dtype))

    def _is_inverted(self, pixels: Array) -> bool:
        if self._settings.invert != "auto":
            return self._settings.invert
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        return bool(np.median(np.concatenate(edges)) > _LIGHT)


def shown_upright(image: Image.Image, mode: str) -> Image.Image:
    """The picture as people see it, in a mode of 8 bits a channel."""
    return _plain(ImageOps.exif_transpose(image)).convert(mode)


def shrunk(picture: Image.Image, times: int) -> Image.Image:
    """The picture, so many times smaller along each side; each of its pixels is the mean of those that it covers."""
    return picture.resize((picture.width // times, picture.height // times), Image.Resampling.BOX)


def _plain(image: Image.Image) -> Image.Image:
    """Without transparency (on white) and with 8 bits a channel."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def _geometry(settings: ImageInput, spec: TensorSpec, where: str) -> Geometry:
    shape = spec.shape
    layout = settings.layout or _layout(shape)
    wanted = {"flat": 2, "NHW": 3}.get(layout, 4)
    if not layout or len(shape) != wanted or shape[0] not in (-1, 1) or spec.dtype.kind not in "fViu":
        hint = f"which is not {layout} numbers" if layout else "which does not tell: set `layout`"
        raise ConfigError(f"{where}: the codec `image` needs rows of images, but '{spec.name}' is {spec}, {hint}")
    channels = {"NHWC": shape[-1], "NCHW": shape[1], "NHW": 1}.get(layout, -1)
    if channels < 0:
        channels = 3 if settings.mode == "RGB" else 1
    if channels not in (1, 3) or settings.mode not in (None, "L" if channels == 1 else "RGB"):
        raise ConfigError(f"{where}.mode is {settings.mode}, but '{spec.name}' is {spec}: {channels} channels")
    if layout == "flat":
        height, width = settings.size or _square(shape[1] // channels)
        fits = shape[1] in (-1, height * width * channels) and height > 0
    else:
        of_model = shape[2:] if layout == "NCHW" else shape[1:3]
        height, width = (
            mine if theirs < 0 else theirs for theirs, mine in zip(of_model, settings.size or of_model, strict=True)
        )
        fits = min(height, width) > 0 and settings.size in (None, (height, width))
    if not fits:
        seen = "missing" if settings.size is None else f"{list(settings.size)}"
        raise ConfigError(f"{where}.size is {seen}, but '{spec.name}' is {spec}: set the height and width that fit it")
    return Geometry(layout, height, width, channels)


def _layout(shape: tuple[int, ...]) -> str:
    if len(shape) == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        return "" if first == last else "NCHW" if first else "NHWC"
    return {2: "flat", 3: "NHW"}.get(len(shape), "")


def _square(pixels: int) -> tuple[int, int]:
    side = math.isqrt(max(pixels, 0))
    return (side, side) if side * side == pixels else (0, 0)


def _per_channel(value: float | tuple[float, ...], geometry: Geometry, where: str) -> Any:
    if isinstance(value, tuple) and len(value) != geometry.channels:
        raise ConfigError(
            f"{where} has {len(value)} numbers, expected one, or one for each of {geometry.channels} channels"
        )
    return np.asarray(value, np.float32)
