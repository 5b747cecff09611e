"""What runs a model file. One file an engine, each imported only when a model needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from forno.server.errors import ConfigError, NotReady

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from forno.server.config import ModelSettings
    from forno.server.profiles import Profiles
    from forno.server.signature import Signature
    from forno.server.slots import Slot

    Array = np.ndarray[Any, np.dtype[Any]]

SlotT = TypeVar("SlotT", bound="Slot")

_BY_SUFFIX = {".onnx": "onnx", ".ort": "onnx", ".plan": "tensorrt", ".engine": "tensorrt"}


class Engine(Protocol[SlotT]):
    """One loaded model. Owned by a Model; ends with `close`.

    Several threads may call `run` at once, each with a slot of its own; all else is for one thread at a time. `SlotT`
    is the kind of slot that it makes, and the only one that it runs.
    """

    name: str
    signature: Signature  # as the file declares it; a Model replaces it once `batched` is decided, before its slots
    text_only: bool  # whether strings must be text: bytes that are not UTF-8 cannot be carried
    profiles: Profiles  # shapes that it runs; none = all of the signature

    def new_slot(self, max_rows: int) -> SlotT:
        """Buffers for one batch of up to `max_rows` rows."""

    def run(self, slot: SlotT, rows: int) -> Sequence[Array]:
        """Runs what the slot holds.

        Returns:
            Outputs in the signature's order, valid until the slot's next run.
        """

    def settle(self, *, small: bool) -> bool:
        """Told once, after the first measurements: whether runs are so short that threads would only cost.

        Returns:
            Whether the file was opened anew for that; slots made before are then of no use.
        """

    def close(self) -> None:
        """Frees the model. Idempotent."""


def engine_name(path: Path | None, settings: ModelSettings) -> str:
    """The engine that the settings ask for, else the one for this kind of file.

    Raises:
        ConfigError: Nothing decides it.
    """
    if settings.engine is not None:
        return settings.engine
    name = _BY_SUFFIX.get(path.suffix.lower(), "") if path is not None else ""
    if not name:
        raise ConfigError(f"no engine runs '{path}'; known are files ending in {', '.join(_BY_SUFFIX)}")
    return name


def device_name(path: Path | None, settings: ModelSettings) -> str:
    """Where the model runs: what the settings say, else the CPU, or a GPU for an engine that runs on nothing else."""
    return settings.device or ("cuda" if engine_name(path, settings) == "tensorrt" else "cpu")


def open_engine(path: Path | None, settings: ModelSettings, stopping: threading.Event | None = None) -> Engine[Any]:
    """Loads a model file. Blocks; any thread.

    Args:
        path: The file; None for an engine that needs none.
        settings: Of the model.
        stopping: Once it is set, nobody waits for the model any more: what takes minutes is given up.

    Raises:
        ConfigError: The file cannot be served; the text says why.
        NotReady: It was stopped.
    """
    on_gpu = engine_name(path, settings) == "onnx" and device_name(path, settings) != "cpu"
    if path is None or not on_gpu or settings.cuda.precision == "model":
        return _open(path, settings, stopping)
    from forno.server.engines.onnx_float16 import converted  # noqa: PLC0415

    with converted(path, "cuda.precision", stopping) as model:  # once for all devices
        return _open(path, settings, stopping, model)


def _open(
    path: Path | None,
    settings: ModelSettings,
    stopping: threading.Event | None,
    model: Callable[[], Path] | None = None,
) -> Engine[Any]:
    """As `open_engine`; `model` gives the file that is opened where that is not `path`."""
    if stopping is not None and stopping.is_set():
        raise NotReady("it was stopped before it was loaded")
    if settings.devices:
        return _spread(path, settings, stopping, model)
    name, device = engine_name(path, settings), device_name(path, settings)
    if name == "null":
        if device != "cpu":
            raise ConfigError(f"the null engine runs on the cpu alone, and device is '{device}'")
        from forno.server.engines.null import NullEngine  # noqa: PLC0415

        return NullEngine(settings.null)
    if path is None:
        raise ConfigError(f"the {name} engine needs the path of a model file")
    if name == "tensorrt":
        from forno.server.engines.tensorrt import open_tensorrt  # noqa: PLC0415

        return open_tensorrt(path, settings, device, stopping)
    if device != "cpu":
        from forno.server.engines.onnx_cuda import open_on_device  # noqa: PLC0415

        return open_on_device(path, settings.cuda, device, model)
    from forno.server.engines.onnx import OnnxEngine  # noqa: PLC0415

    return OnnxEngine(path, settings.onnx, settings.instances)


def _spread(
    path: Path | None, settings: ModelSettings, stopping: threading.Event | None, model: Callable[[], Path] | None
) -> Engine[Any]:
    from forno.server.engines.spread import SpreadEngine  # noqa: PLC0415

    engines: list[Engine[Any]] = []
    try:
        for number in settings.devices:
            own = settings.model_copy(update={"devices": (), "device": f"{device_name(path, settings)}:{number}"})
            engines.append(_open(path, own, stopping, model))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return SpreadEngine(engines)
