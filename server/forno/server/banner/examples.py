"""Ready-to-paste calls of a model, with its real input names and values that fit its signature.

The values are zeros and a short text: they show the form of a call, not what a model is good at. Where there
are too many to read, a line of Python makes the body.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.address import UNIX
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.config import EndpointSettings
    from forno.server.signature import Signature, TensorSpec

CREDENTIAL = "FORNO_CREDENTIAL"
TEXT = "win a free prize now"
_MOST_WRITTEN_OUT = 16
_ELEMENTS: dict[str, Any] = {"O": TEXT, "b": False, "i": 0, "u": 0}  # by kind of dtype; others are 0.0
_ARMS = {row.name: row.typed for row in tensors.TABLE}


@dataclass(frozen=True)
class Door:
    """How callers come in."""

    address: str
    """HOST:PORT that a caller can reach, or unix:PATH."""
    tls: bool = False
    """Whether the connection is encrypted."""
    credential: bool = False
    """Whether callers show one; the calls take it from the environment, as `forno predict` does."""

    def curl(self, path: str) -> str:
        """The beginning of a call of that path."""
        scheme = "https" if self.tls else "http"
        show = f' -H "authorization: Bearer ${CREDENTIAL}"' if self.credential else ""
        if self.address.startswith(UNIX):
            socket = shlex.quote(self.address.removeprefix(UNIX))
            return f"curl -s{show} --unix-socket {socket} {shlex.quote(f'{scheme}://localhost/v1/{path}')}"
        return f"curl -s{show} {shlex.quote(f'{scheme}://{self.address}/v1/{path}')}"

    def grpcurl(self, data: str) -> str:
        """A whole call of Predict."""
        options = "" if self.tls else " -plaintext"
        if self.credential:
            options += f' -H "authorization: Bearer ${CREDENTIAL}"'
        to = shlex.quote(self.address)
        if self.address.startswith(UNIX):
            to = f"-unix {shlex.quote(self.address.removeprefix(UNIX))}"
        return f"grpcurl{options} -d {data} {to} forno.v1.Predictor/Predict"

    def python(self) -> str:
        """What makes a client."""
        imports, arguments = "", _source(self.address)
        if self.credential:
            imports, arguments = "import os\n", f'{arguments}, credential=os.environ["{CREDENTIAL}"]'
        names = "Client"
        if self.tls:
            names, arguments = "Client, Tls", f"{arguments}, tls=Tls()"
        return f"{imports}from forno.client import {names}\nclient = Client({arguments})\n"


@dataclass(frozen=True)
class Examples:
    """One call, three ways: two for a shell, one for Python."""

    curl: str  # empty where there is no REST
    grpcurl: str
    python: str


@dataclass(frozen=True)
class _Fill:
    """Nested lists of one element, not written out yet."""

    element: Any
    shape: tuple[int, ...]

    def lists(self) -> Any:
        """The lists themselves."""
        value = self.element
        for size in reversed(self.shape):
            value = [value] * size
        return value

    def source(self) -> str:
        """Python for them, such as `[[0.0] * 64]`."""
        text = _source(self.element)
        for size in reversed(self.shape):
            text = f"[{text}]" if size == 1 else f"[{text}] * {size}"
        return text


def of_model(
    door: Door, name: str, signature: Signature, *, rest: bool, shapes: Sequence[tuple[int, ...]] = ()
) -> Examples:
    """Calls of one model.

    Args:
        door: How callers come in.
        name: The model's name.
        signature: What it takes.
        rest: Whether REST is served.
        shapes: Of one row of each input, known to pass; empty where none are.
    """
    fills = _fills(signature, shapes)
    long = _is_long(fills)
    message = {
        "model": name,
        "inputs": [_tensor(spec, fills[spec.name]) for spec in signature.inputs],
    }
    return Examples(
        _curl(door, f"models/{name}:predict", _rest(signature, fills), long=long) if rest else "",
        _piped(message, door.grpcurl("@")) if long else door.grpcurl(shlex.quote(_json(message))),
        f"{door.python()}print(client.predict({_source(name)}, {_source(fills)}).outputs)",
    )


def of_endpoint(
    door: Door, name: str, settings: EndpointSettings, signature: Signature, shapes: Sequence[tuple[int, ...]] = ()
) -> str:
    """A call with curl of an endpoint, in the form that its input codec reads."""
    match settings.input.get("codec", "tensors"):
        case "text":
            return _curl(door, name, {settings.input.get("field", "text"): TEXT}, long=False)
        case "image":
            return f"{door.curl(name)} -H 'content-type: image/png' --data-binary @image.png"
        case _:
            fills = _fills(signature, shapes)
            return _curl(door, name, _rest(signature, fills), long=_is_long(fills))


def reachable(address: str) -> str:
    """The address by which this machine is called where the server listens on all of its addresses."""
    if address.startswith(UNIX):
        return address
    host, _, port = address.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104


def _fills(signature: Signature, shapes: Sequence[tuple[int, ...]]) -> dict[str, _Fill]:
    """One row for each input; a dimension of any size is 1 where no shape is known to pass."""
    ones = [tuple(1 if size < 0 else size for size in spec.shape) for spec in signature.inputs]
    return {
        spec.name: _Fill(_ELEMENTS.get(spec.dtype.kind, 0.0), shape)
        for spec, shape in zip(signature.inputs, shapes or ones, strict=True)
    }


def _is_long(fills: dict[str, _Fill]) -> bool:
    return sum(math.prod(fill.shape) for fill in fills.values()) > _MOST_WRITTEN_OUT


def _rest(signature: Signature, fills: dict[str, _Fill]) -> Any:
    """Rows where the model has them, columns otherwise."""
    if not signature.batched:
        return {"inputs": fills}
    rows = {name: _Fill(fill.element, fill.shape[1:]) for name, fill in fills.items()}
    return {"instances": [rows if len(rows) > 1 else next(iter(rows.values()))]}


def _tensor(spec: TensorSpec, fill: _Fill) -> dict[str, Any]:
    values = {"values": _Fill(fill.element, (math.prod(fill.shape),))}
    shape = {"shape": [*fill.shape]} if fill.shape else {}
    return {"name": spec.name, **shape, _ARMS[tensors.name_of(spec.dtype)]: values}


def _curl(door: Door, path: str, body: Any, *, long: bool) -> str:
    call = door.curl(path)
    return _piped(body, f"{call} -d @-") if long else f"{call} -d {shlex.quote(_json(body))}"


def _piped(body: Any, command: str) -> str:
    return f"python3 -c {shlex.quote(f'import json; print(json.dumps({_source(body)}))')} | {command}"


def _json(body: Any) -> str:
    return json.dumps(body, default=_Fill.lists, ensure_ascii=False)


def _source(body: Any) -> str:
    """Python for a value; texts in double quotes, so that it stands in a shell's single ones unchanged."""
    match body:
        case _Fill():
            return body.source()
        case dict():
            return f"{{{', '.join(f'{_source(key)}: {_source(value)}' for key, value in body.items())}}}"
        case list():
            return f"[{', '.join(_source(value) for value in body)}]"
        case str():
            return json.dumps(body, ensure_ascii=False)
        case _:
            return repr(body)
