"""Writes what is generated from proto/: Python stubs with types, and the transcoder's descriptor set.

Usage: `python tools/generate.py [FOLDER]`. In place by default; into FOLDER, laid out as the repository is,
otherwise. The generator stands in an environment of its own (tools/generator.txt), which `make install` makes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = Path("proto")
DESCRIPTOR_SET = Path("server/forno/server/transport/envoy/forno.pb")
GENERATOR = Path(sys.prefix, "generator")
GENERATOR_PYTHON = GENERATOR / "bin" / "python"
# The include path of google/api and google/rpc as the package index carries them.
GOOGLE_PROTOS = Path(sysconfig.get_path("purelib", vars={"base": str(GENERATOR), "platbase": str(GENERATOR)}))


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
    typed = f"--plugin=protoc-gen-mypy_grpc={GENERATOR_PYTHON.parent / 'protoc-gen-mypy_grpc'}"
    compile_protos([f"--grpc_python_out={python}", typed, f"--mypy_grpc_out=quiet:{python}"], services)
    # The details of errors travel as Any: nothing imports their types, but the transcoder prints them.
    details = GOOGLE_PROTOS / "google/rpc/error_details.proto"
    compile_protos(["--include_imports", f"--descriptor_set_out={descriptors}"], [*services, details])


def compile_protos(options: list[str], files: list[Path], root: Path = ROOT / PROTO) -> None:
    """Runs the protocol buffer compiler on files below `root`.

    Raises:
        SystemExit: It failed, and has said why; or it is not there.
    """
    if not GENERATOR_PYTHON.exists():
        raise SystemExit(f"there is no generator in {GENERATOR}: run `make install`")
    command = [str(GENERATOR_PYTHON), "-m", "grpc_tools.protoc", f"-I{root}", f"-I{GOOGLE_PROTOS}", *options]
    if subprocess.run([*command, *map(str, files)], check=False).returncode:
        raise SystemExit(1)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
