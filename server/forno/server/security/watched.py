"""Files that may change while the server runs: read anew when they do, kept as they were where that fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic, TypeVar

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("forno.security")

T = TypeVar("T")


class Watched(Generic[T]):
    """What some files say together. One thread at a time; `refresh` notices replaced, rewritten and relinked files.

    Args:
        paths: The files.
        read: Makes the value of them.
        what: What the log calls it.

    Raises:
        ConfigError: `read` refuses what is there at first.
    """

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], T], what: str) -> None:
        self._paths = paths
        self._read = read
        self._what = what
        self._seen = self._stamp()
        self.value = read()

    def refresh(self) -> bool:
        """Reads the files anew if they have changed.

        Returns:
            Whether there is a new value. Where the files cannot be used now, the log says why, once, and the value
            stays as it is: a half-written file must not lock everyone out.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self.value = self._read()
        except ConfigError as error:
            log.error("%s stays as it was: %s", self._what, error)  # noqa: TRY400  (no fault of ours to trace)
            return False
        log.info("%s was read anew", self._what)
        return True

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
