"""The C++ that tests compile: libraries that stand in for NVIDIA's, and parts of the native module by themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from forno.kernels import build

NATIVE = Path(__file__).parent / "native"
needs_compiler = pytest.mark.skipif(not build.compiler(), reason="there is no C++ compiler")


def shared_library(target: Path, *sources: Path, options: tuple[str, ...] = ()) -> None:
    """Compiles C++ into a library at `target`; skips the test where there is no compiler."""
    if not build.compiler():
        pytest.skip("there is no C++ compiler")
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC")
    subprocess.run([*build.compiler(), *flags, *map(str, sources), "-o", str(target), *options], check=True)


def fake_driver(folder: Path, more: str = "") -> None:
    """Puts a libcuda.so.1 into a folder: tests/native/fake_driver.cc, and `more` calls, as C++."""
    source = folder / "driver.cc"
    source.write_text(f'#include "{NATIVE / "fake_driver.cc"}"\n{more}')
    options = ("-pthread", "-Wno-unknown-pragmas", f"-I{build.SOURCES}", "-ldl")
    shared_library(folder / "libcuda.so.1", source, options=options)
