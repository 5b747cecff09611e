"""Builds the kernels for a device, from the sources that ship with the package, and keeps what was built.

For a GPU that is NVRTC's work, which needs no GPU and takes about a second, unless the package brings them built; for
the CPU, that of a C++ compiler. Built kernels are kept in a folder of the user's cache under a name that says all they
depend on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from forno.kernels.devices import DeviceUnavailable

log = logging.getLogger("forno.kernels")

SOURCES = Path(__file__).parent / "source"
MAIN = "forno.cu"
PREBUILT = Path(__file__).parent / "_kernels.fatbin"
"""For many GPUs in one file; in packages that were built where there was nvcc."""
PREBUILT_FOR = Path(__file__).parent / "_kernels.for"  # the sources that it was built from
_SUFFIXES = {".cu", ".cuh", ".h"}
_CPU_OPTIONS = (
    "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas", "-x", "c++",
)  # fmt: skip
_GPU_OPTIONS = ("--std=c++17", f"--include-path={SOURCES}")
_COMPILERS = ("c++", "g++", "clang++")


class BuildFailed(Exception):
    """The compiler refused the kernels; the text is what it said."""


def kernels_for(architecture: str, cache: Path | None = None) -> bytes:
    """The kernels as `Device.load_module` takes them. Blocks; any thread.

    Args:
        architecture: `Device.architecture`: "cpu", or "sm_90" and the like.
        cache: Folder where they are kept; the user's own by default.

    Raises:
        DeviceUnavailable: There is nothing to build them with; the text says what to install.
        BuildFailed: The compiler refused them.
    """
    if architecture != "cpu" and (ready := prebuilt()) is not None:
        return ready
    build, builder = (_built_for_cpu, _cpu_builder()) if architecture == "cpu" else (_built_for_gpu, _gpu_builder())
    folder = cache or default_cache()
    file = folder / f"{architecture}-{_fingerprint(builder)}"
    try:
        return file.read_bytes()
    except OSError:
        binary = build(architecture)
    try:
        _keep(file, binary)
    except OSError as error:
        log.warning("kernels are built anew at every start, since they cannot be kept in %s: %s", folder, error)
    return binary


def prebuilt() -> bytes | None:
    """The kernels for many GPUs, if this package has them and they are of the sources as they are."""
    try:
        return PREBUILT.read_bytes() if PREBUILT_FOR.read_text() == prebuilt_fingerprint() else None
    except OSError:
        return None


def prebuilt_fingerprint() -> str:
    """Says from what PREBUILT must have been built."""
    return _fingerprint("nvcc")


def default_cache() -> Path:
    """`forno/kernels` in the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "forno" / "kernels"


def compiler() -> list[str]:
    """The C++ compiler: $CXX, or the first found on PATH; empty if there is none."""
    named = os.environ.get("CXX", "").split()
    if named:
        return named if shutil.which(named[0]) else []
    return next(([name] for name in _COMPILERS if shutil.which(name)), [])


def compiled(architecture: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Compiles with NVRTC.

    Args:
        architecture: "sm_90" for a cubin, "compute_75" for PTX, which later GPUs compile for themselves.
        options: More of NVRTC's options.

    Returns:
        The binary, and what the compiler said.

    Raises:
        DeviceUnavailable: There is no NVRTC.
        BuildFailed: It refused the source.
    """
    nvrtc = _nvrtc()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram((SOURCES / MAIN).read_bytes(), MAIN.encode(), 0, [], []))
    try:
        given = [text.encode() for text in (f"--gpu-architecture={architecture}", *_GPU_OPTIONS, *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        said = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, said))
        text = said.decode(errors="replace").strip("\0\n ")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildFailed(f"NVRTC cannot build the kernels for {architecture}: {text or status.name}")
        is_ptx = architecture.startswith("compute_")
        size, content = ("nvrtcGetPTXSize", "nvrtcGetPTX") if is_ptx else ("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        binary = bytearray(_checked(nvrtc, getattr(nvrtc, size)(program)))
        _checked(nvrtc, getattr(nvrtc, content)(program, binary))
        return bytes(binary), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def resources(said: str) -> dict[str, dict[str, int]]:
    """Registers, bytes of shared memory and bytes spilled of each kernel, out of what `--ptxas-options=-v` says."""
    found: dict[str, dict[str, int]] = {}
    for part in said.split("Compiling entry function '")[1:]:
        amounts = {
            "registers": re.search(r"Used (\d+) registers", part),
            "shared_bytes": re.search(r"(\d+) bytes smem", part),
            "spilled_bytes": re.search(r"(\d+) bytes spill stores", part),
        }
        found[part.split("'", 1)[0]] = {name: int(amount[1]) if amount else 0 for name, amount in amounts.items()}
    return found


def _built_for_gpu(architecture: str) -> bytes:
    return compiled(architecture)[0]


def _built_for_cpu(_architecture: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="forno-kernels-") as folder:
        target = Path(folder) / "kernels.so"
        command = [*compiler(), *_CPU_OPTIONS, str(SOURCES / MAIN), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (the user's compiler)
        if done.returncode != 0:
            raise BuildFailed(f"{command[0]} cannot build the kernels: {done.stderr.strip()}")
        return target.read_bytes()


def _cpu_builder() -> str:
    command = compiler()
    if not command:
        raise DeviceUnavailable("the kernels need a C++ compiler on the CPU; install one (g++ or clang++), or set CXX")
    return " ".join([*command, os.path.realpath(shutil.which(command[0]) or ""), *_CPU_OPTIONS])


def _gpu_builder() -> str:
    nvrtc = _nvrtc()
    return f"NVRTC {_checked(nvrtc, nvrtc.nvrtcVersion())}"


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415  (only what runs kernels on a GPU pays for it)

        nvrtc.nvrtcVersion()  # finds the library
    except (ImportError, RuntimeError) as error:
        raise DeviceUnavailable(
            f"the kernels need NVRTC ({' '.join(str(error).split())}); install it: pip install 'forno[gpu]'"
        ) from error
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildFailed(f"NVRTC failed: {status.name}")
    return values[0] if len(values) == 1 else values


def _fingerprint(builder: str) -> str:
    """Says all that a build depends on, so that nothing old is ever taken."""
    told = hashlib.sha256(builder.encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in _SUFFIXES):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return told.hexdigest()[:32]


def _keep(file: Path, binary: bytes) -> None:
    """Writes aside and renames: another process reads all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as aside:
        aside.write(binary)
    Path(aside.name).replace(file)
