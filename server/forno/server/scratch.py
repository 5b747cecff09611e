"""Private folders for what is needed on disk for a while, which do not outlast their servers.

Whoever lives in a folder holds a lock on a file in it: a server, and Envoy, which inherits the descriptor. What a
killed server has left is known by that nobody holds its lock any more, whatever process ids mean to whom.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "forno-"
_LOCK = "lock"
_NEW_S = 60.0
"""A folder is left alone for so long, since it is there a moment before its lock is held."""


def make() -> tuple[Path, int]:
    """A new folder that only its owner may enter, and the descriptor that holds its lock."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    _try_lock(lock)
    return folder, lock


def remove(folder: Path, lock: int) -> None:
    """Removes a folder, and lets its lock go."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def remove_stale(now_s: float | None = None) -> None:
    """Removes the folders of this user's servers that were killed.

    Args:
        now_s: The time, since the epoch; None = now.
    """
    old_s = (time.time() if now_s is None else now_s) - _NEW_S
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid() or status.st_mtime > old_s:
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # not one of ours, or gone meanwhile
            continue
        try:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
