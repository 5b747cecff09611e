"""What `make run` does: serves the demo models, shows three calls once they are ready, serves on until ^C.

Usage: `python tools/run_demo.py HOST:PORT`. With DEMO_EXIT=1 in the environment it ends after the calls.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
READY_WITHIN_S = 120.0
DRAINED_WITHIN_S = 30.0


def refuse_if_taken(address: str) -> None:
    """Makes sure that what answers at the address will be the demo.

    Raises:
        SystemExit: Something listens there already, or the address cannot be read.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SystemExit(f"ADDRESS is '{address}', expected HOST:PORT such as 127.0.0.1:8080")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return
    raise SystemExit(f"{address} is taken; choose another: make run ADDRESS={host}:{int(port) + 1}")


def serve(address: str) -> subprocess.Popen[bytes]:
    """Starts the server, in a process group of its own: ^C reaches it once, through `stop`."""
    command = [sys.executable, "-m", "forno.server", "serve", "examples/forno.yaml", "--address", address]
    return subprocess.Popen(command, cwd=ROOT, process_group=0)


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    """Waits for /ready.

    Raises:
        SystemExit: The server ended, or was not ready in time.
    """
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(server.returncode or 1)
        try:
            with urllib.request.urlopen(f"http://{address}/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    stop(server)
    raise SystemExit(f"the server was not ready within {READY_WITHIN_S:.0f} s")


def stop(server: subprocess.Popen[bytes]) -> int:
    """Asks the server to drain and end.

    Returns:
        Its exit status.
    """
    if server.poll() is None:
        server.terminate()
    try:
        return server.wait(DRAINED_WITHIN_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        server.kill()
        return server.wait()


def stopped_by_signal(number: int, _frame: object) -> NoReturn:
    """Turns other requests to end into the way out that ^C takes."""
    raise KeyboardInterrupt(number)


def main(address: str) -> int:
    """Runs the demo.

    Returns:
        The exit status: 0 if all calls were answered and the server ended well.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stopped_by_signal)
    refuse_if_taken(address)
    server = serve(address)
    try:
        wait_until_ready(server, address)
        print(flush=True)
        demo = [sys.executable, "examples/demo.py", address]
        failed = subprocess.run(demo, cwd=ROOT, check=False).returncode
        if failed or os.environ.get("DEMO_EXIT") == "1":
            return stop(server) or failed
        print(f"Serving on {address} until ^C.", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return stop(server)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
