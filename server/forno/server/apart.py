"""Processes of this program for what takes gigabytes or may crash: how they begin, are ended, and have ended.

None outlives what waits for it: the kernel kills it when the thread that has begun it dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from forno.server.processes import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

_LAST_WORDS_BYTES = 2000


def begin(command: Sequence[str], words: IO[bytes], **options: Any) -> subprocess.Popen[bytes]:
    """Begins a process that heads a group of its own.

    Args:
        command: What it runs.
        words: A file, to which its output and its errors go.
        options: Further ones of `subprocess.Popen`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # as Envoy needs it
    return subprocess.Popen(  # noqa: S603  (this program)
        command,
        stdout=words,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  (a system call)
        **options,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it has started, if it is still there."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ending(status: int, words: IO[bytes]) -> str:
    """How a process has ended, such as "was ended by SIGSEGV: out of luck": its status and its last line."""
    size = words.seek(0, os.SEEK_END)
    words.seek(max(0, size - _LAST_WORDS_BYTES))
    lines = words.read().decode(errors="replace").split("\n")
    said = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
    how = f"ended with status {status}" if status >= 0 else f"was ended by {_signal(-status)}"
    return how + (f": {said}" if said else "")


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in [*signal.Signals] else str(number)
    return f"{name}, as where memory runs out" if number == signal.SIGKILL else name
