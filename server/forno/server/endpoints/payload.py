"""What goes into an endpoint, what comes out, and the two halves of a codec between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from forno.server.endpoints import json_document
from forno.server.endpoints.json_body import Body
from forno.server.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]

NOTHING: Any = object()
"""Stands for a value that is not there, since None is JSON's null."""

UNTOLD = ("", "application/x-www-form-urlencoded")
"""Content types that say nothing: the second is what curl sends unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What a caller sends to an endpoint: a JSON value, or a body of some content type."""

    value: Any = NOTHING
    content_type: str = ""
    data: bytes = field(default=b"", repr=False)

    @property
    def media_type(self) -> str:
        """The content type without its parameters, in lower case."""
        return self.content_type.partition(";")[0].strip().lower()

    @property
    def is_json(self) -> bool:
        """Whether it is a JSON value, says that it is, or says nothing."""
        return self.value is not NOTHING or is_json(self.media_type) or self.media_type in UNTOLD

    def json(self) -> Any:
        """The JSON value.

        Raises:
            InvalidArgument: The body is not JSON.
        """
        return json_document.parse(self.data) if self.value is NOTHING else self.value

    def json_object(self, known: str) -> Any:
        """What a JSON object has in its only field.

        Raises:
            InvalidArgument: The body is not JSON, not an object, or has other fields.
        """
        value = self.json()
        if not isinstance(value, dict):
            raise InvalidArgument(f'the body is not an object, expected {{"{known}": ...}}')
        json_document.refuse_unknown(value, (known,), "")
        if known not in value:
            raise InvalidArgument(f'`{known}` is missing, expected {{"{known}": ...}}', known)
        return value[known]


@dataclass(slots=True)
class Decoded:
    """A payload as tensors."""

    arrays: Mapping[str, Array]
    many: bool = False  # whether the reply is a list, one entry a row
    body: Body = field(default_factory=lambda: Body(form="columns", content=None))  # whose form the reply takes


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint answers."""

    value: Any  # plain JSON: no arrays, no NaN
    model: str
    version: str
    queue_us: int
    compute_us: int
    batch_rows: int


class Reader(Protocol):
    """The half of a codec that makes tensors for one signature. Event loop only."""

    async def read(self, payload: Payload) -> Decoded:
        """The tensors of a payload.

        Raises:
            InvalidArgument: It is not what the codec reads.
        """


class Writer(Protocol):
    """The half of a codec that makes a reply of one signature's outputs. Event loop only."""

    def write(self, answer: Answer, decoded: Decoded) -> Any:
        """The reply, as plain JSON."""


def is_json(media_type: str) -> bool:
    """Whether a media type is JSON's, or built on it."""
    return media_type in ("application/json", "text/json") or media_type.endswith("+json")
