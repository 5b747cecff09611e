"""What is called of TensorRT, held against NVIDIA's own bindings and lean runtimes of several releases.

Usage: `make test-tensorrt`. Needs a package index, a C compiler and binutils, and no GPU. Takes uv where it is on PATH,
pip otherwise; each release goes to a folder of its own, which is removed at the end.

Ends with 0 if all agree, 1 if one does not, and 3, with a line that says so, if one cannot be had here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from installer import pip

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/unit/test_tensorrt_api.py"
BINDINGS, LEAN = "test_the_names_are_those_of_the_bindings", "test_the_lean_runtime_has_what_running_needs"
RELEASES = {
    ">=10.13,<10.14": [BINDINGS],  # the oldest that is known; its lean runtime for CUDA 13 is no wheel
    ">=10.14,<11": [BINDINGS, LEAN],
    ">=11,<12": [BINDINGS, LEAN],
}
PACKAGES = {
    BINDINGS: ["tensorrt-cu13-bindings"],
    LEAN: ["tensorrt-lean-cu13-bindings", "tensorrt-lean-cu13-libs"],
}


def install(wanted: list[str], folder: Path) -> str:
    """Installs wheels into a folder, without what they depend on.

    Returns:
        Why they cannot be had, in one line, or nothing.
    """
    options = ["-q", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    done = subprocess.run(pip("install", *options, *wanted), capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else [*lines[-1:], "it does not say why"][0]


def agrees(tests: list[str], folder: Path) -> bool:
    """Whether the tests pass with what is in a folder, none of them skipped; what they say is shown if not."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *[f"{TESTS}::{test}" for test in tests]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = done.returncode == 0 and re.search(rf"^{len(tests)} passed in", done.stdout, re.MULTILINE) is not None
    if not passed:
        print(done.stdout, done.stderr)
    return passed


def main() -> int:
    """Tries each release.

    Returns:
        See the module.
    """
    missing, failed = [], False
    for versions, tests in RELEASES.items():
        wanted = [f"{package}{versions}" for test in tests for package in PACKAGES[test]]
        with tempfile.TemporaryDirectory() as name:
            why = install(wanted, Path(name))
            if why:
                missing.append(f"TensorRT {versions} ({why})")
                continue
            found = sorted([path.name.removesuffix(".dist-info") for path in Path(name).glob("*.dist-info")])
            passed = agrees(tests, Path(name))
            print(f"{', '.join(found)}: {'ok' if passed else 'failed'}", flush=True)
            failed |= not passed
    if missing:
        print(f"test-tensorrt: not looked at, because it cannot be had here: {'; '.join(missing)}")
    return 1 if failed else 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
