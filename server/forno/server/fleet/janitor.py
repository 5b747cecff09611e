"""Cleans up after a supervisor that was killed: a small process that does nothing until then."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from typing import TYPE_CHECKING

from forno.server import processes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


class Janitor:
    """A forked process that leads the group of all that the supervisor starts. Owned by the supervisor.

    It waits at a pipe that only the supervisor holds. When that closes, however the supervisor ended, it removes what
    lies about and kills the group, itself with it: no orphan, no socket is left, stopped processes included.

    Args:
        leave_nothing_of: Folders and files to remove.

    Attributes:
        group: The process group to join.
    """

    def __init__(self, leave_nothing_of: Sequence[Path]) -> None:
        read_end, self._write_end = os.pipe()  # not inheritable: nobody but us keeps it open
        self.group = os.fork()  # before there are threads: what follows in the child is plain Python
        if not self.group:
            os.close(self._write_end)
            _wait_and_clean(read_end, leave_nothing_of)
        os.close(read_end)
        with contextlib.suppress(OSError):  # it does so itself, perhaps first
            os.setpgid(self.group, self.group)

    def close(self) -> None:
        """Has it clean up, and waits for its end."""
        os.close(self._write_end)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.group, 0)


def _wait_and_clean(read_end: int, leave_nothing_of: Sequence[Path]) -> None:
    try:
        os.setpgid(0, 0)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        processes.call_itself("forno: janitor")
        os.read(read_end, 1)
        for path in leave_nothing_of:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        os.killpg(0, signal.SIGKILL)
