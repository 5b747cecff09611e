"""Forno's entries for a harness that measures several model servers side by side.

The harness merges `PEERS` into its own list (`PEERS_EXTRA=bench/peers_entry.py`) and gives each entry the
model files, a port and a folder. This file stands alone: it runs in the harness's environment, where Forno is
not installed. Options are those the harness gives every server: batches of up to 32 rows, one thread for a
run (two for resnet50), no spinning.

Environment: FORNO_PYTHON = the interpreter that has Forno's dependencies; unset = the checkout's `.venv`.
PEERS_WORK = where the harness keeps its files; models are in its folder `models`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Array = np.ndarray[Any, np.dtype[Any]]
    Start = Callable[[str, int, str], tuple[list[str], dict[str, str]]]
    Codec = tuple[list[str], Callable[[Array], bytes], Callable[[bytes], Array]]

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("proto", "server", "kernels", "clients/python")
THREADS = {"resnet50": 2}
FLOAT32 = 12  # forno.v1.DataType
VARINT, FIXED64, DELIMITED = 0, 1, 2


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _delimited(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | DELIMITED) + _varint(len(data)) + data


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The delimited fields of a message."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == VARINT:
            _, at = _read_varint(data, at)
        elif kind == DELIMITED:
            length, at = _read_varint(data, at)
            yield key >> 3, data[at : at + length]
            at += length
        else:
            at += 8 if kind == FIXED64 else 4


def _first(data: bytes, field: int) -> bytes:
    for number, value in _fields(data):
        if number == field:
            return value
    raise ValueError(f"the answer has no field {field}: {data[:100]!r}")


def _request(model: str, x: Array) -> bytes:
    """A forno.v1.PredictRequest with one tensor `x`."""
    shape = b"".join(_varint(size) for size in x.shape)
    head = _delimited(1, b"x") + _varint(2 << 3 | VARINT) + _varint(FLOAT32) + _delimited(3, shape)
    return _delimited(1, model.encode()) + _delimited(4, head + _delimited(4, x.tobytes()))


def _response(data: bytes) -> Array:
    """The first output of a forno.v1.PredictResponse."""
    return np.frombuffer(_first(_first(data, 1), 4), np.float32)


def predict_codec(model: str) -> Codec:
    """gRPC: raw tensors in both directions."""
    return [], lambda x: _request(model, x), _response


def rest_codec(_model: str) -> Codec:
    """REST: rows as JSON numbers, six decimals as every JSON server of the harness gets them."""

    def encode(x: Array) -> bytes:
        return json.dumps({"instances": [[round(float(value), 6) for value in row.ravel()] for row in x]}).encode()

    def decode(data: bytes) -> Array:
        return np.array(json.loads(data)["predictions"], np.float32).ravel()

    return ["content-type: application/json"], encode, decode


def forno(transport: str, engine: str = "onnx") -> Start:
    """How the server is started: a generated forno.yaml with the one model, and a transport."""

    def start(model: str, port: int, run_dir: str) -> tuple[list[str], dict[str, str]]:
        settings: dict[str, object] = {"engine": engine}  # batches of up to 32 rows, tuned
        if engine == "onnx":
            settings["path"] = str(Path(os.environ["PEERS_WORK"]).resolve() / "models" / f"{model}.onnx")
            settings["onnx"] = {"intra_op_threads": THREADS.get(model, 1), "spin": False}
        config = Path(run_dir) / "forno.yaml"
        config.write_text(json.dumps({"models": {model: settings}}))
        python = os.environ.get("FORNO_PYTHON") or str(ROOT / ".venv" / "bin" / "python")
        argv = [python, "-m", "forno.server", "serve", str(config)]
        argv += ["--address", f"127.0.0.1:{port}", "--transport", transport]
        # Like the other servers, which are installed, this one may keep its bytecode.
        path = os.pathsep.join(str(ROOT / source) for source in SOURCES)
        return argv, {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}

    return start


def stream_codec(model: str) -> Codec:
    """Items of PredictStream: a request, or a response, in field 1 or 2 of a message of its own."""
    headers, encode, decode = predict_codec(model)

    def encode_item(x: Array) -> bytes:
        return _delimited(1, encode(x))

    def decode_item(data: bytes) -> Array:
        return decode(next(value for field, value in _fields(data) if field == 2))

    return headers, encode_item, decode_item


GRPC = {"proto": "grpc", "path": "/forno.v1.Predictor/Predict", "codec": predict_codec}

PEERS: dict[str, dict[str, object]] = {
    "forno": {**GRPC, "start": forno("envoy")},
    "forno-stream": {
        "proto": "stream",
        "path": "/forno.v1.Predictor/PredictStream",
        "codec": stream_codec,
        "start": forno("envoy"),
    },
    "forno-grpc": {**GRPC, "start": forno("grpc")},
    "forno-proxy": {**GRPC, "start": forno("proxy")},
    "forno-rest": {
        "proto": "h1",
        "path": "/v1/models/{model}:predict",
        "codec": rest_codec,
        "models": ("tiny",),
        "start": forno("envoy"),
    },
    # answers its input: what all but the model costs
    "forno-null": {**GRPC, "models": ("tiny",), "novalidate": True, "start": forno("envoy", "null")},
}
