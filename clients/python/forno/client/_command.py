"""`forno predict`: one call from the shell."""

from __future__ import annotations

import base64
import json
import math
import mimetypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.client._client import Client
from forno.client._connect import Tls
from forno.client._errors import InvalidArgument, RequestError
from forno.client._inputs import random_array, to_array

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping

    from forno.client._values import Invocation, ModelInfo, Prediction, TensorInfo

    Array = np.ndarray[Any, np.dtype[Any]]

DESCRIPTION = "Calls a running server once, over gRPC, and prints the answer."
EPILOG = """\
values:
  NAME=VALUE        JSON such as 3 or [[1, 2]], or the text itself where the model takes text
  NAME=@FILE        a .npy file, a .txt file that is one text, or any other as JSON
  NAME=@-           JSON from standard input
  Leading dimensions of one may be left out.

examples:
  forno predict spam text="win cash"
  forno predict digits pixels=@digit.npy --output label
  forno predict tiny --random --rows 8
  forno predict --endpoint spam/detect '{"text": "win cash"}'
  forno predict --endpoint digits/classify @digit.png
  FORNO_CREDENTIAL=$(cat web.key) forno predict spam text="win cash" --ca-file ca.pem

exit status: 0 answered, 1 the call failed, 2 the call could not be made of what was given"""
_FAILED, _USAGE = 1, 2
_MOST_SHOWN = 64  # elements of an output that are printed in full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="the model's name")
    parser.add_argument("inputs", nargs="*", metavar="NAME=VALUE", help="an input by name; see below")
    parser.add_argument("--endpoint", metavar="NAME", help="call this endpoint with JSON or @FILE, not a model")
    parser.add_argument(
        "--address", default="127.0.0.1:8080", metavar="HOST:PORT", help="the server (default 127.0.0.1:8080)"
    )
    parser.add_argument("--tls", action="store_true", help="the server speaks TLS")
    parser.add_argument("--ca-file", metavar="FILE", help="authorities whose servers are believed, PEM; means --tls")
    parser.add_argument("--certificate-file", metavar="FILE", help="a client certificate to show, PEM; means --tls")
    parser.add_argument("--key-file", metavar="FILE", help="its private key, PEM")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", default="", metavar="VERSION", help="the version that answers")
    which.add_argument("--label", default="", metavar="LABEL", help="the label whose version answers")
    parser.add_argument("--output", action="append", default=[], metavar="NAME", help="an output wanted (all)")
    parser.add_argument("--random", action="store_true", help="make up the inputs that are not given")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows to make up (default 1)")
    parser.add_argument("--timeout-s", type=float, default=60.0, metavar="S", help="seconds to wait (60)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _connect(arguments: argparse.Namespace) -> Client:
    tls = None
    if arguments.tls or arguments.ca_file or arguments.certificate_file:
        tls = Tls(arguments.ca_file, arguments.certificate_file, arguments.key_file)
    credential = os.environ.get("FORNO_CREDENTIAL", "")  # an argument would be seen by every process
    return Client(arguments.address, timeout_s=arguments.timeout_s, credential=credential, tls=tls)


def run(arguments: argparse.Namespace) -> int:
    """Makes the call and prints its answer."""
    try:
        with _connect(arguments) as client:
            if arguments.endpoint:
                _print_lines(_invoke(client, arguments))
            else:
                _print_lines(_predict(client, arguments))
    except InvalidArgument as error:
        return _fail(error, _FAILED if error.code else _USAGE)
    except RequestError as error:
        return _fail(error, _FAILED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", _USAGE)
    return 0


def _predict(client: Client, arguments: argparse.Namespace) -> Iterable[str]:
    if not arguments.model:
        raise InvalidArgument("no MODEL given; expected `forno predict MODEL NAME=VALUE...` or `--endpoint NAME`")
    model = client.model(arguments.model, version=arguments.version, label=arguments.label)
    inputs = _inputs(model, arguments)
    prediction = client.predict(
        arguments.model, inputs, version=arguments.version, label=arguments.label, outputs=arguments.output
    )
    return [_json(_prediction_json(prediction))] if arguments.json else _prediction_text(prediction)


def _invoke(client: Client, arguments: argparse.Namespace) -> Iterable[str]:
    bodies = [body for body in (arguments.model, *arguments.inputs) if body]
    if len(bodies) != 1:
        raise InvalidArgument(f"{len(bodies)} bodies given; expected one: JSON, @FILE, or @- for standard input")
    body = bodies[0]
    if body.startswith("@") and body != "@-":
        content_type = mimetypes.guess_type(body)[0] or "application/octet-stream"
        data = Path(body[1:]).read_bytes()
        answer = client.invoke(arguments.endpoint, data=data, content_type=content_type)
    else:
        answer = client.invoke(arguments.endpoint, _parse(_stdin() if body == "@-" else body, "the body"))
    return [_json(_invocation_json(answer) if arguments.json else answer.output)]


def _inputs(model: ModelInfo, arguments: argparse.Namespace) -> dict[str, Array]:
    """The arrays that the command line describes, by the model's own account of its inputs."""
    specs = {spec.name: spec for spec in model.inputs}
    takes = ", ".join(map(str, model.inputs)) or "nothing"
    arrays: dict[str, Array] = {}
    for argument in arguments.inputs:
        name, equals, text = argument.partition("=")
        if not equals:
            raise InvalidArgument(f"{argument!r} given; expected NAME=VALUE. {model.name} takes {takes}")
        if name not in specs:
            raise InvalidArgument(f"input {name!r} is unknown; {model.name} takes {takes}")
        arrays[name] = to_array(specs[name], _value(specs[name], text))
    missing = [spec for spec in model.inputs if spec.name not in arrays]
    if missing and not arguments.random:
        names = ", ".join(spec.name for spec in missing)
        raise InvalidArgument(f"no value for {names}; {model.name} takes {takes}. To make them up: --random")
    generator = np.random.default_rng()
    return {**arrays, **{spec.name: random_array(spec, arguments.rows, generator) for spec in missing}}


def _value(spec: TensorInfo, text: str) -> Any:
    if text == "@-":
        return _parse(_stdin(), f"standard input for {spec.name}")
    if text.startswith("@"):
        file = Path(text[1:])
        if file.suffix == ".npy":
            try:
                return np.load(file, allow_pickle=False)
            except ValueError as error:
                raise InvalidArgument(f"{file}: is not an array that can be read: {error}") from error
        if file.suffix == ".txt" and spec.data_type == "string":
            return file.read_text()
        return _parse(file.read_text(), str(file))
    if spec.data_type == "string" and not text.startswith("["):
        return text
    return _parse(text, f"the value of {spec.name}")


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise InvalidArgument(f"{what} is not JSON: {error}: {shown}") from error


def _stdin() -> str:
    return sys.stdin.read()


def _prediction_text(prediction: Prediction) -> Iterable[str]:
    timings = prediction.timings
    rows = f"{timings.batch_rows} row{'' if timings.batch_rows == 1 else 's'}"
    yield (
        f"{prediction.model} {prediction.version} "
        f"(waited {timings.queue_us / 1000:.2f} ms, ran {timings.compute_us / 1000:.2f} ms, batch of {rows})"
    )
    for name, array in prediction.outputs.items():
        shape = ", ".join(map(str, array.shape))
        kind = "string" if array.dtype == object else array.dtype.name
        values = np.array2string(array, threshold=_MOST_SHOWN, precision=6, suppress_small=True, separator=", ")
        yield f"{name}: {kind}[{shape}] = {values}"


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "model": prediction.model,
        "version": prediction.version,
        "outputs": {name: _plain(array.tolist()) for name, array in prediction.outputs.items()},
        "timings": vars(prediction.timings),
    }


def _invocation_json(answer: Invocation) -> Mapping[str, Any]:
    return {**vars(answer), "timings": vars(answer.timings)}


def _plain(value: Any) -> Any:
    """JSON has no bytes, NaN or infinities; they are written as the server's REST does."""
    match value:
        case list():
            return [_plain(item) for item in value]
        case bytes():
            return {"b64": base64.b64encode(value).decode()}
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case _:
            return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _print_lines(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def _fail(error: object, status: int) -> int:
    sys.stderr.write(f"forno: {error}\n")
    return status
