"""What the `input` and `output` of an endpoint may say, one class a codec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from forno.server.config.base import MAX_PIXELS, PixelCount, Settings
from forno.server.errors import ConfigError
from forno.server.spelling import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

Side = Annotated[int, Field(ge=1, le=16384)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class TextInput(Settings):
    """A text, as a field of a JSON object or as the whole body."""

    codec: Literal["text"]
    """Chooses this codec."""
    field: str = "text"
    """Field of the JSON body that has the text, or a list of texts."""
    tensor: str = ""
    """The model's input; empty = its only one."""


class ImageInput(Settings):
    """A PNG, JPEG, BMP, GIF or WebP image, or a JSON object with pixels as the model was trained on."""

    codec: Literal["image"]
    """Chooses this codec."""
    field: str = "pixels"
    """Field of the JSON body that has rows of pixels, as numbers that go to the model as they are."""
    tensor: str = ""
    """The model's input; empty = its only one."""
    mode: Literal["L", "RGB"] | None = None
    """Grey or colour; unset = from the channels of the model's input."""
    layout: Literal["NHW", "NHWC", "NCHW", "flat"] | None = None
    """Order of the input's dimensions: rows (N), height, width, channels; unset = from the input's shape."""
    size: tuple[Side, Side] | None = None
    """Height and width that images are resized to; unset = from the input's shape."""
    range: tuple[Number, Number] | None = None
    """What black and white (0 and 255) become. Not together with `scale` and `offset`."""
    scale: Number | tuple[Number, ...] = 1.0
    """What each value (0 to 255) is multiplied with; one number, or one a channel."""
    offset: Number | tuple[Number, ...] = 0.0
    """What is added after that; one number, or one a channel."""
    invert: bool | Literal["auto"] = False
    """Whether black and white change places before all that; `auto` = where the image's border is light."""
    max_pixels: PixelCount = MAX_PIXELS
    """Largest image that is decoded, in pixels: a few bytes can claim to be gigabytes."""

    @model_validator(mode="after")
    def _one_mapping(self) -> ImageInput:
        if self.range is not None and self.model_fields_set & {"scale", "offset"}:
            raise ValueError("either `range` or `scale` and `offset`")
        return self


class TensorsInput(Settings):
    """The JSON rows, columns or native form that models themselves take."""

    codec: Literal["tensors"] = "tensors"
    """Chooses this codec."""


class LabelOutput(Settings):
    """The likeliest label and how likely it is."""

    codec: Literal["label"]
    """Chooses this codec."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the model's order; empty = from `label_tensor`, else their numbers."""
    tensor: str = ""
    """The output that scores the classes; empty = the only one of floats."""
    label_tensor: str = ""
    """The output that names the class, as a text or a number; empty = the one of the highest score."""
    scores: Literal["probabilities", "logits"] = "probabilities"
    """What the scores are; logits are turned into probabilities."""
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many of the likeliest labels are listed besides; 0 = none."""


class TensorsOutput(Settings):
    """All outputs, in the form of the request."""

    codec: Literal["tensors"] = "tensors"
    """Chooses this codec."""


InputSettings = TextInput | ImageInput | TensorsInput
OutputSettings = LabelOutput | TensorsOutput
SettingsT = TypeVar("SettingsT", bound=Settings)

_INPUTS: dict[str, type[InputSettings]] = {"text": TextInput, "image": ImageInput, "tensors": TensorsInput}
_OUTPUTS: dict[str, type[OutputSettings]] = {"label": LabelOutput, "tensors": TensorsOutput}


def input_settings(values: Mapping[str, object], where: str) -> InputSettings:
    """The typed settings of an endpoint's `input`.

    Args:
        values: What the configuration says; nothing = the codec `tensors`.
        where: Path of the values in the configuration, for messages.

    Raises:
        ConfigError: Not a known codec, or not its settings; one line a fault.
    """
    return _read(_INPUTS, values, where)


def output_settings(values: Mapping[str, object], where: str) -> OutputSettings:
    """The typed settings of an endpoint's `output`; otherwise as `input_settings`."""
    return _read(_OUTPUTS, values, where)


def _read(codecs: Mapping[str, type[SettingsT]], values: Mapping[str, object], where: str) -> SettingsT:
    codec = values.get("codec", "tensors" if not values else None)
    if not isinstance(codec, str) or codec not in codecs:
        meant = nearest(codec, codecs) if isinstance(codec, str) else None
        hint = f"did you mean `{meant}`?" if meant else f"expected {listed([*codecs], 'or')}"
        seen = "missing" if codec is None else f"{codec!r}"
        raise ConfigError(f"{where}.codec is {seen}; {hint}")
    kind = codecs[codec]
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        lines = {_line(details, kind, where): None for details in error.errors(include_url=False)}
        raise ConfigError("\n".join(lines)) from None


def _line(details: ErrorDetails, kind: type[Settings], where: str) -> str:
    key = str(details["loc"][0]) if details["loc"] else ""
    path = f"{where}.{key}" if key else where
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        known = [*kind.model_fields]
        meant = nearest(key, known)
        return f"{path} is not a setting; " + (f"did you mean `{meant}`?" if meant else f"there is {listed(known)}")
    if not key:
        return f"{path} takes {message}"
    return f"{path} is {_shown(details['input'])}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
