"""The `tensors` codec: the JSON rows, columns and native form that models themselves take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from forno.server.endpoints import json_body, json_inputs, json_outputs
from forno.server.endpoints.payload import NOTHING, Decoded
from forno.server.errors import InvalidArgument

if TYPE_CHECKING:
    from forno.server.endpoints.payload import Payload
    from forno.server.request import Answer
    from forno.server.signature import Signature


class TensorsReader:
    """Reads the tensors of any signature. Event loop only."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    async def read(self, payload: Payload) -> Decoded:
        """The tensors of a JSON body in any of the three forms."""
        if not payload.is_json:
            raise InvalidArgument(
                f"the content type is '{payload.content_type[:100]}', expected application/json",
                "content-type",
            )
        parsed = payload.value is not NOTHING
        body = json_body.of_value(payload.value) if parsed else json_body.parse(payload.data)
        for key in ("model", "version", "label"):
            if getattr(body, key):
                raise json_body.wrong(key, "cannot be chosen here: the endpoint decides it")
        arrays = json_inputs.tensors_of(body, self._signature)
        return Decoded(arrays, many=body.form == "rows", body=body)


class TensorsWriter:
    """Writes the tensors of any signature. Event loop only.

    Args:
        signature: The model's.
        model: Name of the model.
        version: Its version.
    """

    def __init__(self, signature: Signature, model: str, version: str) -> None:
        self._signature = signature
        self._model = model
        self._version = version

    def write(self, answer: Answer, decoded: Decoded) -> Any:
        """The outputs in the form of the request."""
        value = json_outputs.document(
            decoded.body,
            answer,
            self._signature,
            rows=rows_of(decoded),
            model=self._model,
            version=self._version,
        )
        return orjson.loads(json_outputs.dumps(value))  # which turns arrays into lists, each number as its digits


def rows_of(decoded: Decoded) -> int:
    """Rows of a request: the first dimension of its first input."""
    for array in decoded.arrays.values():
        return array.shape[0] if array.ndim else 1
    return 1
