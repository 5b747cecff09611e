"""What is called of TensorRT is there: the fake's names against NVIDIA's own bindings.

The bindings (`tensorrt-cu13-bindings`, 1 MB) say all names; of the library below them, gigabytes, they need a dozen
functions to be imported, which stand here empty. Where the lean runtime is installed, its names are looked at too.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.compiling import shared_library
from tests.unit import plans

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASK = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
names = {}
for line in sys.stdin:
    kind, _, member = line.strip().partition(".")
    value = getattr(module, kind, None)
    value = getattr(value, member, None) if member and value is not None else value
    names[line.strip()] = None if value is None else str(getattr(value, "__doc__", "") or "")
print(json.dumps({"version": module.__version__, "names": names}))
"""
_RUNS = {"DataType", "ExecutionContextAllocationStrategy", "ICudaEngine", "IExecutionContext", "ILogger",
         "IOutputAllocator", "Runtime", "TensorIOMode", "TensorLocation"}  # fmt: skip
_OURS = {"ICudaEngine.take", "ILogger.tell"}  # the fake's own
_MADE = {"Builder", "OnnxParser", "OnnxParserRefitter", "Refitter", "Runtime"}  # by whoever uses TensorRT


def stubs(bindings: Path, folder: Path) -> None:
    """Libraries that have what the bindings are linked against, and do nothing."""
    told = subprocess.run(["readelf", "-d", bindings], capture_output=True, text=True, check=True).stdout
    wanted = subprocess.run(["nm", "-D", "--undefined-only", bindings], capture_output=True, text=True, check=True)
    calls = re.findall(r" U ((?:create|get|init)[A-Z]\w*)$", wanted.stdout, re.MULTILINE)
    source = folder / "stub.cc"
    source.write_text("".join(f'extern "C" void *{call}() {{ return 0; }}\n' for call in calls))
    for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", told):
        shared_library(folder / library, source)


def answers(module: str, names: list[str], path: Path | None) -> dict[str, Any]:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    environment = {**os.environ, "PYTHONPATH": str(Path(found.origin).parents[1])}
    environment |= {"LD_LIBRARY_PATH": str(path)} if path else {}
    command = [sys.executable, "-c", _ASK, module]
    asked = "\n".join(names)
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake, of the release whose bindings are there."""
    releases = [each.version for each in distributions() if each.name.replace("-", "_") == "tensorrt_cu13_bindings"]
    yield plans.installed(monkeypatch, version=(releases or ["11.4.0.106"])[0])
    plans.uninstalled()


def members(module: Any, kinds: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Every name of the fake's interface, and what stands there."""
    for kind, value in vars(module).items():
        if kind.startswith("_") or not isinstance(value, type) or kind in ("Any", "Anything", "Enum", "Undefined"):
            continue
        if kinds is not None and kind not in kinds:
            continue
        yield kind, value
        for name, member in {**vars(value), **vars(value).get("__annotations__", {})}.items():
            called = not name.startswith("_") or (name == "__init__" and kind in _MADE)
            if called and f"{kind}.{name}" not in _OURS:
                yield f"{kind}.{name}", member


def compare(module: Any, answer: dict[str, Any], kinds: set[str] | None = None) -> None:
    for name, member in members(module, kinds):
        documented = answer["names"][name]
        assert documented is not None, f"TensorRT {answer['version']} has no {name}"
        if inspect.isfunction(member) and "->" in documented:
            ours = [each for each in inspect.signature(member).parameters if each != "self"]
            signatures = re.findall(r"\w+\((self.*)\) ->", documented)
            theirs = [re.findall(r"(?:^|, )(\w+): ", signature)[1:] for signature in signatures]
            assert ours in theirs, f"{name}{ours} is called, and TensorRT {answer['version']} has {theirs}"


def test_the_names_are_those_of_the_bindings(fake: Any, tmp_path: Path) -> None:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or not shutil.which("readelf"):
        pytest.skip("TensorRT's bindings or binutils are missing")
    assert found.origin is not None
    stubs(Path(found.origin).parent / "tensorrt.so", tmp_path)
    names = [name for name, _ in members(fake)]
    assert len(names) > 60
    answer = answers("tensorrt_bindings", names, tmp_path)
    compare(fake, answer)


def test_the_lean_runtime_has_what_running_needs(fake: Any) -> None:
    if not all(map(importlib.util.find_spec, ("tensorrt_lean_bindings", "tensorrt_lean_libs"))):
        pytest.skip("the lean runtime is missing: pip install tensorrt-lean-cu13-libs tensorrt-lean-cu13-bindings")
    answer = answers("tensorrt_lean_bindings", [name for name, _ in members(fake, _RUNS)], None)
    compare(fake, answer, _RUNS)
