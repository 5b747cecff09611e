"""What is done to images before a model reads them, and to its scores after: the plan that every device follows.

    uint8 [rows, height, width, channels] -> resize, crop, normalise, order -> the model -> the best k of each row

Callers see the ends of this: images of any size, and k classes with their scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import ConfigError, InvalidArgument
from forno.server.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.config import PostprocessSettings, PreprocessSettings
    from forno.server.profiles import Shapes

LONGEST_SIDE = 32767
"""Of an image, in pixels, before and after: as the kernels."""
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
_VALUES, _CLASSES = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How images become one input of a model. Immutable; any thread."""

    index: int  # of the input
    name: str
    dtype: np.dtype[Any]  # of the input, as the next
    channels: int
    height: int
    width: int
    channels_last: bool
    resize: tuple[int, ...]  # to a shorter side, or to a height and width; none = straight to the input's
    scale: tuple[float, ...]  # for each channel, what a value of 0 to 255 is multiplied by
    bias: tuple[float, ...]  # for each channel, what is added then
    max_pixels: int  # of an image before

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row of the input."""
        size = (self.height, self.width)
        return (*size, self.channels) if self.channels_last else (self.channels, *size)

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """How an image comes to its size: what it is resized to, and there the top and left of the middle."""
        match self.resize:
            case ():
                rows, columns = self.height, self.width
            case (shorter,):
                short = min(height, width)
                rows, columns = shorter * height // short, shorter * width // short
            case (rows, columns):
                pass
        return rows, columns, round((rows - self.height) / 2), round((columns - self.width) / 2)

    def run_shapes(self, shapes: Shapes) -> Shapes:
        """What inputs of these shapes run with, be it of one row or of all: every image comes to one size."""
        at = self.index
        return (*shapes[:at], (*shapes[at][:-3], *self.shape), *shapes[at + 1 :])

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses images that cannot be resized, or are too large to be; `shape` has fitted the signature.

        Raises:
            InvalidArgument: A side is 0, or too long before or after; or there are too many pixels.
        """
        height, width = shape[1:3]
        if min(height, width) < 1 or max(height, width) > LONGEST_SIDE:
            raise InvalidArgument(
                f"input '{self.name}': images of {height} x {width}, expected sides of 1 to {LONGEST_SIDE}",
                f"inputs[{self.name}].shape",
            )
        if height * width > self.max_pixels:
            raise InvalidArgument(
                f"input '{self.name}': images of {height} x {width}, {height * width} pixels, expected at most "
                f"{self.max_pixels} (preprocess.max_pixels)",
                f"inputs[{self.name}].shape",
            )
        if max(self.window(height, width)[:2]) > LONGEST_SIDE:
            raise InvalidArgument(
                f"input '{self.name}': images of {height} x {width} would be longer than {LONGEST_SIDE} with a shorter "
                f"side of {self.resize[0]}",
                f"inputs[{self.name}].shape",
            )


@dataclass(frozen=True, slots=True)
class Ranking:
    """Which output of a model is cut down to its best classes. Immutable; any thread."""

    index: int  # of the output
    classes: int
    k: int
    softmax: bool  # whether scores are logits that become probabilities


@dataclass(frozen=True, slots=True)
class Processing:
    """What is done around the runs of a model. Immutable; any thread."""

    image: ImagePlan | None
    ranking: Ranking | None

    def seen_from_outside(self, own: Signature) -> Signature:
        """What callers send and get, where the model itself has this signature."""
        inputs, outputs = list(own.inputs), list(own.outputs)
        if self.image is not None:
            spec = inputs[self.image.index]
            shape, names = (spec.shape[0], -1, -1, self.image.channels), (_rows_name(spec), "height", "width", "")
            inputs[self.image.index] = TensorSpec(spec.name, np.dtype(np.uint8), shape, names)
        if self.ranking is not None:
            spec = outputs[self.ranking.index]
            best = replace(spec, dtype=_VALUES, shape=(spec.shape[0], self.ranking.k), dim_names=(_rows_name(spec), ""))
            outputs[self.ranking.index] = best
            outputs.append(replace(best, name=f"{spec.name}_classes", dtype=_CLASSES))
        return replace(own, inputs=tuple(inputs), outputs=tuple(outputs))


