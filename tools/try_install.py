"""What a user gets: the wheel in a fresh environment with the newest of what it needs, serving and called.

Usage: `make test-install`. Needs a package index. Takes uv where it is on PATH, pip otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import run_demo
from bench.process import free_port
from installer import pip

ROOT = run_demo.ROOT
WANTED = ("label = [8]", '"prediction":"spam"', '{"prediction":"7","confidence":1.0}')


def install(folder: Path) -> Path:
    """Builds the wheel and installs it with what a server needs; the environment's folder of programs."""
    wheels, environment = folder / "wheels", folder / "environment"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    wanted = f"{next(wheels.glob('*.whl'))}[server,images]"
    subprocess.run(pip("install", "-q", wanted, python=python), check=True)
    subprocess.run(pip("list", python=python), check=True)
    return python.parent


def main() -> int:
    """Runs the demo on each transport that serves REST.

    Returns:
        0 if every call was answered as it should be and every server ended well, 1 otherwise.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    failed = False
    with tempfile.TemporaryDirectory() as name:
        programs = install(Path(name))
        for transport in ("envoy", "proxy"):
            address = f"127.0.0.1:{free_port()}"
            command = [str(programs / "forno"), "serve", str(ROOT / "examples" / "forno.yaml"), "--address", address]
            server = subprocess.Popen([*command, "--transport", transport], cwd=name, env=clean, process_group=0)
            run_demo.wait_until_ready(server, address)
            demo = [str(programs / "python"), str(ROOT / "examples" / "demo.py"), address]
            done = subprocess.run(demo, cwd=name, env=clean, capture_output=True, text=True, check=False)
            status = run_demo.stop(server)
            missing = [text for text in WANTED if text not in done.stdout]
            print(f"{transport}: {'ok' if not (missing or status) else f'status {status}, no {missing}: {done}'}")
            failed |= bool(missing or status)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
