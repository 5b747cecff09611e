"""Every element of the contract carries a comment."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest
from google.protobuf import descriptor_pb2

# Numbers of the fields of descriptor.proto that hold what must be commented, by the message they stand in.
FILE = {4: "message", 5: "enum", 6: "service"}
MESSAGE = {2: "field", 3: "message", 4: "enum", 8: "oneof"}
ENUM = {2: "value"}
SERVICE = {2: "method"}
INSIDE = {"message": MESSAGE, "enum": ENUM, "service": SERVICE}


@pytest.mark.skipif(not generate.GENERATOR_PYTHON.exists(), reason="no generator (make install)")
def test_every_element_has_a_comment(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "contract.pb"
    protos = sorted((root / "proto").rglob("*.proto"))
    generate.compile_protos(["--include_source_info", f"--descriptor_set_out={target}"], protos)
    contract = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())
    assert len(contract.file) == len(protos)
    assert [where for file in contract.file for where in _bare(file)] == []


def _bare(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Places of elements without a comment, as "file:line: kind"."""
    found = []
    for location in file.source_code_info.location:
        kind = _kind(list(location.path))
        if kind and not (location.leading_comments.strip() or location.trailing_comments.strip()):
            found.append(f"{file.name}:{location.span[0] + 1}: {kind}")
    return found


def _kind(path: list[int]) -> str:
    """What stands at a path of (field number, index) pairs; empty for what needs no comment."""
    if len(path) % 2:
        return ""
    kind, table = "", FILE
    for number in path[::2]:
        if number not in table:
            return ""
        kind = table[number]
        table = INSIDE.get(kind, {})
    return kind
