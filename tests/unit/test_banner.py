"""What a server prints, and that the calls in it are what they should be."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import json_format

from forno.server import banner
from forno.server.banner import examples
from forno.server.config import EndpointSettings, ModelSettings
from forno.server.signature import Signature, TensorSpec
from forno.v1 import predictor_pb2, tensors

F4, I8, TEXT = np.dtype("f4"), np.dtype("i8"), np.dtype(object)
WIN = "win a free prize now"
LABEL = (TensorSpec("label", I8, (-1,)),)


@dataclass
class Shown:
    name: str
    signature: Signature
    version: str = "1"
    max_rows: int = 32
    example_shapes: tuple[tuple[int, ...], ...] = ()
    engine_name: str = "onnx"
    settings: ModelSettings = field(default_factory=ModelSettings)


def signature(*inputs: TensorSpec, batched: bool = True) -> Signature:
    return Signature(inputs, LABEL, batched)


SPAM = signature(TensorSpec("text", TEXT, (-1,)))
DIGITS = signature(TensorSpec("pixels", F4, (-1, 64)))
SIGNATURES = {
    "text": SPAM,
    "long rows": DIGITS,
    "two inputs": signature(TensorSpec("a", F4, (-1, 2)), TensorSpec("b", I8, (-1, -1))),
    "two long inputs": signature(TensorSpec("a", F4, (-1, 3, 20)), TensorSpec("b", np.dtype(bool), (-1,))),
    "no rows": signature(TensorSpec("it's", F4, (2, 3)), TensorSpec('a "b" $HOME', I8, ()), batched=False),
    "no rows, long": signature(TensorSpec("it's", np.dtype("f2"), (7, 1, 5)), batched=False),
    "long text": signature(TensorSpec("words", TEXT, (-1, 20))),
    "no inputs": signature(batched=False),
}


def body(command: str) -> object:
    """What a shell would send: the argument of -d, or what the command before the pipe prints."""
    first, pipe, rest = command.partition(" | ")
    if not pipe:
        words = shlex.split(command)
        return json.loads(words[words.index("-d") + 1])
    assert shlex.split(rest)[shlex.split(rest).index("-d") + 1] in ("@", "@-")
    words = shlex.split(first)
    assert words[:2] == ["python3", "-c"]
    return json.loads(subprocess.check_output([sys.executable, "-c", words[2]]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_grpcurl_sends_what_the_signature_takes(name):
    takes = SIGNATURES[name]
    command = examples.of_model(examples.Door("127.0.0.1:8080"), "m", takes, rest=True).grpcurl
    assert command.endswith(" 127.0.0.1:8080 forno.v1.Predictor/Predict")
    request = json_format.ParseDict(body(command), predictor_pb2.PredictRequest())
    specs = {spec.name: spec for spec in takes.inputs}
    arrays = {
        tensor.name: tensors.decode(tensor, specs[tensor.name].dtype, specs[tensor.name].shape)
        for tensor in request.inputs
    }
    assert request.model == "m"
    assert takes.validate(takes.arrange(arrays)) == 1


@pytest.mark.parametrize("name", SIGNATURES)
def test_curl_sends_what_the_signature_takes(name):
    takes = SIGNATURES[name]
    command = examples.of_model(examples.Door("127.0.0.1:8080"), "m", takes, rest=True).curl
    assert "http://127.0.0.1:8080/v1/models/m:predict" in shlex.split(command)
    sent = body(command)
    if not takes.batched:
        columns = sent["inputs"]
    elif len(takes.inputs) == 1:
        columns = {takes.inputs[0].name: sent["instances"]}
    else:
        (row,) = sent["instances"]
        columns = {key: [value] for key, value in row.items()}
    arrays = {spec.name: np.array(columns[spec.name], spec.dtype) for spec in takes.inputs}
    assert takes.validate(takes.arrange(arrays)) == 1


@pytest.mark.parametrize("name", SIGNATURES)
def test_python_gives_the_client_what_the_signature_takes(name, monkeypatch):
    takes = SIGNATURES[name]
    calls = []

    class Client:
        def __init__(self, address):
            calls.append(address)

        def predict(self, model, inputs):
            calls.append((model, inputs))
            return SimpleNamespace(outputs={})

    monkeypatch.setattr("forno.client.Client", Client)
    text = examples.of_model(examples.Door("[::1]:80"), "m", takes, rest=False).python
    exec(compile(text, "example", "exec"), {})
    address, (model, inputs) = calls
    assert (address, model) == ("[::1]:80", "m")
    arrays = {spec.name: np.array(inputs[spec.name], spec.dtype) for spec in takes.inputs}
    assert takes.validate(takes.arrange(arrays)) == 1


@pytest.mark.parametrize(
    ("settings", "takes", "expected"),
    [
        ({"codec": "text"}, SPAM, """curl -s http://h:1/v1/a/b -d '{"text": "win a free prize now"}'"""),
        (
            {"codec": "text", "field": "body"},
            SPAM,
            """curl -s http://h:1/v1/a/b -d '{"body": "win a free prize now"}'""",
        ),
        (
            {"codec": "image"},
            DIGITS,
            "curl -s http://h:1/v1/a/b -H 'content-type: image/png' --data-binary @image.png",
        ),
        ({}, SPAM, """curl -s http://h:1/v1/a/b -d '{"instances": ["win a free prize now"]}'"""),
    ],
)
def test_endpoints_are_called_in_the_form_of_their_codec(settings, takes, expected):
    endpoint = EndpointSettings(model="m", input=settings)
    assert examples.of_endpoint(examples.Door("h:1"), "a/b", endpoint, takes) == expected


