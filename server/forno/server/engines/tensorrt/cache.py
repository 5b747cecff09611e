"""Plans that were built, kept under names that say all that they depend on.

NAME-KEY.plan            a plan
structure-KEY.json       the plan that was built last of a structure, and the weights that it was built with
timings-RELEASE-GPU      what the builder has measured there, for the next build
build-GPU.lock           held by the process that builds: two builds would disturb each other's measurements
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server.engines.onnx_files import files_of
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forno.kernels.devices import Device
    from forno.server.config import ModelSettings
    from forno.server.engines.tensorrt.library import Library
    from forno.server.engines.tensorrt.structure import Structure

log = logging.getLogger("forno.engine.tensorrt")

_FORMAT = 1
"""Of what is told of a build, and of how models are converted; another number makes all kept plans strangers."""
_POLL_S = 0.2
_UNFINISHED = ".building-"


@dataclass(frozen=True)
class Relative:
    """A kept plan that was built of another model of the same structure. Immutable.

    Args:
        plan: The plan.
        changed: The weights that differ.
        folded: Those of them that batch normalizations take, of which TensorRT makes others.
        foldings: How many batch normalizations there are of which it does.
    """

    plan: Path
    changed: frozenset[str]
    folded: frozenset[str]
    foldings: int

    def told(self) -> dict[str, Any]:
        """What the process that builds is told of it."""
        changed, folded = sorted(self.changed), sorted(self.folded)
        return {"plan": str(self.plan), "changed": changed, "folded": folded, "foldings": self.foldings}


class PlanCache:
    """One folder of plans for one GPU and one TensorRT. Any thread; processes take turns to build.

    Args:
        folder: Where they are; made where it is not there.
        library: Which TensorRT.
        device: Which GPU.

    Raises:
        ConfigError: The folder cannot be made.
    """

    def __init__(self, folder: Path, library: Library, device: Device) -> None:
        self._folder = folder
        self._library = library
        self._device = device
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", device.description).strip("-")
        self.timings = folder / f"timings-{library.version}-{device.architecture}-{gpu}"
        self._lock = folder / f"build-{gpu}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"tensorrt.cache_dir is {folder}, which cannot be made: {error.strerror}") from error

    def plan_of(self, model: Path, options: dict[str, Any]) -> Path:
        """Where the plan of an ONNX model is, or is to be; `options` say how it is built.

        Raises:
            ConfigError: The model cannot be read.
        """
        key = self._key({"files": [_digest(path) for path in files_of(model)]}, options)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.stem)[:64]
        return self._folder / f"{stem}-{key}.plan"

    def relative_of(self, structure: Structure, options: dict[str, Any]) -> Relative | None:
        """A plan that other weights may be put into, None where there is none."""
        try:
            told = json.loads(self._note_of(structure, options).read_bytes())
            plan, weights = self._folder / told["plan"], told["weights"]
        except (OSError, ValueError, KeyError, TypeError):  # none was built, or the note is damaged
            return None
        if not plan.is_file() or weights.keys() != structure.weights.keys():
            return None
        changed = frozenset([name for name, digest in structure.weights.items() if weights[name] != digest])
        return Relative(plan, changed, changed & structure.folded, structure.foldings)

    def note(self, plan: Path, structure: Structure, options: dict[str, Any]) -> None:
        """Notes what a plan was built of, for `relative_of`."""
        told = {"plan": plan.name, "weights": structure.weights}
        keep(self._note_of(structure, options), memoryview(json.dumps(told).encode()))

    def _note_of(self, structure: Structure, options: dict[str, Any]) -> Path:
        return self._folder / f"structure-{self._key({'structure': structure.digest}, options)}.json"

    def _key(self, model: dict[str, Any], options: dict[str, Any]) -> str:
        """All that a plan depends on, as 32 digits."""
        told = {
            "format": _FORMAT,
            **model,
            "tensorrt": self._library.version,
            "architecture": self._device.architecture,
            "device": self._device.description,
            "options": options,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def turn(self, wait: Callable[[], None]) -> Iterator[Path]:
        """The right to build, and the name of a file beside the plans to write one to; it is removed at the end.

        Args:
            wait: Called a few times a second while another process has the turn; what it raises ends the wait.
        """
        import fcntl  # noqa: PLC0415  (not on Windows, where there is no GPU engine)

        with self._lock.open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    wait()
                    time.sleep(_POLL_S)
            self._remove_unfinished()
            try:
                yield self._folder / f"{_UNFINISHED}{os.getpid()}"
            finally:
                self._remove_unfinished()

    def use(self, plan: Path) -> None:
        """Notes that a plan is used, for `trim`. Where the folder cannot be written to, nothing is noted."""
        with suppress(OSError):
            os.utime(plan, ns=(time.time_ns(), plan.stat().st_mtime_ns))

    def trim(self, limit_bytes: int, made: Path) -> None:
        """Removes the plans that were not used for the longest time, while all have more than so many bytes.

        Args:
            limit_bytes: 0 = no limit.
            made: Is kept in any case.
        """
        plans = {}
        for path in self._folder.glob("*.plan"):
            with suppress(FileNotFoundError):  # a process that builds for another GPU removes some too
                plans[path] = path.stat()
        held_bytes = sum([each.st_size for each in plans.values()])
        for path in sorted(plans, key=lambda path: plans[path].st_atime_ns):
            if not limit_bytes or held_bytes <= limit_bytes:
                return
            if path != made:
                path.unlink(missing_ok=True)
                held_bytes -= plans[path].st_size
                log.info("%s is removed: plans may have tensorrt.cache_limit_bytes = %d", path, limit_bytes)

    def _remove_unfinished(self) -> None:
        """Removes what processes that were killed have left: whoever calls this has the turn, and nobody builds."""
        for left in self._folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def default_folder() -> Path:
    """`forno/tensorrt` in the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "forno" / "tensorrt"


def build_options(settings: ModelSettings) -> dict[str, Any]:
    """How a plan is built, as far as settings say so: what it depends on, and what the builder is told."""
    given = settings.tensorrt
    profiles = [
        {
            name: {which: list(getattr(shapes, which)) for which in ("min", "opt", "max")}
            for name, shapes in each.items()
        }
        for each in given.profiles
    ]
    allowed = settings.padding.allowed_rows
    most_rows = max(
        (rows for rows in allowed if rows <= settings.batching.max_rows), default=settings.batching.max_rows
    )
    return {
        "profiles": profiles,
        "max_rows": 0 if profiles else most_rows,
        "precision": given.precision,
        "workspace_bytes": given.workspace_bytes,
        "optimization_level": given.optimization_level,
        "version_compatible": given.version_compatible,
        "refit": given.refit,
        "tf32": settings.cuda.tf32,
    }


def keep(path: Path, content: memoryview) -> None:
    """Writes aside and renames: another process reads all of it or nothing, also after a power failure."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_UNFINISHED, delete=False) as aside:
        aside.write(content)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
