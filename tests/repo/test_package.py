"""What `pip install` gets."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lowest
import pytest

pytest.importorskip("hatchling", reason="the build backend is not installed")


def build(root: Path, target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.iterdir())


def test_wheel_holds_all_that_runs_and_nothing_else(root: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(build(root, "wheel", tmp_path)).namelist()
    assert {
        "forno/v1/predictor.proto",
        "forno/v1/predictor_pb2.pyi",
        "forno/v1/py.typed",
        "forno/server/__init__.py",
        "forno/server/transport/envoy/forno.pb",
        "forno/kernels/__init__.py",
        "forno/kernels/source/common.cuh",
        "forno/kernels/source/cpu.h",
        "forno/kernels/source/forno.cu",
        "forno/client/py.typed",
    } <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"forno"}
    assert "forno/__init__.py" not in names


def test_wheel_with_the_native_module_is_for_this_platform_only(root: Path, tmp_path: Path) -> None:
    wheel = build(root, "wheel", tmp_path)
    native = "forno/server/transport/envoy/_native.so" in zipfile.ZipFile(wheel).namelist()
    assert native == (not wheel.name.endswith("-py3-none-any.whl"))


def test_source_archive_builds_from_itself(root: Path, tmp_path: Path) -> None:
    with tarfile.open(build(root, "sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"hatch_build.py", "tools/build_kernels.py", "tools/build_native.py", "pyproject.toml", "LICENSE"} <= names
    assert [name for name in names if name.endswith(".so")] == []


def test_stubs_are_of_the_oldest_grpcio_that_may_be_installed(root: Path) -> None:
    # They refuse to be imported with an older one.
    generator = re.search(r"^grpcio-tools==([\d.]+)", (root / "tools" / "generator.txt").read_text(), re.MULTILINE)
    assert generator is not None
    stubs = [path.read_text() for path in (root / "proto").rglob("*_pb2_grpc.py")]
    assert {version for text in stubs for version in re.findall(r"VERSION = '([\d.]+)'", text)} == {generator[1]}
    assert f"grpcio=={generator[1]}" in lowest.constraints()
