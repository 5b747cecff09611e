"""The oldest versions that pyproject.toml allows of what the package needs, as constraints for pip.

Usage: `python tools/lowest.py`, of which `make test-lowest` makes an environment. Tools of development are as new as
they come: nobody has them who uses the package.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {"deploy", "dev"}
FOR_GPUS = {"gpu", "tensorrt"}  # whose lowest versions nothing here could run


def constraints() -> list[str]:
    """`NAME==VERSION` of each lower bound, with the marker that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [wanted for extra, wanted in project["optional-dependencies"].items() if extra not in TOOLS | FOR_GPUS]
    wanted = [Requirement(text) for group in (project["dependencies"], *groups) for text in group]
    return [
        f"{one.name}=={bound.version}" + (f" ; {one.marker}" if one.marker else "")
        for one in wanted
        for bound in one.specifier
        if bound.operator == ">="
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join([*constraints(), ""]))
