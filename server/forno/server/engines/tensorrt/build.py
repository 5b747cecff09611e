"""Has plans built: in a process apart, one at a time, with progress in the log, and only where none is kept."""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server import apart
from forno.server.engines.tensorrt.cache import PlanCache, build_options, default_folder
from forno.server.engines.tensorrt.structure import structure_of
from forno.server.errors import ConfigError, NotReady

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from forno.kernels.devices import Device
    from forno.server.config import ModelSettings
    from forno.server.engines.tensorrt.cache import Relative
    from forno.server.engines.tensorrt.library import Library
    from forno.server.engines.tensorrt.structure import Structure

log = logging.getLogger("forno.engine.tensorrt")

BUILDER = (sys.executable, "-m", "forno.server.engines.tensorrt.builder")
_POLL_S = 0.2
_TELL_EVERY_S = 10.0


class Plans:
    """Finds or builds the plan of one ONNX model. Made for one load; one thread.

    Args:
        model: The ONNX model.
        settings: Of the model.
        library: TensorRT.
        device: The GPU.
        stopping: Ends a build, or the wait for another process's, once it is set.

    Raises:
        ConfigError: The model cannot be read, the cache not be made, or TensorRT not do what is set.
    """

    def __init__(
        self,
        model: Path,
        settings: ModelSettings,
        library: Library,
        device: Device,
        stopping: threading.Event | None = None,
    ) -> None:
        self._model = model
        self._limit_s = settings.tensorrt.build_limit_s
        self._limit_bytes = settings.tensorrt.cache_limit_bytes
        self._library = library
        self._device = device
        self._stopping = stopping
        folder = settings.tensorrt.cache_dir or default_folder()
        self._cache = PlanCache(Path(folder), library, device)
        self._options = build_options(settings)
        library.converts(settings.tensorrt.precision)
        if settings.tensorrt.refit:
            library.check_refit()
        self.path = self._cache.plan_of(model, self._options)

    def __str__(self) -> str:
        if self.path.is_file():
            what = "takes the plan kept as"
        elif not self._options["refit"]:
            what = "builds a plan, to be kept as"
        elif (relative := self._relative()) is not None:
            what = f"puts its weights, of which {len(relative.changed)} differ, into {relative.plan}, to be kept as"
        else:
            what = "builds a plan, since none of its structure is kept, to be kept as"
        return f"{what} {self.path}, with TensorRT {self._library.version} for {self._device.description}"

    @cached_property
    def _structure(self) -> Structure:
        return structure_of(self._model)  # reads all of it

    def _relative(self) -> Relative | None:
        return self._cache.relative_of(self._structure, self._options) if self._options["refit"] else None

    def ready(self, builder: Sequence[str] = BUILDER) -> Path:
        """The plan, which is made where it is not kept: of a relative, or else built.

        Args:
            builder: The command that builds.

        Raises:
            ConfigError: It cannot be built; the text says why.
            NotReady: It was stopped.
        """
        if self.path.is_file():
            log.info("%s: %s", self._model, self)
            self._cache.use(self.path)
            return self.path
        if not self._library.builds:
            raise ConfigError(
                f"{self._model} needs a plan, and {self._library.name} builds none; "
                "install all of TensorRT, pip install 'forno[gpu,tensorrt]', or give the plan itself"
            )
        waits = False

        def wait() -> None:
            nonlocal waits
            if not waits:
                waits = True
                log.info("%s: waits for another process that builds a plan on this GPU", self._model)
            self._check_stopping()

        with self._cache.turn(wait) as unfinished:
            if not self.path.is_file():  # the other process may have built this very plan
                log.info("%s: %s", self._model, self)
                relative = self._relative()
                if relative is None or not self._refitted(builder, unfinished, relative):
                    self._build(builder, unfinished)
                    if self._options["refit"]:
                        self._cache.note(self.path, self._structure, self._options)
                unfinished.replace(self.path)
                self._cache.trim(self._limit_bytes, self.path)
        return self.path

    def _refitted(self, builder: Sequence[str], unfinished: Path, relative: Relative) -> bool:
        """Whether the plan could be made of a relative."""
        self._cache.use(relative.plan)
        try:
            self._build(builder, unfinished, relative)
        except ConfigError as error:
            log.warning("%s; a plan is built", error)
            return False
        return True

    def _build(self, builder: Sequence[str], unfinished: Path, relative: Relative | None = None) -> None:
        job = {
            **self._options,
            "relative": relative.told() if relative else None,
            "model": str(self._model),
            "plan": str(unfinished),
            "timings": str(self._cache.timings),
            "device": self._device.name,
            "ordinal": self._device.ordinal,
        }
        told, tell = os.pipe()
        began_s = time.monotonic()
        with tempfile.TemporaryFile() as words, os.fdopen(told, "rb", buffering=0) as messages:
            try:
                process = apart.begin([*builder, str(tell)], words, stdin=subprocess.PIPE, pass_fds=[tell])
            finally:
                os.close(tell)
            try:
                with suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
                    stdin.write(json.dumps(job).encode())
                last = self._follow(messages, began_s)
                process.wait(max(1.0, began_s + self._limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise self._too_long() from None
            finally:
                apart.end(process)
            self._judge(last, process.returncode, words, began_s)

    def _follow(self, messages: Any, began_s: float) -> dict[str, Any]:
        """Tells the log of progress until the builder has told all; its last message, empty if there was none."""
        last: dict[str, Any] = {}
        rest, shown_s = b"", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(messages, selectors.EVENT_READ)
            while True:
                self._check_stopping()
                now_s = time.monotonic()
                if now_s - began_s > self._limit_s:
                    raise self._too_long()
                if not selector.select(_POLL_S):
                    continue
                read = messages.read(65536)
                if not read:
                    return last
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    last = json.loads(line)
                if "progress" in last and now_s - shown_s >= _TELL_EVERY_S:
                    shown_s = now_s
                    done, phase = last["progress"]["done"], last["progress"]["phase"]
                    log.info("%s: %.0f %% built in %.0f s: %s", self._model, 100 * done, now_s - began_s, phase)

    def _judge(self, last: dict[str, Any], status: int, words: Any, began_s: float) -> None:
        """Raises ConfigError unless the builder has built."""
        if "failed" in last:
            raise ConfigError(f"{self._model}: {last['failed']}")
        if status == 0 and "built" in last:
            took_s, size_bytes = time.monotonic() - began_s, last["built"]["bytes"]
            weights = last["built"].get("weights")
            how = "built" if weights is None else f"given {weights} weights"
            log.info("%s: %s in %.0f s, %d bytes: %s", self._model, how, took_s, size_bytes, self.path)
            return
        raise ConfigError(f"{self._model}: the process that builds its plan {apart.ending(status, words)}")

    def _check_stopping(self) -> None:
        if self._stopping is not None and self._stopping.is_set():
            raise NotReady(f"{self._model}: building its plan was given up, because the server ends")

    def _too_long(self) -> ConfigError:
        return ConfigError(
            f"{self._model}: building its plan took longer than tensorrt.build_limit_s = {self._limit_s}, and was ended"
        )
