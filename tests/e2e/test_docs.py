"""The documentation's commands and programs, run as a reader would run them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import doc_commands
import pytest
from google.protobuf import json_format
from tests.e2e.forno_server import ROOT, environment

from forno.v1 import predictor_pb2

ADDRESS = "127.0.0.1:8080"  # what the documents say
COMMANDS = [command for document in doc_commands.documents() for command in doc_commands.commands(document)]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GRPCURL = re.compile(r"grpcurl [^\n]*-d '(.*?)'[^/]*(?:forno\.v1\.Predictor/(\w+))", re.DOTALL)
PROGRAMS = [
    pytest.param(block[1], id=f"{document.name}-{number}")
    for document in doc_commands.documents()
    for number, block in enumerate(PYTHON.finditer(document.read_text()))
]
CALLS = [
    pytest.param(found[1], found[2], id=f"{document.name}-{found[2]}")
    for document in doc_commands.documents()
    for found in GRPCURL.finditer(document.read_text())
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("make ")], ids=str)
def test_make_commands_are_targets(command):
    """What they do is tested by doing it: the tests run by `make test`, the demo in test_run.py."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command.text.split()[1] in targets


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text.startswith("curl ")], ids=str)
def test_curl_commands_answer(rest_server, command):
    done = subprocess.run(
        ["bash", "-c", command.text.replace(ADDRESS, rest_server.target)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if not done.stdout.startswith("#"):
        assert "message" not in json.loads(done.stdout), done.stdout


def test_no_command_is_left_out():
    known = ("make ", "curl ", "forno serve examples/forno.yaml")
    assert [str(command) for command in COMMANDS if not command.text.startswith(known)] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_programs_run(server, program):
    done = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.target)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(("body", "method"), CALLS)
def test_grpcurl_bodies_are_requests(body, method):
    """grpcurl itself is not on the package index; what it would send is checked against the contract."""
    request = getattr(predictor_pb2, f"{method}Request")()
    json_format.Parse(body, request)
    assert request.ByteSize()
