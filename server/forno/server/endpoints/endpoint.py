"""A public name over a model, with codecs between JSON-friendly values and tensors."""

from __future__ import annotations

import string
from functools import partial
from typing import TYPE_CHECKING, Any

from forno.server.endpoints.calls import call
from forno.server.endpoints.label import LabelWriter, RankedWriter
from forno.server.endpoints.payload import Reply
from forno.server.endpoints.plain import TensorsReader, TensorsWriter
from forno.server.endpoints.settings import (
    ImageInput,
    LabelOutput,
    TextInput,
    input_settings,
    output_settings,
)
from forno.server.endpoints.text import TextReader
from forno.server.errors import ConfigError, NotFound, NotReady
from forno.server.request import NEVER_US

if TYPE_CHECKING:
    import numpy as np

    from forno.server.config import Config, EndpointSettings
    from forno.server.endpoints.payload import Payload, Reader, Writer
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.signature import Signature

    Array = np.ndarray[Any, np.dtype[Any]]

_NAME_CHARACTERS = frozenset(f"{string.ascii_letters}{string.digits}-_.")
_RESERVED = ("models", "predict")  # first words of the server's own paths


class Endpoint:
    """A named endpoint. Owned by the server; event loop only; lives as long as it.

    The model is looked up at each call, so that its versions can be swapped; codecs are made anew when that
    brings another signature.

    Args:
        name: The path below /v1/, such as "spam/detect".
        settings: What the configuration says of it.
        registry: Where its model is found.

    Raises:
        ConfigError: A codec's settings are wrong.
    """

    def __init__(self, name: str, settings: EndpointSettings, registry: Registry) -> None:
        self.name = name
        self.model_name = settings.model
        self._settings = settings
        self._registry = registry
        self._where = f"endpoints.{name}"
        self._input = input_settings(settings.input, f"{self._where}.input")
        self._output = output_settings(settings.output, f"{self._where}.output")
        self._signature: Signature | None = None  # that the codecs below are made for
        self._reader: Reader
        self._writer: Writer

    @property
    def example(self) -> Any:
        """A JSON body to try it with; None where there is none that fits every model."""
        return {self._input.field: "some text"} if isinstance(self._input, TextInput) else None

    def check(self) -> None:
        """Checks that the codecs fit the model, if it has been loaded.

        Raises:
            ConfigError: They do not, or there is no such model.
        """
        settings = self._settings
        try:
            model = self._registry.resolve(settings.model, settings.version, settings.label)
        except NotReady:
            return
        except NotFound as error:
            raise ConfigError(f"{self._where}.model: {error}") from None
        self._fit(model)

    async def invoke(self, payload: Payload, *, expires_us: int = NEVER_US) -> Reply:
        """Answers one call.

        Args:
            payload: What the caller sent.
            expires_us: When the caller's deadline ends, on the monotonic clock.

        Raises:
            FornoError: Whatever a request can end with.
        """
        settings = self._settings
        model = self._registry.resolve(settings.model, settings.version, settings.label)
        if self._signature is not model.signature:
            try:
                self._fit(model)
            except ConfigError as error:
                raise NotReady(f"endpoint '{self.name}' does not fit the model that it has now: {error}") from error
        reader, writer = self._reader, self._writer
        decoded = await reader.read(payload)
        answer = await call(model, decoded.arrays, expires_us=expires_us)
        value = writer.write(answer, decoded)
        return Reply(value, model.name, model.version, answer.queue_us, answer.compute_us, answer.batch_rows)

    def _fit(self, model: Model) -> None:
        signature = model.signature
        where = f"{self._where}.input"
        match self._input:
            case TextInput():
                self._reader = TextReader(self._input, signature, where)
            case ImageInput() if model.processing.image is not None:
                from forno.server.endpoints.pixels import PixelsReader  # noqa: PLC0415  (as below)

                self._reader = PixelsReader(self._input, model.processing.image, where)
            case ImageInput():
                from forno.server.endpoints.image import ImageReader  # noqa: PLC0415  (loading Pillow takes a while)

                self._reader = ImageReader(self._input, signature, where)
            case _:
                self._reader = TensorsReader(signature)
        match self._output:
            case LabelOutput():
                ranking = model.processing.ranking
                kind = LabelWriter if ranking is None else partial(RankedWriter, ranking)
                self._writer = kind(self._output, signature, f"{self._where}.output")
            case _:
                self._writer = TensorsWriter(signature, model.name, model.version)
        self._signature = signature


def build(config: Config, registry: Registry) -> dict[str, Endpoint]:
    """The endpoints that the configuration names, by name.

    Raises:
        ConfigError: One is wrong; says which, and what.
    """
    endpoints: dict[str, Endpoint] = {}
    for name, settings in config.endpoints.items():
        check_name(name)
        endpoints[name] = Endpoint(name, settings, registry)
        endpoints[name].check()
    return endpoints


def check_name(name: str) -> None:
    """Refuses names that cannot be called, or that hide a path of the server's own.

    Raises:
        ConfigError: It is such a name.
    """
    parts = name.split("/")
    if not all(parts) or any(set(part) - _NAME_CHARACTERS for part in parts):
        raise ConfigError(
            f"endpoints.{name}: the name is '{name}', "
            "expected words of letters, digits, '-', '_' and '.' with '/' between them"
        )
    if parts[0] in _RESERVED:
        raise ConfigError(f"endpoints.{name}: names that begin with '{parts[0]}' belong to the server itself")
