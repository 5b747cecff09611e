"""What calls give: plain values, none of them a protobuf message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.v1 import model_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy as np

    from forno.v1 import predictor_pb2

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Timings:
    """What the time of a request went into, as the server measured it."""

    queue_us: int  # from arrival to the start of its run
    compute_us: int  # the run that its batch shared
    batch_rows: int  # rows of all requests in that run


@dataclass(frozen=True)
class Prediction:
    """The answer of a model."""

    outputs: dict[str, Array]
    model: str
    version: str
    timings: Timings


@dataclass(frozen=True)
class Invocation:
    """The answer of an endpoint."""

    output: Any  # a JSON value, such as {"prediction": "spam", "confidence": 0.97}
    model: str
    version: str
    timings: Timings


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a model."""

    name: str
    data_type: str  # "float32", "string", ...
    shape: tuple[int, ...]  # -1 where any size is accepted
    dim_names: tuple[str, ...] = ()  # the model's own names of its dimensions, "" where it has none

    def __str__(self) -> str:
        dims = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}: {self.data_type}[{dims}]"


@dataclass(frozen=True)
class ModelInfo:
    """One version of a served model."""

    name: str
    version: str
    labels: tuple[str, ...]
    state: str  # "loading", "ready", "draining", "unloaded" or "failed"
    error: str  # why it failed
    engine: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    batched: bool  # rows of different requests may run together
    max_rows: int  # most rows of one run
    tuned_rows: int  # most rows that a run is given now
    endpoints: tuple[str, ...]  # names of the endpoints that answer from it


def timings_of(message: predictor_pb2.Timings) -> Timings:
    """Timings from the wire."""
    return Timings(message.queue_us, message.compute_us, message.batch_rows)


def model_of(message: model_pb2.Model) -> ModelInfo:
    """A model's description from the wire."""
    return ModelInfo(
        message.name,
        message.version,
        tuple(message.labels),
        model_pb2.ModelState.Name(message.state).removeprefix("MODEL_STATE_").lower(),
        message.error,
        message.engine,
        tuple(_tensor_of(spec) for spec in message.inputs),
        tuple(_tensor_of(spec) for spec in message.outputs),
        message.batching.enabled,
        message.batching.max_rows,
        message.batching.tuned_rows,
        tuple(message.endpoints),
    )


def _tensor_of(spec: model_pb2.TensorSpec) -> TensorInfo:
    data_type = tensor_pb2.DataType.Name(spec.data_type).removeprefix("DATA_TYPE_").lower()
    return TensorInfo(spec.name, data_type, tuple(spec.shape), tuple(spec.dim_names))
