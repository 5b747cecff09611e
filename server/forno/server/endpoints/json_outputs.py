"""Answers of a model as JSON, in the form of the request. The forms are shown in `json_body.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from forno.server.endpoints.json_values import to_json
from forno.server.errors import InvalidArgument
from forno.v1 import tensors

if TYPE_CHECKING:
    import numpy as np

    from forno.server.endpoints.json_body import Body
    from forno.server.request import Answer
    from forno.server.signature import Signature

    Array = np.ndarray[Any, np.dtype[Any]]


def dumps(value: object) -> bytes:
    """JSON text of a value whose leaves may be arrays."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def document(
    body: Body, answer: Answer, signature: Signature, *, rows: int, model: str, version: str
) -> dict[str, Any]:
    """The answer to a request, for `dumps`.

    Args:
        body: The request: its form, and the outputs it wants.
        answer: What the run gave; all outputs, in the signature's order.
        signature: The model's.
        rows: Instances of a request in rows.
        model: Name of the model that answered.
        version: Its version.

    Raises:
        InvalidArgument: The request was in rows, and an output does not have one row for each.
    """
    indexes = signature.output_indexes(body.outputs)
    if indexes is None:
        indexes = tuple(range(len(answer.outputs)))
    outputs = {signature.outputs[index].name: answer.outputs[index] for index in indexes}
    match body.form:
        case "rows":
            return {"predictions": _rows(outputs, rows)}
        case "columns":
            values = {name: to_json(array) for name, array in outputs.items()}
            return {"outputs": values if len(values) != 1 else next(iter(values.values()))}
        case "native":
            return _native(body, outputs, answer, model, version)


def _rows(outputs: dict[str, Array], rows: int) -> Any:
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != rows:
            raise InvalidArgument(
                f"output '{name}' has shape {list(array.shape)}, not one row for each of {rows} instances: "
                'send columns, {"inputs": ...}, to this model',
                "instances",
            )
    values = {name: to_json(array) for name, array in outputs.items()}
    if len(values) == 1:
        return next(iter(values.values()))
    return [{name: value[row] for name, value in values.items()} for row in range(rows)]


def _native(body: Body, outputs: dict[str, Array], answer: Answer, model: str, version: str) -> dict[str, Any]:
    value: dict[str, Any] = {"model": model, "version": version}
    if body.request_id:
        value["request_id"] = body.request_id
    value["outputs"] = [
        {
            "name": name,
            "data_type": tensors.name_of(array.dtype),
            "shape": list(array.shape),
            "data": to_json(array),
        }
        for name, array in outputs.items()
    ]
    value["timings"] = {
        "queue_us": answer.queue_us,
        "compute_us": answer.compute_us,
        "batch_rows": answer.batch_rows,
    }
    return value