def plan(signature: Signature, before: PreprocessSettings, after: PostprocessSettings) -> Processing | None:
    """What the settings ask for; None where they ask for nothing.

    Raises:
        ConfigError: It does not fit the model.
    """
    image = _image(signature, before) if before.is_set else None
    ranking = _ranking(signature, after) if after.top_k else None
    return Processing(image, ranking) if image or ranking else None


def _image(signature: Signature, settings: PreprocessSettings) -> ImagePlan:
    index = _at(signature.inputs, settings.tensor, "preprocess.tensor", "input")
    spec = signature.inputs[index]
    layout = settings.layout or _layout(spec.shape)
    if len(spec.shape) != 4 or not layout or spec.dtype not in _FLOATS or spec.shape[0] not in (-1, 1):
        raise ConfigError(
            f"preprocess: '{spec.name}' is {spec}, expected rows of images of float16 or float32, such as "
            "float32[?, 3, 224, 224]; where the order does not tell, set preprocess.layout"
        )
    channels, height, width = spec.shape[1:] if layout == "NCHW" else (spec.shape[3], *spec.shape[1:3])
    if channels not in (1, 3):
        raise ConfigError(f"preprocess: '{spec.name}' is {spec}: {channels} channels in {layout}, expected 1 or 3")
    resize: tuple[int, ...] = ()
    if settings.resize is not None:
        resize = settings.resize if isinstance(settings.resize, tuple) else (settings.resize,)
    if min(height, width) < 0:
        raise ConfigError(f"preprocess: '{spec.name}' is {spec}, expected a fixed height and width")
    least = (height, width) if len(resize) == 2 else (max(height, width),) * len(resize)
    if any(to < at_least for to, at_least in zip(resize, least, strict=True)):
        raise ConfigError(
            f"preprocess.resize is {settings.resize}, but '{spec.name}' is {spec}: nothing could be cropped"
        )
    means, deviations = _each(settings.mean, channels, "mean"), _each(settings.std, channels, "std")
    return ImagePlan(
        index,
        spec.name,
        spec.dtype,
        channels,
        height,
        width,
        layout == "NHWC",
        resize,
        tuple([1 / (255 * deviation) for deviation in deviations]),
        tuple([-mean / deviation for mean, deviation in zip(means, deviations, strict=True)]),
        settings.max_pixels,
    )


def _ranking(signature: Signature, settings: PostprocessSettings) -> Ranking:
    index = _at(signature.outputs, settings.tensor, "postprocess.tensor", "output")
    spec = signature.outputs[index]
    if len(spec.shape) != 2 or spec.shape[1] < 1 or spec.dtype not in _FLOATS:
        raise ConfigError(f"postprocess: '{spec.name}' is {spec}, expected one float16 or float32 a class for each row")
    if settings.top_k > spec.shape[1]:
        raise ConfigError(
            f"postprocess.top_k is {settings.top_k}, but '{spec.name}' is {spec}: {spec.shape[1]} classes"
        )
    return Ranking(index, spec.shape[1], settings.top_k, settings.softmax)


def _at(specs: Sequence[TensorSpec], name: str, where: str, kind: str) -> int:
    names = [spec.name for spec in specs]
    if name in names:
        return names.index(name)
    listed = ", ".join(f"'{each}'" for each in names)
    if name:
        raise ConfigError(f"{where} is '{name}', but the model's {kind}s are {listed}")
    if len(names) != 1:
        raise ConfigError(f"{where} is missing, and the model has the {kind}s {listed}")
    return 0


def _rows_name(spec: TensorSpec) -> str:
    return spec.dim_names[0] if spec.dim_names else ""  # plans have none


def _layout(shape: tuple[int, ...]) -> str:
    if len(shape) != 4 or (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        return ""
    return "NCHW" if shape[1] in (1, 3) else "NHWC"


def _each(value: float | tuple[float, ...], channels: int, name: str) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (value,) * channels
    if len(value) != channels:
        raise ConfigError(
            f"preprocess.{name} has {len(value)} numbers, expected one, or one for each of {channels} channels"
        )
    return value
