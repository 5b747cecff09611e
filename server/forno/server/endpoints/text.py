"""The `text` codec: a text becomes one element of a string tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.endpoints.json_values import show
from forno.server.endpoints.payload import Decoded
from forno.server.errors import ConfigError, InvalidArgument
from forno.v1 import tensors

if TYPE_CHECKING:
    from forno.server.endpoints.payload import Payload
    from forno.server.endpoints.settings import TextInput
    from forno.server.signature import Signature, TensorSpec

_CHARSETS = ("", "utf-8", "utf8", "us-ascii")


class TextReader:
    """Reads texts for a model that has one string input. Event loop only.

    Args:
        settings: The codec's.
        signature: The model's.
        where: Path of the settings, for messages.

    Raises:
        ConfigError: The model takes something else.
    """

    def __init__(self, settings: TextInput, signature: Signature, where: str) -> None:
        self._field = settings.field
        self._spec = only_input(signature, settings.tensor, where)
        shape = self._spec.shape
        if self._spec.dtype != tensors.OBJECT or not (len(shape) == 1 or (len(shape) == 2 and shape[1] in (-1, 1))):
            raise ConfigError(
                f"{where}: the codec `text` needs an input string[?] or string[?, 1], "
                f"but '{self._spec.name}' is {self._spec}"
            )

    async def read(self, payload: Payload) -> Decoded:
        """One text from a JSON object or a plain body, or a list of texts from a JSON object."""
        value = self._value(payload)
        texts = value if isinstance(value, list) else [value]
        if not texts:
            raise InvalidArgument(f"`{self._field}` is an empty list, expected a text or a list of texts", self._field)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                path = f"{self._field}[{number}]" if isinstance(value, list) else self._field
                raise InvalidArgument(f"`{path}` is {show(text)}, expected a text", path)
        array = np.empty(len(texts), object)
        array[:] = texts
        shape = (len(texts), *([1] * (len(self._spec.shape) - 1)))
        return Decoded({self._spec.name: array.reshape(shape)}, many=isinstance(value, list))

    def _value(self, payload: Payload) -> Any:
        if payload.is_json:
            return payload.json_object(self._field)
        if payload.media_type != "text/plain":
            raise InvalidArgument(
                f"the content type is '{payload.media_type[:100]}', expected application/json or text/plain",
                "content-type",
            )
        charset = payload.content_type.lower().partition("charset=")[2].split(";")[0].strip(' "')
        if charset not in _CHARSETS:
            raise InvalidArgument(f"the charset is '{charset[:100]}', expected utf-8", "content-type")
        try:
            return payload.data.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"the text is not UTF-8: {error.reason} at byte {error.start}") from None


def only_input(signature: Signature, name: str, where: str) -> TensorSpec:
    """The model's only input.

    Raises:
        ConfigError: It has several, or the only one is not called `name`.
    """
    known = [spec.name for spec in signature.inputs]
    if len(known) != 1:
        raise ConfigError(f"{where}: this codec fills one input, but the model has {len(known)}: {', '.join(known)}")
    if name not in ("", known[0]):
        raise ConfigError(f"{where}.tensor is '{name}', but the model's input is '{known[0]}'")
    return signature.inputs[0]
