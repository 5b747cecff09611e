"""Runs every check that is not a test, all of them even when one fails, and says which failed.

Usage: `python tools/check.py [REVISION]`; the contract is compared with that revision.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))


def checks(revision: str) -> dict[str, list[str]]:
    """Name and command of each check; what generated code must be is a test in tests/repo."""
    python = sys.executable
    return {
        "style (ruff check)": [str(SCRIPTS / "ruff"), "check", "--quiet", "--output-format=concise", "."],
        "form (ruff format)": [
            str(SCRIPTS / "ruff"),
            "format",
            "--check",
            "--quiet",
            "--output-format=concise",
            ".",
        ],
        "types (mypy)": [python, "-m", "mypy", "--no-error-summary"],
        "architecture (import-linter)": [str(SCRIPTS / "lint-imports"), "--no-logo"],
        "contract (buf)": [python, "tools/check_proto.py", revision],
        "deployment": [python, "tools/check_deploy.py"],
        "generated code": [python, "-m", "pytest", "-q", "--no-header", "tests/repo/test_generated.py"],
    }


def main(revision: str) -> int:
    """Runs the checks in order; the output of those that pass is not shown.

    Returns:
        0 if all passed, 1 otherwise.
    """
    failed = []
    for name, command in checks(revision).items():
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        verdict = "ok" if done.returncode == 0 else "FAILED"
        print(f"{name:<30} {verdict:<6} {time.monotonic() - began:5.1f} s", flush=True)
        shown = done.stdout + done.stderr if done.returncode else skipped(done.stdout)
        print(shown, end="", flush=True)
        if done.returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def skipped(output: str) -> str:
    """The lines of a passing check that say what it left out."""
    return "".join(f"  {line}\n" for line in output.splitlines() if "skipped" in line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "main"))
