"""What is generated is what the .proto files say now."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest

pytestmark = pytest.mark.skipif(not generate.GENERATOR_PYTHON.exists(), reason="no generator (make install)")


def test_generated_code_is_current(root: Path, tmp_path: Path) -> None:
    generate.generate(tmp_path)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    old = [
        str(path)
        for path in made
        if not (root / path).is_file() or (root / path).read_bytes() != (tmp_path / path).read_bytes()
    ]
    assert sorted(old) == [], "run `make proto`"


def test_no_stub_outlives_its_proto(root: Path, tmp_path: Path) -> None:
    generate.generate(tmp_path)
    stubs = {path.relative_to(root) for path in (root / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert sorted(path for path in stubs if not (tmp_path / path).is_file()) == []
