"""Answers written straight to protobuf's wire format: one copy of the outputs, nothing of it through messages.

What is written is byte for byte what `PredictResponse.SerializeToString` would give (a test holds the two together);
fields are those of forno/v1/predictor.proto and tensor.proto, the format is protobuf.dev's "Encoding".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forno.v1 import predictor_pb2, tensor_pb2, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.request import Answer
    from forno.server.signature import TensorSpec

    Array = np.ndarray[Any, np.dtype[Any]]
    Part = bytes | Array

_VARINT, _DELIMITED = 0, 2
_MAX_SHAPES = 64  # of one output whose beginnings are kept; a caller chooses shapes, and must not choose our memory


def varint(number: int) -> bytes:
    """A number >= 0 as a base-128 varint."""
    if number < 0x80:
        return _SHORT[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SHORT = [bytes((number,)) for number in range(0x80)]
_MAX_KEPT = 1024
_kept: dict[tuple[int, int, int], bytes] = {}  # timings as they are written: of small models, the same come often


def _tag(message: Any, field: str, wire_type: int) -> bytes:
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type)


def _delimited(tag: bytes, data: bytes) -> bytes:
    return tag + varint(len(data)) + data


_OUTPUTS = _tag(predictor_pb2.PredictResponse, "outputs", _DELIMITED)
_MODEL = _tag(predictor_pb2.PredictResponse, "model", _DELIMITED)
_VERSION = _tag(predictor_pb2.PredictResponse, "version", _DELIMITED)
_TIMINGS = _tag(predictor_pb2.PredictResponse, "timings", _DELIMITED)
_QUEUE_US = _tag(predictor_pb2.Timings, "queue_us", _VARINT)
_COMPUTE_US = _tag(predictor_pb2.Timings, "compute_us", _VARINT)
_BATCH_ROWS = _tag(predictor_pb2.Timings, "batch_rows", _VARINT)
_NAME = _tag(tensor_pb2.Tensor, "name", _DELIMITED)
_DATA_TYPE = _tag(tensor_pb2.Tensor, "data_type", _VARINT)
_SHAPE = _tag(tensor_pb2.Tensor, "shape", _DELIMITED)
_DATA = _tag(tensor_pb2.Tensor, "data", _DELIMITED)


class AnswerWriter:
    """Writes the answers to one kind of request: same model, version and outputs. Event loop only.

    Args:
        model: The model's name.
        version: Its version.
        outputs: The outputs wanted: position in the signature, and what the signature says of it.
    """

    def __init__(self, model: str, version: str, outputs: Sequence[tuple[int, TensorSpec]]) -> None:
        self._outputs = [(index, spec, dict[tuple[int, ...], bytes]()) for index, spec in outputs]
        self._names = (_delimited(_MODEL, model.encode()) if model else b"") + (
            _delimited(_VERSION, version.encode()) if version else b""
        )

    def parts(self, answer: Answer) -> list[Part]:
        """The answer as pieces to be joined; outputs are views, valid as long as the answer's own.

        The request's id, if there is one, belongs before the last piece.
        """
        parts: list[Part] = []
        for index, spec, heads in self._outputs:
            output = answer.outputs[index]
            shape = output.shape
            head = heads.get(shape)
            if head is None or output.dtype != spec.dtype:
                head = _head(spec.name, output)
                if output.dtype.kind == "O":
                    data = tensors.pack_strings(output)
                    parts.append(_close(head, data))
                    continue
                head = _close(head, output)
                if len(heads) < _MAX_SHAPES and output.dtype == spec.dtype:
                    heads[shape] = head
            parts.append(head)
            if output.size:
                parts.append(_buffer(output))
        parts.append(self._names)
        timed = (answer.queue_us, answer.compute_us, answer.batch_rows)
        parts.append(_kept.get(timed) or _timings(*timed))
        return parts


def _timings(queue_us: int, compute_us: int, rows: int) -> bytes:
    fields = (
        (_QUEUE_US + varint(queue_us) if queue_us > 0 else b"")
        + (_COMPUTE_US + varint(compute_us) if compute_us else b"")
        + (_BATCH_ROWS + varint(rows) if rows else b"")
    )
    if len(_kept) >= _MAX_KEPT:
        _kept.clear()
    written = _kept[queue_us, compute_us, rows] = _delimited(_TIMINGS, fields)
    return written


def _buffer(output: Array) -> Array:
    """The output as an array that is a plain buffer."""
    if output.dtype.kind == "V":  # bfloat16 is not NumPy's own, and buffers know only NumPy's own types
        output = output.view(np.uint16)
    return output if output.flags.c_contiguous else output.copy()


def _head(name: str, output: Array) -> bytes:
    """A tensor's fields before its data."""
    dims = b"".join(map(varint, output.shape))
    return (
        (_delimited(_NAME, name.encode()) if name else b"")
        + _DATA_TYPE
        + varint(tensors.number_of(output.dtype))
        + (_delimited(_SHAPE, dims) if dims else b"")
    )


def _close(head: bytes, data: bytes | Array) -> bytes:
    """A tensor field up to its elements; with them, where they are bytes already."""
    size = len(data) if isinstance(data, bytes) else data.nbytes
    data_field = _DATA + varint(size)
    field = _OUTPUTS + varint(len(head) + len(data_field) + size) + head + data_field
    return field + data if isinstance(data, bytes) else field
