"""What the server says of its models: `forno.v1.Model` messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.security import access
from forno.v1 import model_pb2, tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.signature import TensorSpec


def model(model: Model, registry: Registry, endpoints: Iterable[Endpoint]) -> model_pb2.Model:
    """The description of one version of a model; signature and batching only once it has been loaded."""
    message = model_pb2.Model(
        name=model.name,
        version=model.version,
        labels=registry.labels_of(model),
        state=f"MODEL_STATE_{model.state.name}",
        error=model.error,
        engine=model.engine_name,
        endpoints=sorted(
            access.visible("endpoint", (each.name for each in endpoints if each.model_name == model.name))
        ),
    )
    if model.state.name in ("READY", "DRAINING"):
        signature = model.signature
        message.inputs.extend(map(_spec, signature.inputs))
        message.outputs.extend(map(_spec, signature.outputs))
        message.batching.enabled = signature.batched
        message.batching.max_rows = model.max_rows
        statistics = model.statistics()
        message.batching.tuned_rows, message.batching.max_delay_us = statistics.rows_cap, statistics.delay_us
        message.batching.latency_target_ms = model.settings.batching.latency_target_ms
    return message


def _spec(spec: TensorSpec) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(
        name=spec.name,
        data_type=tensors.number_of(spec.dtype),
        shape=spec.shape,
        dim_names=spec.dim_names or [""] * len(spec.shape),
    )
