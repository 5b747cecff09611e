"""Builds the kernels for all GPUs in one file, where there is nvcc: such a package needs no NVRTC.

`python tools/build_kernels.py` does it by hand; the build hook of the package does it at every install. Nothing here
may fail an install: without the file, kernels are compiled where they are first used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from forno.kernels import build as kernels

WANTED = ("75", "80", "86", "89", "90", "100", "120")
"""Compute capabilities that get code of their own; the least of them is there as PTX too, for all to come."""


def nvcc() -> str:
    """CUDA's compiler: of $CUDA_HOME, or on PATH; empty if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or ""


def build() -> str:
    """Builds the file unless it is current.

    Returns:
        One line that says what was done, or why nothing was.
    """
    compiler = nvcc()
    if not compiler:
        return "kernels for GPUs are compiled at first use: there is no nvcc (CUDA_HOME, PATH)"
    if kernels.prebuilt() is not None:
        return "kernels for GPUs are current"
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = re.findall(r"compute_(\d+)$", listed, re.MULTILINE)
    chosen = [number for number in WANTED if number in known]
    if not chosen:
        return f"kernels for GPUs are compiled at first use: {compiler} knows none of {', '.join(WANTED)}"
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    options.append(f"-gencode=arch=compute_{chosen[0]},code=compute_{chosen[0]}")
    with tempfile.TemporaryDirectory(dir=kernels.PREBUILT.parent, prefix=".native-") as folder:
        made = Path(folder) / kernels.PREBUILT.name
        source = kernels.SOURCES / kernels.MAIN
        command = [compiler, "--fatbin", "-std=c++17", *options, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"kernels for GPUs are compiled at first use: {compiler} failed:\n{done.stderr.strip()}"
        made.replace(kernels.PREBUILT)
    kernels.PREBUILT_FOR.write_text(kernels.prebuilt_fingerprint())
    return f"kernels built for compute capabilities {', '.join(chosen)}"


if __name__ == "__main__":
    print(build())
