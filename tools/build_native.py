"""Builds the native Envoy module in place, where there is something to build it with.

`python tools/build_native.py` does it by hand; the build hook of the package does it at every install.
Nothing here may fail an install: without the module Forno serves through its other transports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVOY = ROOT / "server" / "forno" / "server" / "transport" / "envoy"
SOURCES = ENVOY / "native"
TARGET = ENVOY / "_native.so"
RECORD = ENVOY / "_native.for"  # what TARGET was built for: anything else builds it anew
SKIP = "FORNO_NATIVE"  # set to "skip" to leave the module out


def obstacle() -> str:
    """Why there is nothing to build or nothing to build it against; empty if there is no reason."""
    if os.environ.get(SKIP) == "skip":
        return f"{SKIP}=skip is set"
    if sys.platform == "win32":
        return "there is no Envoy for Windows"
    if not any(SOURCES.glob("*.cc")):
        return f"there are no sources in {SOURCES.relative_to(ROOT)}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python.h is not in {sysconfig.get_path('include')}; install Python's headers (python3-dev)"
    return ""


def system_compiler() -> list[str]:
    """A C++ compiler that runs: $CXX, or the first found on PATH; empty if there is none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = [*name.split()]
        if shutil.which(command[0]) is None:
            continue
        # macOS has a `c++` that only offers to install one.
        if subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0:
            return command
    return []


def fetched_compiler(folder: Path) -> list[str]:
    """The compiler of zig from the package index, unpacked into `folder`; empty if it cannot be had.

    Not a declared requirement of the build: where the index has no zig, that would fail the whole install.
    """
    # In an isolated build PYTHONPATH hides the pip that runs it.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    installers = [[sys.executable, "-m", "pip", "install"]]
    if uv := os.environ.get("UV"):  # set by uv, in whose environments there is no pip
        installers.insert(0, [uv, "pip", "install", "--python", sys.executable])
    for installer in installers:
        command = [*installer, "--quiet", "--no-deps", "--target", str(folder), "ziglang"]
        if subprocess.run(command, capture_output=True, check=False, env=clean).returncode == 0:
            # Without -mcpu zig would use every instruction that this one machine has.
            return [str(folder / "ziglang" / "zig"), "c++", "-mcpu=baseline"]
    return []


def options() -> list[str]:
    """What every compiler is told."""
    includes = dict.fromkeys((sysconfig.get_path("include"), sysconfig.get_path("platinclude"), str(SOURCES)))
    given = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-pthread"]
    if sys.platform == "darwin":
        given += ["-undefined", "dynamic_lookup"]  # Python and Envoy give the rest at load
    else:
        given += ["-s"]
    return [*given, *(f"-I{path}" for path in includes)]


def build() -> str:
    """Builds the module unless it is current.

    Returns:
        One line that says what was done, or why nothing was.
    """
    if reason := obstacle():
        return f"native Envoy module skipped: {reason}"
    record = " ".join([sysconfig.get_config_var("SOABI"), *options()])
    if is_current(record):
        return "native Envoy module is current"
    # A module that does not match its sources is worse than none.
    TARGET.unlink(missing_ok=True)
    # Built aside and moved: a running server keeps the file that it has mapped.
    with tempfile.TemporaryDirectory(dir=ENVOY, prefix=".native-") as name:
        folder = Path(name)
        command = system_compiler() or fetched_compiler(folder)
        if not command:
            return "native Envoy module skipped: no C++ compiler (c++, g++, clang++ or zig from PyPI)"
        made = folder / TARGET.name
        sources = [str(path) for path in sorted(SOURCES.glob("*.cc"))]
        failure = run_compiler([*command, *options(), *sources, "-o", str(made)], folder)
        if failure:
            return f"native Envoy module skipped: {Path(command[0]).name} failed:\n{failure}"
        made.replace(TARGET)
    RECORD.write_text(record)
    return f"native Envoy module built with {Path(command[0]).name}"


def run_compiler(command: list[str], folder: Path) -> str:
    """Compiles, with static C++ runtime libraries where they are installed.

    Returns:
        What the compiler said if it failed; empty if it did not.
    """
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(folder), "ZIG_GLOBAL_CACHE_DIR": str(folder)}
    attempts = [command]
    if sys.platform == "linux" and Path(command[0]).name != "zig":  # which links its own statically
        # Hidden, or other libraries in the process would find this copy of the runtime.
        attempts.insert(0, [*command, "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"])
    for attempt in attempts:
        done = subprocess.run(attempt, capture_output=True, text=True, check=False, env=environment)
        if done.returncode == 0:
            return ""
    return done.stderr.strip()


def is_current(record: str) -> bool:
    """Whether the module was built for this, from the sources as they are now."""
    if not TARGET.is_file() or not RECORD.is_file() or RECORD.read_text() != record:
        return False
    built = TARGET.stat().st_mtime
    return all(path.stat().st_mtime <= built for path in [*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])


if __name__ == "__main__":
    print(build())
