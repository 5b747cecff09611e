"""A server under measurement, with all its processes: started, watched through /proc, ended. Linux only."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
READY_LIMIT_S = 60.0
STOP_S = 15.0
# fields of /proc/PID/stat counted from the one behind the command's name
STATE, PARENT, UTIME, CSTIME = 0, 1, 11, 14


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now, nor is given to a connection until somebody does.

    Systems take ports of outgoing connections, and those for `bind` to port 0, from 32768 up.
    """
    while True:
        port = random.randrange(10_000, 32_768)  # noqa: S311  (no secret)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def machine_busy_s() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    with Path("/proc/stat").open("rb") as file:
        user, nice, system, _idle, _wait, irq, softirq = (int(part) for part in file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


class ServerProcess:
    """One server with its descendants. Owned by one measurement; a context manager, which ends them all."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.started_s = time.perf_counter()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                list(argv),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Makes sure that the server runs.

        Raises:
            RuntimeError: It has ended; the text has the end of its log.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with status {self._process.returncode}:\n{self.log_end()}")

    def wait_ready(self, port: int) -> None:
        """Waits until it says over HTTP that it serves all that it should.

        Raises:
            RuntimeError: It has ended, or took too long; the text has the end of its log.
        """
        end_s = time.perf_counter() + READY_LIMIT_S
        while time.perf_counter() < end_s:
            self.check_alive()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5.0).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"not ready in {READY_LIMIT_S:.0f} s:\n{self.log_end()}")

    def log_end(self, lines: int = 15) -> str:
        """The last lines of what the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def cpu_s(self) -> float:
        """User and system CPU seconds of every process of the server so far, ended children included."""
        return sum(
            sum(int(part) for part in stat[UTIME : CSTIME + 1]) / TICKS_PER_S for stat in self._family().values()
        )

    def pss_mib(self) -> float:
        """Memory of every process of the server, shared pages counted by their share, in MiB."""
        return self._memory_mib(b"Pss:")

    def written_mib(self) -> float:
        """Memory that the server's processes have written and share with nobody, in MiB: where a leak shows.

        Unlike `pss_mib` it does not change when another process that uses the same libraries comes or goes.
        """
        return self._memory_mib(b"Private_Dirty:")

    def _memory_mib(self, field: bytes) -> float:
        total_kib = 0
        for pid in self._family():
            with contextlib.suppress(OSError), Path(f"/proc/{pid}/smaps_rollup").open("rb") as file:
                total_kib += sum(int(line.split()[1]) for line in file if line.startswith(field))
        return total_kib / 1024

    def process_count(self) -> int:
        """How many processes the server consists of."""
        return len(self._family())

    def stop(self) -> float:
        """Asks the server to end, and kills what is left of it after a while.

        Returns:
            Seconds until all of it was gone.
        """
        family = set(self._family())  # who is orphaned on the way is no descendant any more
        began_s = time.perf_counter()
        self._process.terminate()
        while self._left(family) and time.perf_counter() < began_s + STOP_S:
            time.sleep(0.02)
        for pid in self._left(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        return time.perf_counter() - began_s

    def _left(self, family: set[int]) -> set[int]:
        self._process.poll()
        return {pid for pid, stat in _all_processes().items() if pid in family and stat[STATE] != "Z"}

    def _family(self) -> dict[int, list[str]]:
        """/proc/PID/stat of the server and its descendants, from the state field on."""
        everyone = _all_processes()
        found: dict[int, list[str]] = {}
        generation = {self._process.pid} & everyone.keys()
        while generation:
            found.update((pid, everyone[pid]) for pid in generation)
            parents = {str(pid) for pid in generation}
            generation = {pid for pid, stat in everyone.items() if stat[PARENT] in parents} - found.keys()
        return found


def _all_processes() -> dict[int, list[str]]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
    return found
