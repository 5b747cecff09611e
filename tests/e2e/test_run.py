"""`make run`, whose recipe is this one program: what a newcomer sees first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from bench.process import free_port
from tests.e2e.forno_server import ROOT, FornoServer, environment
from tests.e2e.hosts import eventually

COMMAND = (sys.executable, "tools/run_demo.py")


def test_make_run_is_this_program():
    [recipe] = re.findall(r"^run:.*\n\t@\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe == "python tools/run_demo.py $(ADDRESS)"


def run(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = environment() | variables
    return subprocess.run(
        [*COMMAND, address], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )


def test_the_demo_answers_a_grpc_call_a_text_and_a_picture():
    done = run(f"127.0.0.1:{free_port()}", DEMO_EXIT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("^(gRPC|REST) .*$", done.stdout, re.MULTILINE) == ["gRPC", "REST", "REST"]
    answers = [line.removeprefix("  ->   ") for line in done.stdout.splitlines() if line.startswith("  ->   ")]
    assert answers[1] == "label = [8]"
    assert answers[2].startswith('{"prediction":"spam","confidence":0.9')
    assert answers[3] == '{"prediction":"7","confidence":1.0}'
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["^C", "SIGTERM"])
def test_it_serves_until_it_is_stopped(tmp_path, number):
    port, log = free_port(), tmp_path / "log"
    variables = {name: value for name, value in environment().items() if name != "DEMO_EXIT"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*COMMAND, f"127.0.0.1:{port}"], env=variables, cwd=ROOT, stdout=output, stderr=output
        ) as demo,
    ):
        try:
            eventually(lambda: "until ^C" in log.read_text() or demo.poll() is not None, 30)
            os.kill(demo.pid, number)
            assert demo.wait(20) == 0, log.read_text()
        finally:
            demo.kill()
    assert "Traceback" not in log.read_text()


def test_a_taken_address_is_told():
    with FornoServer(ROOT / "examples" / "models" / "spam") as server:
        done = run(server.target)
    assert done.returncode == 1
    assert done.stderr == f"{server.target} is taken; choose another: make run ADDRESS=127.0.0.1:{server.port + 1}\n"
