"""What the Makefile promises: targets that are declared, listed or named in a document have rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import doc_commands

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
RULES = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE))


def test_every_target_that_is_declared_has_a_rule():
    declared = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert declared
    assert set(declared[1].split()) == RULES


def test_every_target_that_a_document_names_has_a_rule():
    text = "\n".join(path.read_text() for path in doc_commands.documents())
    named = set(re.findall(r"(?:`|^|\$ )make ([a-z-]+)", text, re.MULTILINE))
    assert named >= {"run", "test", "gpu-check", "test-tensorrt"}
    assert named <= RULES


def test_bindings_that_cannot_be_had_are_named():
    nothing = {**os.environ, "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_NO_CACHE": "1"}
    command = [sys.executable, ROOT / "tools" / "try_tensorrt.py"]
    done = subprocess.run(command, env=nothing, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done
    (line,) = done.stdout.splitlines()
    assert line.startswith("test-tensorrt: not looked at, because it cannot be had here: TensorRT >=10.13,<10.14 (")
