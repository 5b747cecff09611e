"""The native module's streams, without Envoy and under the sanitizers: see tests/native/stream_test.cc."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import build_native
import pytest

ROOT = Path(__file__).parents[2]


def sanitize(sanitizers: str, calls: int) -> str:
    """Runs tools/sanitize.sh; skips the test where the sanitizer, or any compiler, is missing."""
    compiler = build_native.system_compiler()
    if not compiler:
        pytest.skip("no C++ compiler")
    flags = [] if sanitizers == "none" else [f"-fsanitize={sanitizers}"]
    probe = [*compiler, *flags, "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input=b"int main() {}", capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(compiler)} has no -fsanitize={sanitizers}")
    done = subprocess.run(
        [ROOT / "tools" / "sanitize.sh", str(calls)],
        env={**os.environ, "SANITIZERS": sanitizers, "CXX": " ".join(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("sanitizers", ["address", "thread"])
def test_streams_answer_every_call_whatever_the_order_of_events(sanitizers):
    assert "5000 calls" in sanitize(sanitizers, 5000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizers", ["none", "address,undefined", "thread"])
def test_streams_answer_half_a_million_calls(sanitizers):
    assert "500000 calls" in sanitize(sanitizers, 500_000)
