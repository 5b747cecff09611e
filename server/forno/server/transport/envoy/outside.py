"""The side of a server in Envoy that the user has started: hands it what to serve, hears of signals, and sees it end.

`inside.py` is the other side; `transport/control.py` says how they talk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from forno.server import fixed, logs, processes
from forno.server.transport.envoy import supervisor
from forno.server.transport.envoy.ends import ModuleEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forno.server.address import Address
    from forno.server.config import Config
    from forno.server.repository import ModelSpec

    Read = Callable[[], tuple[Config, Sequence[ModelSpec]]]

log = logging.getLogger("forno")


def serve_inside(
    config: Config,
    specs: Sequence[ModelSpec],
    address: Address,
    on_log: Callable[[str], None],
    read: Read,
) -> tuple[int, str]:
    """Serves from inside Envoy until a signal to end, then drains; SIGHUP reads the settings again.

    Args:
        config: All settings.
        specs: The models.
        address: Where to listen.
        on_log: Told of each line that Envoy logs.
        read: Reads both again.

    Returns:
        Exit status, and what to tell the user where it is not 0.
    """
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    envoy = supervisor.Envoy(
        config, address, lambda _folder: ModuleEnd(supervisor.INSIDE, str(theirs.fileno())), on_log
    )
    signals = _Signals()
    try:
        envoy.start(supervisor.interpreter_environment(), keep=[theirs.fileno()])
        theirs.close()
        _tell(ours, supervisor.packed({"config": config, "specs": specs, "address": str(address), "rest": True}))
        return _supervise(config, envoy, ours, signals, read)
    finally:
        signals.restore()
        ours.close()
        envoy.close()


def _supervise(
    config: Config,
    envoy: supervisor.Envoy,
    control: socket.socket,
    signals: _Signals,
    read: Read,
) -> tuple[int, str]:
    """Waits for news from inside and for signals; returns when Envoy may end."""
    drain_s = config.server.drain_s
    waiting = selectors.DefaultSelector()
    waiting.register(control, selectors.EVENT_READ)
    waiting.register(signals.descriptor, selectors.EVENT_READ)
    pending, failure = b"", ""
    draining_until: float | None = None
    while True:
        left_s = None if draining_until is None else max(0.0, draining_until - time.monotonic())
        for key, _ in waiting.select(left_s):
            if key.fd == signals.descriptor:
                taken = signals.take()
                if signal.SIGHUP in taken and draining_until is None:
                    drain_s = _reload(control, read, drain_s)
                if not taken - {signal.SIGHUP}:
                    continue
                if draining_until is not None:
                    return 130, "stopped at once by a second signal"
                _tell(control, b"drain\n")
                envoy.stop_listening()
                draining_until = time.monotonic() + drain_s + 5.0
                continue
            received = _receive(control)
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                if line == b"drained":
                    envoy.wait_answered(2.0)
                    return 0, ""
                if line.startswith(b"failed "):
                    failure = line[7:].decode().replace("\x1f", "\n")
            if not received:
                if failure:
                    return 2, failure
                envoy_status = _exit_status(envoy)
                return 1, f"the server ended unexpectedly (status {envoy_status})"
        if draining_until is not None and time.monotonic() >= draining_until:
            return 1, f"draining took longer than {drain_s} s; stopped"


def _reload(control: socket.socket, read: Read, drain_s: float) -> float:
    """Reads the settings again and hands them to the server inside, which says what comes of it.

    Returns:
        How long draining may take from now on.
    """
    try:
        config, specs = read()
    except Exception as error:  # noqa: BLE001  (whatever it is, what serves goes on)
        fixed.log_refused(log, error)
        return drain_s
    logs.configure(config.server.log_level, config.server.log_format)
    data = pickle.dumps((config, specs), pickle.HIGHEST_PROTOCOL)
    _tell(control, b"reload %d\n" % len(data) + data)
    return float(config.server.drain_s)


def _tell(control: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it has ended, which `_supervise` sees
        control.sendall(data)


def _receive(control: socket.socket) -> bytes:
    try:
        return control.recv(65536)
    except ConnectionResetError:  # it has ended without reading all that we sent
        return b""


def _exit_status(envoy: supervisor.Envoy) -> int | None:
    for _ in range(50):
        if (status := envoy.returncode()) is not None:
            return status
        time.sleep(0.02)
    return None


class _Signals:
    """SIGINT, SIGTERM and SIGHUP as bytes on a descriptor, for as long as it lives."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if processes.hears_hangups():
            numbers.append(signal.SIGHUP)
        self._before: dict[int, Any] = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._write.fileno())

    @property
    def descriptor(self) -> int:
        """Readable when a signal has come."""
        return self._read.fileno()

    def take(self) -> set[int]:
        """Those of ours among the signals that have come; forgets them."""
        return self._before.keys() & set(self._read.recv(4096))

    def restore(self) -> None:
        """Puts back what was there before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()
