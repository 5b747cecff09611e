"""Where the control socket of a fleet lies: in a folder that only its owner may enter, named after its address."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

from forno.server.address import MAX_PATH_BYTES
from forno.server.errors import ConfigError


def folder() -> Path:
    """The folder of this user's control sockets, which is made where it is missing.

    Raises:
        ConfigError: It is there, but others may enter it, or it is somebody else's.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = Path(runtime, "forno") if runtime else Path(tempfile.gettempdir(), f"forno-control-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path} is not a folder of yours alone; remove it, or set XDG_RUNTIME_DIR")
    return path


def path_of(address: str) -> Path:
    """The control socket of the fleet that listens on an address.

    Raises:
        ConfigError: Its folder is no place for it.
    """
    path = folder() / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', address)}.sock"
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"the control socket {path} has too long a path; set XDG_RUNTIME_DIR to a shorter folder")
    return path


def find(address: str | None) -> Path:
    """The control socket of a running fleet: of an address, or of the only one that runs.

    Raises:
        ConfigError: There is none, or there are several.
    """
    if address is not None:
        if not (path := path_of(address)).is_socket():
            raise ConfigError(f"no fleet of yours runs at {address}; it is started by: forno serve ... --replicas N")
        return path
    running = sorted(folder().glob("*.sock"))
    if len(running) == 1:
        return running[0]
    if not running:
        raise ConfigError("no fleet of yours runs; it is started by: forno serve ... --replicas N")
    names = ", ".join(path.stem for path in running)
    raise ConfigError(f"several fleets run: {names}; say which with --address HOST:PORT")
