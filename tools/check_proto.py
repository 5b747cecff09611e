"""Runs buf over the contract: lint, format, and no breaking change against an earlier revision.

Usage: `python tools/check_proto.py [REVISION]`, `main` by default. buf is taken from PATH or, where Node.js
is, from npm; without either the checks are skipped with a line that says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import generate

ROOT = generate.ROOT
BUF = "@bufbuild/buf@1.75.0"


def buf() -> list[str]:
    """The command that runs buf; empty if there is none."""
    for command in (["buf"], ["npx", "--yes", BUF]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, check=False, cwd=ROOT)
            if done.returncode == 0:
                return command
    return []


def image(proto: Path, target: Path) -> None:
    """Compiles the .proto files below `proto` into a descriptor set with comments."""
    files = sorted(proto.rglob("*.proto"))
    options = ["--include_imports", "--include_source_info", f"--descriptor_set_out={target}"]
    generate.compile_protos(options, files, proto)


def earlier(revision: str, folder: Path) -> Path | None:
    """The proto/ folder of a revision, unpacked below `folder`; None where it has none."""
    done = subprocess.run(["git", "archive", revision, "proto"], capture_output=True, check=False, cwd=ROOT)
    if done.returncode:
        return None
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    return folder / "proto"


def main(revision: str) -> int:
    """Runs all checks.

    Returns:
        0 if they passed or were skipped, 1 if one failed.
    """
    command = buf()
    if not command:
        print(f"buf: skipped; install buf, or Node.js for {BUF}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        now, before = Path(folder) / "now.binpb", Path(folder) / "before.binpb"
        image(ROOT / "proto", now)
        scope = ["--config", "buf.yaml", "--path", "forno"]  # the sets hold Google's protos too
        checks = [
            ["lint", str(now), *scope],
            ["format", "--diff", "--exit-code", "proto"],
        ]
        old = earlier(revision, Path(folder))
        if old:
            image(old, before)
            checks.append(["breaking", str(now), "--against", str(before), *scope])
        else:
            print(f"buf breaking: skipped; there is no contract at revision '{revision}' to compare with")
        failed = 0
        for check in checks:
            failed |= subprocess.run([*command, *check], check=False, cwd=ROOT).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "main"))
