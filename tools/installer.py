"""What installs packages: uv where it is on PATH, for speed, pip otherwise. Both read their own usual configuration."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def pip(command: str, *words: str, python: Path | str = sys.executable) -> list[str]:
    """A command of pip's, such as `install`, for the environment of an interpreter."""
    uv = shutil.which("uv")
    return [uv, "pip", command, "--python", str(python), *words] if uv else [str(python), "-m", "pip", command, *words]
