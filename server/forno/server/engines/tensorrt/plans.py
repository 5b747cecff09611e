"""Plan files: what can be known of one before it is loaded, and why one could not be.

The first 28 bytes are as `trtexec --getPlanVersionOnly` reads them: the tag `ftrt`, the number of the format, and at
the end the release that wrote the plan, a byte a number. The GPU that it was built for is told only by the failure to
load it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

SUFFIXES = (".plan", ".engine")
TAG = b"ftrt"
HEADER_BYTES = 28
_KNOWN_FORMAT = 0
_SAME = 3  # numbers of a release that plans are tied to: 10.13.3
_OTHER_GPU = re.compile(r"expecting compute (\d+)\.(\d+) got compute (\d+)\.(\d+)")


def written_by(path: Path) -> tuple[int, ...] | None:
    """The release that wrote a plan, such as (10, 13, 3, 9); None where the header is of a format not known here.

    Raises:
        ConfigError: The file is no plan, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(header) < HEADER_BYTES or not header.startswith(TAG):
        raise ConfigError(
            f"{path} is not a TensorRT plan: its first bytes are {header[: len(TAG)]!r}, expected {TAG!r}"
        )
    if int.from_bytes(header[4:8], "little") != _KNOWN_FORMAT:
        return None
    return tuple(header[24:HEADER_BYTES])


def check_release(path: Path, installed: tuple[int, ...], *, version_compatible: bool) -> None:
    """Refuses a plan that the installed release cannot run.

    Raises:
        ConfigError: It was written by another release, and not to be run by others; or the file is no plan.
    """
    written = written_by(path)
    if written is None or written[:_SAME] == installed[:_SAME]:
        return
    told = f"{path} was built with TensorRT {_dotted(written)}, and {_dotted(installed)} is installed"
    if written[:_SAME] > installed[:_SAME]:
        raise ConfigError(f"{told}, which is older: install {_dotted(written)}, or build the plan anew")
    if not version_compatible:
        raise ConfigError(
            f"{told}: build it anew, or, if it was built version compatible and you trust the code that it then holds, "
            "set tensorrt.version_compatible: true"
        )


def why_not_loaded(path: Path, said: str) -> ConfigError:
    """The error for a plan that TensorRT did not load, from what it said."""
    other = _OTHER_GPU.search(said)
    if other:
        here, there = f"{other[1]}.{other[2]}", f"{other[3]}.{other[4]}"
        return ConfigError(
            f"{path} was built for a GPU of compute capability {there}, and this one has {here}: "
            "build the plan on such a GPU, or give the ONNX model with engine: tensorrt"
        )
    return ConfigError(f"TensorRT cannot load {path}: {said}")


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