def test_a_server_on_a_socket_is_called_there():
    calls = examples.of_model(examples.Door("unix:/run/a.sock"), "spam", SPAM, rest=True)
    assert calls.curl.startswith("curl -s --unix-socket /run/a.sock http://localhost/v1/models/spam:predict -d ")
    assert calls.grpcurl.endswith(" -unix /run/a.sock forno.v1.Predictor/Predict")
    assert 'Client("unix:/run/a.sock")' in calls.python


def test_a_server_with_tls_and_credentials_is_called_with_both():
    calls = examples.of_model(examples.Door("h:1", tls=True, credential=True), "spam", SPAM, rest=True)
    show = '-H "authorization: Bearer $FORNO_CREDENTIAL"'
    assert calls.curl.startswith(f"curl -s {show} https://h:1/v1/models/spam:predict -d ")
    assert calls.grpcurl.startswith(f"grpcurl {show} -d ")
    assert "-plaintext" not in calls.grpcurl
    assert calls.python.startswith(
        "import os\nfrom forno.client import Client, Tls\n"
        'client = Client("h:1", credential=os.environ["FORNO_CREDENTIAL"], tls=Tls())\n'
    )


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("[::]:80", "[::1]:80"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("10.0.0.1:80", "10.0.0.1:80"),
        ("[::1]:1", "[::1]:1"),
    ],
)
def test_calls_go_to_an_address_that_can_be_called(address, expected):
    assert examples.reachable(address) == expected


def test_the_banner_tells_what_is_served_and_where():
    endpoint = EndpointSettings(model="spam", input={"codec": "text"})
    text = banner.render(
        "0.0.0.0:8080",
        True,
        [Shown("digits", DIGITS), Shown("spam", SPAM, "3")],
        [SimpleNamespace(name="spam/detect", model_name="spam")],
        settings={"spam/detect": endpoint},
    )
    assert text.splitlines()[1:] == [
        "Forno serves 2 models at 0.0.0.0:8080 (gRPC and REST)",
        "",
        "  digits 1     onnx, batches up to 32 rows",
        "               pixels: float32[?, 64]",
        "               -> label: int64[?]",
        "  spam 3       onnx, batches up to 32 rows",
        "               text: string[?]",
        "               -> label: int64[?]",
        "  spam/detect  endpoint of spam",
        "",
        "Try it:",
        "",
        """curl -s http://127.0.0.1:8080/v1/spam/detect -d '{"text": "win a free prize now"}'""",
        "",
        f"""curl -s http://127.0.0.1:8080/v1/models/spam:predict -d '{{"instances": ["{WIN}"]}}'""",
        "",
        (
            """grpcurl -plaintext -d '{"model": "spam", "inputs": [{"name": "text", "shape": [1], """
            f""""strings": {{"values": ["{WIN}"]}}}}]}}' 127.0.0.1:8080 forno.v1.Predictor/Predict"""
        ),
        "",
        "from forno.client import Client",
        'client = Client("127.0.0.1:8080")',
        'print(client.predict("spam", {"text": ["win a free prize now"]}).outputs)',
    ]


def test_without_rest_there_is_no_curl():
    text = banner.render("h:1", False, [Shown("spam", SPAM)])
    assert "curl -s" not in text
    assert "grpcurl" in text
    assert "at h:1 (gRPC)" in text


def test_nothing_to_serve_is_no_error():
    assert "serves 0 models" in banner.render("h:1", True, [])


def test_colours_are_only_for_terminals():
    assert "\x1b[" not in banner.render("h:1", True, [Shown("spam", SPAM)])
    assert "\x1b[1m" in banner.render("h:1", True, [Shown("spam", SPAM)], colour=True)


def test_progress_is_one_line_a_model():
    waiting = ModelSettings.model_validate({"batching": {"max_delay_us": 500}})
    assert banner.loading("spam", "1") == "loading spam 1 ..."
    assert banner.loaded(Shown("spam", SPAM), 0.214) == "spam 1 ready in 0.21 s (onnx, batches up to 32 rows)"
    assert banner.batching(Shown("spam", SPAM, settings=waiting)) == "batches up to 32 rows or 500 us"
    assert banner.batching(Shown("spam", SPAM, max_rows=1)) == "one request at a time"


def test_open_dimensions_have_sizes_that_have_passed():
    takes = signature(TensorSpec("picture", np.dtype("u1"), (-1, -1, -1)), batched=True)
    command = examples.of_model(examples.Door("h:1"), "m", takes, rest=True, shapes=((1, 2, 3),)).curl
    assert body(command) == {"instances": [[[0, 0, 0], [0, 0, 0]]]}
    told = banner.render("h:1", True, [Shown("m", takes, example_shapes=((1, 2, 3),))])
    assert "[[0, 0, 0], [0, 0, 0]]" in told
