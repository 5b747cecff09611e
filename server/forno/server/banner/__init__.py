"""What a server says of itself: while it starts, and once it is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from forno.server.banner import examples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from forno.server.config import EndpointSettings, ModelSettings
    from forno.server.signature import Signature, TensorSpec

_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


class Served(Protocol):
    """What is told of a model; a `Model` is one."""

    name: str
    version: str
    signature: Signature
    example_shapes: tuple[tuple[int, ...], ...]
    max_rows: int
    settings: ModelSettings

    @property
    def engine_name(self) -> str:
        """The engine that runs it."""


class Named(Protocol):
    """What is told of an endpoint; an `Endpoint` is one."""

    name: str
    model_name: str


def loading(name: str, version: str) -> str:
    """The line for a model whose loading begins."""
    return f"loading {name} {version} ..."


def loaded(model: Served, took_s: float) -> str:
    """The line for a model that is ready, such as "spam 1 ready in 0.21 s (onnx, batches up to 32 rows)"."""
    return f"{model.name} {model.version} ready in {took_s:.2f} s ({model.engine_name}, {batching(model)})"


def batching(model: Served) -> str:
    """How its requests are grouped, in words."""
    if not model.signature.batched or model.max_rows == 1:
        return "one request at a time"
    delay_us = model.settings.batching.max_delay_us
    return f"batches up to {model.max_rows} rows" + (f" or {delay_us} us" if delay_us else "")


def tensors_line(specs: Iterable[TensorSpec]) -> str:
    """Inputs or outputs, such as "pixels: float32[?, 64]"."""
    return ", ".join(f"{spec.name}: {spec}" for spec in specs) or "nothing"


def render(
    address: str,
    rest: bool,
    models: Sequence[Served],
    endpoints: Iterable[Named] = (),
    colour: bool = False,
    settings: Mapping[str, EndpointSettings] | None = None,
    *,
    tls: bool = False,
    credential: bool = False,
) -> str:
    """What is served, where, and calls to try.

    Args:
        address: HOST:PORT, with the port that is listened on.
        rest: Whether REST is served there too.
        models: The models that are ready, in the order to list them.
        endpoints: The named endpoints.
        colour: Whether the text goes to a terminal that shows colours.
        settings: What the configuration says of the endpoints; those in it get a call to try.
        tls: Whether callers must speak TLS.
        credential: Whether callers must show a credential.
    """
    bold, dim, plain = (_BOLD, _DIM, _PLAIN) if colour else ("", "", "")
    count = f"{len(models)} model{'' if len(models) == 1 else 's'}"
    protocols = "gRPC and REST" if rest else "gRPC"
    lines = ["", f"{bold}Forno serves {count} at {address}{plain} ({protocols})", ""]
    names = [f"{model.name} {model.version}" for model in models]
    named = [*endpoints]
    width = max((len(name) for name in (*names, *(endpoint.name for endpoint in named))), default=0)
    for name, model in zip(names, models, strict=True):
        lines += [
            f"  {bold}{name:<{width}}{plain}  {model.engine_name}, {batching(model)}",
            f"  {'':<{width}}  {dim}{tensors_line(model.signature.inputs)}{plain}",
            f"  {'':<{width}}  {dim}-> {tensors_line(model.signature.outputs)}{plain}",
        ]
    lines += [f"  {bold}{item.name:<{width}}{plain}  endpoint of {item.model_name}" for item in named]
    if models:
        calls = _calls(examples.Door(examples.reachable(address), tls, credential), rest, models, settings or {})
        lines += ["", f"{dim}Try it:{plain}", *(line for call in calls for line in ("", call))]
    return "\n".join([*lines, ""])


def _calls(
    door: examples.Door, rest: bool, models: Sequence[Served], endpoints: Mapping[str, EndpointSettings]
) -> Iterator[str]:
    """Calls of each endpoint, and of the model that is easiest to call; not indented, to be copied whole."""
    if rest:
        for name, settings in endpoints.items():
            for model in [model for model in models if model.name == settings.model][:1]:
                yield examples.of_endpoint(door, name, settings, model.signature, model.example_shapes)
    every = [
        examples.of_model(door, model.name, model.signature, rest=rest, shapes=model.example_shapes) for model in models
    ]
    best = min(every, key=lambda example: len(example.grpcurl))
    yield from (call for call in (best.curl, best.grpcurl, best.python) if call)
