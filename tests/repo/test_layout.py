"""The tree keeps the rules that ARCHITECTURE.md states."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOTS = ("proto", "server", "kernels", "clients", "clients/python")
MOST_LINES = 400
MOST_TEST_LINES = 500
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
# Written in parts, so that this file does not hold them.
FOREIGN_PATHS = tuple("/" + path for path in ("work/", "tmp/lab", "home/", "root/"))


def test_namespace_folders_hold_no_init(root: Path) -> None:
    # One such file hides every other part of the namespace.
    folders = [root / name for name in ROOTS] + [root / name / "forno" for name in ROOTS]
    assert [folder for folder in folders if (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    "package",
    ["proto/forno/v1", "server/forno/server", "kernels/forno/kernels", "clients/python/forno/client"],
)
def test_package_says_that_it_is_typed(root: Path, package: str) -> None:
    assert (root / package / "py.typed").is_file()


def most(name: str) -> int:
    """Tests may be longer than code: they are read one at a time."""
    return MOST_TEST_LINES if name.startswith("tests/") else MOST_LINES


def test_files_written_by_hand_stay_short(files: list[Path], root: Path) -> None:
    written = [
        path
        for path in files
        if path.suffix in {".py", ".cc", ".cu", ".cuh", ".h", ".proto"} and not path.name.endswith(GENERATED)
    ]
    lengths = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in written}
    assert {name: lines for name, lines in lengths.items() if lines > most(name)} == {}


def test_no_file_names_a_place_on_someones_machine(files: list[Path], root: Path) -> None:
    found = {}
    for path in files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if words := [word for word in FOREIGN_PATHS if word in text]:
            found[str(path.relative_to(root))] = words
    assert found == {}


def test_unit_tests_neither_sleep_nor_open_sockets(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{line}: {what}"
        for path in sorted((root / "tests" / "unit").rglob("*.py"))
        for line, what in _slow_or_outside(ast.parse(path.read_text()))
    ]
    assert found == []


def _slow_or_outside(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(alias.name == "socket" for alias in names):
                found.append((node.lineno, "import socket"))
            case ast.ImportFrom(module="socket"):
                found.append((node.lineno, "from socket import"))
            case ast.ImportFrom(module="time", names=names) if any(alias.name == "sleep" for alias in names):
                found.append((node.lineno, "from time import sleep"))
            case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
                found.append((node.lineno, "time.sleep"))
    return found
