"""A call of a model by named arrays: what endpoints and the REST side of models have in common."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forno.server.request import NEVER_US, Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from forno.server.model import Model
    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]


async def call(
    model: Model, arrays: Mapping[str, Array], *, expires_us: int = NEVER_US, priority: int = 0, deadline_us: int = 0
) -> Answer:
    """Runs a model on named arrays; cancelling it cancels the request.

    Returns:
        The answer, with outputs of its own.

    Raises:
        FornoError: Whatever a request can end with.
    """
    ordered = model.signature.arrange(arrays)
    rows = model.signature.validate(ordered)
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    model.submit(
        Request(ordered, rows, _own, future, expires_us=expires_us, priority=priority, deadline_us=deadline_us)
    )
    return await future


def _own(answer: Answer) -> Answer:
    """The answer with copies of its outputs, which may be views into a slot."""
    return replace(answer, outputs=tuple([output.copy() for output in answer.outputs]))
