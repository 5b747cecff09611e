"""Writes what is generated from proto/: Python stubs with types, and the transcoder's descriptor set.

Usage: `python tools/generate.py [FOLDER]`. In place by default; into FOLDER, laid out as the repository is,
otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = Path("proto")
DESCRIPTOR_SET = Path("server/forno/server/transport/envoy/forno.pb")


def google_protos() -> str:
    """The include path of google/api, google/rpc and google/protobuf as the package index carries them."""
    import google.api  # noqa: PLC0415  (present only where the generator is)

    return str(Path(next(iter(google.api.__path__))).parent.parent)


def generate(target: Path) -> None:
    """Generates everything below `target`.

    Raises:
        SystemExit: A .proto file is wrong; the compiler has said where.
    """
    messages = sorted((ROOT / PROTO).rglob("*.proto"))
    services = [path for path in messages if "\nservice " in path.read_text()]
    python = target / PROTO
    descriptors = target / DESCRIPTOR_SET
    for folder in (python, descriptors.parent):
        folder.mkdir(parents=True, exist_ok=True)
    compile_protos([f"--python_out={python}", f"--pyi_out={python}"], messages)
    typed = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    compile_protos([f"--grpc_python_out={python}", typed, f"--mypy_grpc_out=quiet:{python}"], services)
    # The details of errors travel as Any: nothing imports their types, but the transcoder prints them.
    details = Path(google_protos(), "google/rpc/error_details.proto")
    compile_protos(["--include_imports", f"--descriptor_set_out={descriptors}"], [*services, details])


def compile_protos(options: list[str], files: list[Path], root: Path = ROOT / PROTO) -> None:
    """Runs the protocol buffer compiler on files below `root`.

    Raises:
        SystemExit: It failed; it has said why.
    """
    from grpc_tools import protoc  # noqa: PLC0415  (a development tool; its absence is reported, not an import error)

    includes = [f"-I{root}", f"-I{google_protos()}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    if protoc.main(["protoc", *includes, *options, *map(str, files)]):
        raise SystemExit(1)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
