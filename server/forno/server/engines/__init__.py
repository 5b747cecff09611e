"""What runs a model file. One file an engine, each imported only when a model needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from forno.server.config import ModelSettings
    from forno.server.signature import Signature
    from forno.server.slots import Slot

    Array = np.ndarray[Any, np.dtype[Any]]

SlotT = TypeVar("SlotT", bound="Slot")

_BY_SUFFIX = {".onnx": "onnx", ".ort": "onnx"}


class Engine(Protocol[SlotT]):
    """One loaded model. Owned by a Model; ends with `close`.

    Several threads may call `run` at once, each with a slot of its own; all else is for one thread at a time. `SlotT`
    is the kind of slot that it makes, and the only one that it runs.
    """

    name: str
    signature: Signature  # as the file declares it; a Model replaces it once `batched` is decided, before its slots
    text_only: bool  # whether strings must be text: bytes that are not UTF-8 cannot be carried

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


def open_engine(path: Path | None, settings: ModelSettings) -> Engine[Any]:
    """Loads a model file. Blocks; any thread.

    Raises:
        ConfigError: The file cannot be served; the text says why.
    """
    name = engine_name(path, settings)
    if name == "null":
        if settings.device != "cpu":
            raise ConfigError(f"the null engine runs on the cpu alone, and device is '{settings.device}'")
        from forno.server.engines.null import NullEngine  # noqa: PLC0415

        return NullEngine(settings.null)
    if path is None:
        raise ConfigError(f"the {name} engine needs the path of a model file")
    if settings.device != "cpu":
        from forno.server.engines.onnx_cuda import open_on_device  # noqa: PLC0415

        return open_on_device(path, settings.cuda, settings.device)
    from forno.server.engines.onnx import OnnxEngine  # noqa: PLC0415

    return OnnxEngine(path, settings.onnx, settings.instances)
