"""Build hook: what is native goes into wheels and editable installs where it can be built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import build_kernels
import build_native


class NativeModuleHook(BuildHookInterface[Any]):
    """Compiles both and, if that of the module worked, marks the wheel as one for this platform and interpreter."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Runs before the wheel (or editable wheel) is put together."""
        self.app.display_info(build_native.build())
        self.app.display_info(build_kernels.build())
        if build_native.TARGET.is_file():
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
