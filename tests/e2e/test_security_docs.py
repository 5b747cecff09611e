"""The walk through docs/security.md, command by command, as a reader would take it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import yaml
from bench.process import free_port
from tests.e2e.forno_server import ROOT, environment

from forno.server.config import SecuritySettings

DOCUMENT = (ROOT / "docs" / "security.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_walk_works(tmp_path):
    target = f"127.0.0.1:{free_port()}"
    forno = tmp_path / "bin" / "forno"
    forno.parent.mkdir()
    forno.write_text(f'#!/bin/sh\nexec {sys.executable} -m forno.server "$@"\n')
    forno.chmod(0o700)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    variables = {**environment(), "PATH": f"{forno.parent}{os.pathsep}{os.environ['PATH']}"}
    server: subprocess.Popen[bytes] | None = None
    asked = 0
    try:
        for kind, block in BLOCK.findall(DOCUMENT):
            for line in block.splitlines() if kind == "sh" else ():
                command, _, expected = line.replace("127.0.0.1:8080", target).partition("  # ")
                command = command.replace("forno predict", f"forno predict --address {target}")
                command = command.replace("Client(", f'Client("{target}", ').replace(
                    "python -c", f"{sys.executable} -c"
                )
                if command.startswith("forno serve"):
                    if server:
                        server.terminate()
                        server.wait(20)
                    with (tmp_path / "log").open("w") as log:
                        server = subprocess.Popen(
                            ["bash", "-c", f"exec {command} --address {target}"],
                            cwd=tmp_path,
                            env=variables,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    end = time.monotonic() + 20
                    while "Forno serves" not in (tmp_path / "log").read_text():
                        assert time.monotonic() < end, (tmp_path / "log").read_text()
                        time.sleep(0.05)
                    continue
                done = subprocess.run(
                    ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, (command, done.stderr)
                if expected:
                    assert done.stdout.strip() == expected, command
                    asked += 1
    finally:
        if server:
            server.terminate()
            server.wait(20)
    assert asked == 10


def test_the_settings_shown_are_settings():
    shown = [yaml.safe_load(block)["security"] for kind, block in BLOCK.findall(DOCUMENT) if kind == "yaml"]
    assert len(shown) == 4
    for settings in shown:
        SecuritySettings.model_validate(settings)
