"""TensorRT as it is installed: which of its packages there is, and what differs between them and between releases.

There are three of one interface: the full one, which builds plans; the lean runtime, which runs plans that were built
version compatible; and the dispatch runtime, which runs those that carry their own lean runtime.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from forno.server.errors import ConfigError
from forno.v1 import tensors

log = logging.getLogger("forno.engine.tensorrt")

OLDEST, TOO_NEW = (10, 13), (12,)
"""Releases that this is written for; 10.13 is the first for CUDA 13."""
_LOSES_BIASES = (11, 3)
"""Of this release NVIDIA's release notes say that plans built to be refitted may take a GEMM's bias for zero."""
_NAMES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_SAME_NAME = ("INT8", "INT32", "INT64", "UINT8", "BOOL")
_KEPT_ERRORS = 8
_PRECISIONS = {"fp16": "FP16", "bf16": "BF16"}
_CONVERTED = "fp16"


@dataclass(frozen=True)
class Library:
    """One of TensorRT's packages. Immutable; any thread."""

    module: Any
    name: str  # of the package: tensorrt, tensorrt_lean or tensorrt_dispatch
    version: str

    @property
    def release(self) -> tuple[int, ...]:
        """Its version in numbers."""
        return tuple([int(part) for part in self.version.split(".")[:4] if part.isdigit()])

    @property
    def builds(self) -> bool:
        """Whether it builds plans."""
        return hasattr(self.module, "Builder")

    def new_logger(self) -> Any:
        """What TensorRT tells, to our log; `errors` keeps the last ones. Must outlive all that is made with it."""
        return _logger_type(self.module)()

    def element_type(self, data_type: Any, tensor: str) -> Any:
        """NumPy's type for one of TensorRT's.

        Raises:
            ConfigError: There is none, as for numbers of 4 or of 8 floating bits.
        """
        name = data_type.name
        known = _TYPES.get(name) or (name.lower() if name in _SAME_NAME else None)
        if known is None:
            expected = ", ".join((*_TYPES, *_SAME_NAME))
            raise ConfigError(f"its tensor '{tensor}' is of TensorRT's type {name}, expected one of {expected}")
        return tensors.dtype_named(known)

    def converts(self, precision: str) -> bool:
        """Whether a model is to be converted for a precision, because this release takes types from the model alone.

        Raises:
            ConfigError: It is, and cannot be.
        """
        if precision == "model" or hasattr(self.module.BuilderFlag, _PRECISIONS[precision]):
            return False
        if precision == _CONVERTED:
            return True
        raise ConfigError(
            f"tensorrt.precision is '{precision}', but TensorRT {self.version} takes types from the model alone, and "
            f"Forno converts to '{_CONVERTED}' alone: convert the model, such as with ModelOpt's AutoCast, and remove "
            "the setting"
        )

    def network_flags(self, precision: str) -> int:
        """How a network is created whose layers compute in the types that the model says, or in `precision`."""
        if precision == "model" or self.converts(precision):
            return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return 0

    def precision_flags(self, precision: str) -> list[Any]:
        """The builder's flags for a precision."""
        is_the_models = precision == "model" or self.converts(precision)
        return [] if is_the_models else [getattr(self.module.BuilderFlag, _PRECISIONS[precision])]

    def check_refit(self) -> None:
        """Refuses to build plans that take other weights where that is known to be broken.

        Raises:
            ConfigError: It is.
        """
        if self.release[:2] == _LOSES_BIASES:
            raise ConfigError(
                f"tensorrt.refit is set, and TensorRT {self.version} is installed, of which NVIDIA says that it can "
                "drop biases from plans that take other weights: install another release, or remove the setting"
            )


def find() -> Library:
    """The first that is installed: the full package, the lean or the dispatch runtime.

    Raises:
        ConfigError: None is, or it is of a release that is not known here.
    """
    failures = []
    for name in _NAMES:
        for spelling in (name, f"{name}_bindings"):  # wheels alone, without the package that joins them
            try:
                module = importlib.import_module(spelling)
                version = str(module.__version__)
            except (ImportError, OSError, AttributeError) as error:  # OSError: a library that it loads is missing
                if not isinstance(error, ModuleNotFoundError):
                    failures.append(" ".join(str(error).split()))
                continue
            return _known(Library(module, name, version))
    why = f" ({failures[0]})" if failures else ""
    raise ConfigError(f"the tensorrt engine needs TensorRT{why}; install it: pip install 'forno[gpu,tensorrt]'")


def _known(library: Library) -> Library:
    if not OLDEST <= library.release < TOO_NEW:
        raise ConfigError(
            f"TensorRT {library.version} is installed, expected at least {'.'.join(map(str, OLDEST))} "
            f"and less than {TOO_NEW[0]}"
        )
    return library


def _logger_type(module: Any) -> type:
    levels = {"VERBOSE": logging.DEBUG, "INFO": logging.DEBUG, "WARNING": logging.INFO}  # it warns of much that is well

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)

        def log(self, severity: Any, text: str) -> None:
            line = " ".join(str(text).split())
            level = levels.get(severity.name, logging.WARNING)
            if level == logging.WARNING:
                self.errors.append(line)  # told by whoever made the call that failed
                level = logging.DEBUG
            log.log(level, "%s", line)

        def taken(self) -> str:
            """The errors since the last time, as one line."""
            lines = list(dict.fromkeys(self.errors))
            self.errors.clear()
            return "; ".join(lines) or "it does not say why"

    return Logger


def sizes(dims: Any) -> tuple[int, ...]:
    """TensorRT's dimensions as a tuple."""
    return tuple([int(dims[axis]) for axis in range(len(dims))])
